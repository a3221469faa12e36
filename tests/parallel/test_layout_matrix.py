"""Every loss on every parallel layout equals one process: loss, gradient norm, task sums, gradients and weights.

In fp32, over several steps of Adam, on global batches in which tasks are missing: from micro-batches, from ranks, from
the whole batch. One process in turn equals the reference in fp64 (:mod:`.test_one_process`). ``make test`` runs some
layouts with a few losses each, so that every loss is run; ``make test-all`` runs everything.
"""

import dataclasses
import functools
from pathlib import Path

import numpy as np
import pytest

from mft_megatron.loss_names import LOSSES
from tests.parallel.layouts import LAYOUTS
from tests.parallel.modes import MODES, STEPS, TOLERANCE, assert_same_step, smallest_difference
from tests.parallel.run import (
    arguments_for,
    data_seed,
    lacks_tasks,
    open_dataset,
    plans_of,
    train_in_modes,
    train_on_everything,
)
from tests.ranks import run_on_ranks

# Clipped gradients, five steps of Adam with the usual epsilon, and Megatron-Core's cross entropy.
USUAL = "usual"
LOSS_OPTIONS = {
    **MODES,
    USUAL: f"{MODES['task-token']} --clip-grad 1 --adam-eps 1e-8 --init-method-std 0.02 --cross-entropy-impl megatron",
}
LOSS_STEPS = {**STEPS, USUAL: 5}
QUICK = [layout for layout in LAYOUTS if layout.quick]


def of_quick(layout):
    """Modes of a quick layout: two of the losses in turn, and USUAL."""
    names, index = list(MODES), QUICK.index(layout)
    return (names[2 * index % len(names)], names[(2 * index + 1) % len(names)], USUAL)


@functools.cache
def one_process(prefix, shape, modes):
    """Train in one process with Megatron-Core's cross entropy; the parallel layouts have the fused one, the default.

    With experts a micro-batch is one row, since router losses depend on the rows of a micro-batch.
    """
    rows = 1 if "experts" in shape else 8
    options = f"--micro-batch-size {rows} --cross-entropy-impl megatron"
    chosen = {mode: LOSS_OPTIONS[mode] for mode in modes}
    return run_on_ranks(1, train_in_modes, prefix, options, 1, chosen, LOSS_STEPS, shape, timeout=600)[0]


def _cases():
    for layout in LAYOUTS:
        if layout.quick:
            yield pytest.param(layout, of_quick(layout), id=str(layout))
        yield pytest.param(layout, tuple(LOSS_OPTIONS), id=f"{layout}, every loss", marks=pytest.mark.slow)


@pytest.mark.parametrize(("layout", "modes"), list(_cases()))
def test_equals_one_process(dataset_prefix, layout, modes):
    if modes == tuple(LOSS_OPTIONS):
        expected = one_process(dataset_prefix, layout.shape, modes)
    else:
        # each loss is computed once for all layouts
        expected = {mode: one_process(dataset_prefix, layout.shape, (mode,))[mode] for mode in modes}
    chosen, world = {mode: LOSS_OPTIONS[mode] for mode in modes}, layout.world_size
    results = run_on_ranks(
        world, train_in_modes, dataset_prefix, layout.options, world, chosen, LOSS_STEPS, layout.shape, timeout=900
    )
    for mode, curve in expected.items():
        for step, record in enumerate(curve):
            if mode == USUAL:
                record = {name: value for name, value in record.items() if name not in ("gradients", "weights")}
            of_ranks = [result[mode][step] for result in results]
            assert_same_step(of_ranks, record, f"{mode}, step {step + 1}", layout.tolerance)


def test_every_run_has_every_loss():
    assert {mode for layout in QUICK for mode in of_quick(layout)} == set(LOSS_OPTIONS)
    assert len(LAYOUTS) >= 30
    assert len({str(layout) for layout in LAYOUTS}) == len(LAYOUTS)


def test_the_losses_differ(dataset_prefix):
    """The comparison would prove nothing if two modes were equal, nothing was learnt or nothing clipped."""
    curves = {mode: one_process(dataset_prefix, "llama", (mode,))[mode] for mode in LOSS_OPTIONS}
    usual = curves.pop(USUAL)
    assert {options.split()[1] for options in MODES.values()} == set(LOSSES)
    assert smallest_difference([curve[2]["grad_norm"] for curve in curves.values()]) > 1000 * TOLERANCE
    for curve in curves.values():
        first, last = (curve[step]["gradients"]["layer 1 linear_fc2"][2] for step in (0, -1))
        assert np.abs(first - last).max() > 0.01 * np.abs(first).max()
    assert usual[-1]["loss"] < usual[0]["loss"] - 0.1
    assert all(record["grad_norm"] > 1.05 for record in usual)


def test_tasks_are_missing_wherever_they_can(dataset_prefix):
    """The cases that the matrix tests occur in its steps."""
    split = open_dataset(arguments_for(dataset_prefix, "", 1)).split("train")
    assert split.dataset.tasks[3] == "read"
    assert lacks_tasks(plans_of(split, data_seed(split)), split)


@pytest.fixture(scope="module")
def same_samples(dataset_prefix, tokenizer_folder, tmp_path_factory):
    """Prefixes of the same few samples, by name: packed for 128 tokens, for 192, and one sample per row."""
    from mft_megatron.data.packing.packing_options import PackingOptions
    from mft_megatron.data.preprocessing.preprocess import preprocess
    from mft_megatron.data.preprocessing.recipe import Recipe
    from mft_megatron.data.preprocessing.repack import add_length
    from mft_megatron.data.tasks.task_files import TaskFiles

    folder = tmp_path_factory.mktemp("same_samples")
    tasks = {}
    for path in sorted(Path(dataset_prefix).parent.glob("*.jsonl")):
        lines = [line for line in path.read_text().splitlines() if len(line) < 200][:6]
        tasks[path.stem] = TaskFiles(path.stem, (folder / path.name,))
        tasks[path.stem].files[0].write_text("".join(f"{line}\n" for line in lines))
    packed = PackingOptions(128, split=(1, 0, 0))
    for name, options in {"packed": packed, "single": dataclasses.replace(packed, padding_mode="padding")}.items():
        preprocess(Recipe(tasks, "HuggingFaceTokenizer", str(tokenizer_folder), folder / name, options))
    add_length(str(folder / "packed"), dataclasses.replace(packed, seq_length=192))
    packed, single = str(folder / "packed"), str(folder / "single")
    return {"packed": (packed, ""), "longer": (packed, "--seq-length 192"), "single": (single, "")}


IN_PACKS = {mode: MODES[mode] for mode in ("task-token", "focal-sample")}
# router losses are means over rows, so they depend on the packing
NO_ROUTER_LOSSES = "--moe-router-load-balancing-type none --moe-aux-loss-coeff 0 --moe-z-loss-coeff 0"
# with padded rows ranks have different numbers of tokens, which only this dispatcher supports
FOR_PADDED_ROWS = "--moe-token-dispatcher-type alltoall --expert-tensor-parallel-size 1"


def _extra(layout):
    return f" {NO_ROUTER_LOSSES}" if "experts" in layout.shape else ""


@functools.cache
def packed_in_one_process(prefix, shape, extra, modes):
    chosen = {mode: MODES[mode] for mode in modes}
    return run_on_ranks(1, train_on_everything, prefix, f"--micro-batch-size 4 {extra}", 1, chosen, shape)[0]


def _pairs():
    for layout in LAYOUTS:
        quick = layout.quick and layout.world_size == 2
        yield pytest.param(layout, id=str(layout), marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize("data", ["longer", "single"])
@pytest.mark.parametrize("layout", list(_pairs()))
def test_packing_changes_no_result(same_samples, layout, data):
    """Every parallel layout equals one process with packs of 128 tokens, whether samples are packed or not."""
    extra, world = _extra(layout), layout.world_size
    expected = packed_in_one_process(same_samples["packed"][0], layout.shape, extra, tuple(IN_PACKS))
    prefix, length = same_samples[data]
    options = f"{layout.options} {length}{extra}"
    if data == "single" and extra:
        options += f" {FOR_PADDED_ROWS}"
    results = run_on_ranks(world, train_on_everything, prefix, options, world, IN_PACKS, layout.shape, timeout=300)
    for mode, record in expected.items():
        assert_same_step([result[mode] for result in results], record, mode, layout.tolerance)


def test_rows_of_the_same_samples_differ(same_samples):
    rows = {}
    for name, (prefix, extra) in same_samples.items():
        dataset = open_dataset(arguments_for(prefix, extra, 1))
        split = dataset.split("train")
        rows[name] = {frozenset(split.slices_of(pack).samples.tolist()) for pack in range(split.num_packs)}
        assert not any(cut.dropped for cut in dataset.entry.tasks)
    assert len({frozenset.union(*of_rows) for of_rows in rows.values()}) == 1
    assert len(rows["single"]) > 1.5 * len(rows["packed"]) > 1.5 * len(rows["longer"]) > 5
    assert len(rows["packed"] & rows["longer"]) < len(rows["longer"]) / 3
