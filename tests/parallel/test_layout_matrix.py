"""Every mode on every layout equals one process: loss, gradient norm, sums by task, and gradients weight by weight.

In fp32, over several steps of Adam, on global batches in which tasks are missing: from micro-batches, from ranks, from
the whole batch. One process, in turn, equals the book in fp64. Gradients are not clipped here; :mod:`.test_layouts` has
the steps that are.
"""

import dataclasses
import functools
from pathlib import Path

import numpy as np
import pytest
from conftest import run_on_ranks
from run import arguments_for, data_seed, lacks_tasks, open_dataset, plans_of, train_in_modes, whole_gradients
from test_layouts import LAYOUTS, MORE

from mft_megatron.loss_names import LOSSES

WEIGHTS = "completion=1 explain=2 write=0.5 read=3"
MODES = {
    "token": "--mft-loss token",
    "sample": "--mft-loss sample",
    "task-token": f"--mft-loss task-token --task-weights {WEIGHTS}",
    "task-sample": f"--mft-loss task-sample --task-weights {WEIGHTS}",
    "focal-sample": "--mft-loss focal-sample",
    "focal-sample detached": "--mft-loss focal-sample --focal-detach",
    "focal-task": "--mft-loss focal-task",
    "focal-task detached": "--mft-loss focal-task --focal-detach",
    "focal-task with alphas": f"--mft-loss focal-task --focal-alpha {WEIGHTS}",
}
# focal-task looks back at the last step that had a task, and read is missing from the second and the fourth
STEPS = {mode: 5 if "focal-task" in mode else 3 for mode in MODES}
QUICK = (*LAYOUTS, "TP2 SP", "PP2 VPP2")
SLOW = [pytest.param(layout, marks=pytest.mark.slow) for layout in MORE if layout not in QUICK]
TOLERANCE = 1e-6
GRADIENT_TOLERANCE = 2e-6  # of single elements, against the largest of the weight; seen: 9e-7


@functools.cache
def one_process(prefix):
    """With Megatron-Core's cross entropy, where the layouts have the fused one, which is the default."""
    options = "--micro-batch-size 8 --cross-entropy-impl megatron"
    return run_on_ranks(1, train_in_modes, prefix, options, 1, MODES, STEPS)[0]


def assert_same_step(of_ranks, expected, where):
    """A step as every rank reports it, and its gradients put together, against that of one process."""
    for record in of_ranks:
        for name in ("loss", "grad_norm", "loss_K", "objective_K", "share_K"):
            np.testing.assert_allclose(record[name], expected[name], rtol=TOLERANCE, err_msg=f"{where}: {name}")
        np.testing.assert_array_equal(record["tokens_K"], expected["tokens_K"], f"{where}: supervised tokens")
    if "gradients" in expected:
        ours = whole_gradients([record["gradients"] for record in of_ranks])
        assert_same_gradients(ours, whole_gradients([expected["gradients"]]), where)


def assert_same_gradients(ours, theirs, where):
    """By the largest difference of each weight against the largest gradient of that weight."""
    assert ours.keys() == theirs.keys()
    assert len(ours) == 2 * 4 + 2  # a matrix and a norm of each layer, and both ends
    for name, gradient in theirs.items():
        largest = GRADIENT_TOLERANCE * np.abs(gradient).max()
        np.testing.assert_allclose(ours[name], gradient, rtol=0, atol=largest, err_msg=f"{where}: {name}")


@pytest.mark.parametrize("layout", [*QUICK, *SLOW])
def test_every_mode_equals_one_process(dataset_prefix, layout):
    world_size, options = {**LAYOUTS, **MORE}[layout]
    expected = one_process(dataset_prefix)
    results = run_on_ranks(world_size, train_in_modes, dataset_prefix, options, world_size, MODES, STEPS, timeout=600)
    for mode, curve in expected.items():
        for step, record in enumerate(curve):
            of_ranks = [result[mode][step] for result in results]
            assert_same_step(of_ranks, record, f"{mode}, step {step + 1}")


def apart(values):
    """The smallest relative difference between any two of some values."""
    return min(abs(a / b - 1) for i, a in enumerate(values) for b in values[:i])


def test_the_modes_are_not_all_alike(dataset_prefix):
    """The comparison would be empty if two modes were one, or if nothing was learnt."""
    curves = one_process(dataset_prefix)
    assert {options.split()[1] for options in MODES.values()} == set(LOSSES)
    assert apart([curve[2]["grad_norm"] for curve in curves.values()]) > 1000 * TOLERANCE
    for curve in curves.values():
        first, last = (curve[step]["gradients"]["layer 1 linear_fc2"][2] for step in (0, -1))
        assert np.abs(first - last).max() > 0.01 * np.abs(first).max()


def test_tasks_are_missing_wherever_they_can(dataset_prefix):
    """The situations that the matrix is about really occur in its steps."""
    split = open_dataset(arguments_for(dataset_prefix, "", 1)).split("train")
    assert split.dataset.tasks[3] == "read"
    assert lacks_tasks(plans_of(split, data_seed(split)), split)


def _micro_batch_normalisation(prefix):
    modes = {
        mode: f"{options} --mft-normalization micro-batch" for mode, options in MODES.items() if "focal" not in mode
    }
    once = dict.fromkeys(modes, 1)
    return {size: train_in_modes(prefix, f"--micro-batch-size {size}", 1, modes, once) for size in (1, 4, 8)}


def test_micro_batch_normalisation_is_not_invariant(dataset_prefix):
    """Why it is no column of the matrix; where the micro-batch is the whole batch it is the other normalisation."""
    by_size = run_on_ranks(1, _micro_batch_normalisation, dataset_prefix)[0]
    for mode, (expected, *_) in ((mode, one_process(dataset_prefix)[mode]) for mode in by_size[8]):
        assert_same_step([by_size[8][mode][0]], expected, mode)
        for what in ("loss", "grad_norm"):
            assert apart([by_size[size][mode][0][what] for size in (1, 4, 8)]) > 10 * TOLERANCE


def _book(mode, samples, weight_K, gamma, detach, before):
    """The objective of docs/LOSSES.md in torch, to be differentiated; ``samples``: (task, token losses) each.

    ``before``: (P, Q) of tasks by the statistics of earlier steps. Returns the objective and the step's own statistics.
    """
    import torch

    def mean(values):
        return torch.stack(list(values)).mean()

    present = sorted({task for task, _ in samples})
    own = {i: [loss for task, loss in samples if task == i] for i in present}
    statistics = {i: (mean((-loss).exp().mean() for loss in own[i]), mean(map(torch.mean, own[i]))) for i in present}
    total = sum(weight_K[i] for i in present)
    if mode == "token":
        return torch.cat([loss for _, loss in samples]).mean(), statistics
    if mode == "sample":
        return mean(loss.mean() for _, loss in samples), statistics
    if mode == "task-token":
        return sum(weight_K[i] * torch.cat(own[i]).mean() for i in present) / total, statistics
    if mode == "task-sample":
        return sum(weight_K[i] * statistics[i][1] for i in present) / total, statistics
    value = 0
    for i in present:
        if mode == "focal-sample":
            factors = [(1 - (-loss).exp().mean()) ** gamma for loss in own[i]]
            factors = [factor.detach() for factor in factors] if detach else factors
            part = mean(factor * loss.mean() for factor, loss in zip(factors, own[i], strict=True))
        elif i not in before:
            part = statistics[i][1]
        else:
            (p, q), (p_now, q_now) = before[i], statistics[i]
            slope = 0 if detach else gamma * (1 - p) ** (gamma - 1) * q
            part = (1 - p) ** gamma * q_now - slope * p_now
        value = value + weight_K[i] * part / len(present)
    return value, statistics


def _in_fp64(arguments, dataset):
    """The model in fp64; its norms no longer round to fp32 on the way."""
    import torch

    from mft_megatron.mcore.model import PackedGPTModel
    from mft_megatron.mcore.norm import RMSNorm

    model = PackedGPTModel(arguments, dataset.vocab_size).double().eval()
    for norm in (module for module in model.modules() if isinstance(module, RMSNorm)):
        norm.forward = functools.partial(
            lambda norm, hidden: torch.nn.functional.rms_norm(hidden, norm.normalized_shape, norm.weight, norm.eps),
            norm,
        )
    return model


def _token_losses(model, dataset, split, packs):
    """(task, losses of the supervised tokens) of each sample of some packs, from fp64 logits."""
    from mft_megatron.mcore.step import to_device

    samples = []
    for pack in packs:
        batch = split.rows(np.array([pack]))
        logits = model.run(to_device(batch), with_loss=False)[0, :, : dataset.vocab_size]
        log_p = logits.log_softmax(-1)
        tokens, mask = batch.tokens_BS[0], batch.loss_mask_BS[0]
        for start, end in zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False):
            targets = [t for t in range(start, end - 1) if mask[t]]
            if targets:
                losses = -log_p[targets, [int(tokens[t + 1]) for t in targets]]
                samples.append((int(batch.task_ids_BS[0, start]), losses))
    return samples


def _against_fp64(prefix, modes, steps):
    """By mode and step: what the trainer reports, and what the book says at the trainer's weights in fp64."""
    import torch
    from reference import reference_loss
    from run import FOR_GRADIENTS, chosen_gradients

    from mft_megatron.mcore import parallel
    from mft_megatron.mcore.step import Trainer
    from mft_megatron.training.task_weights import initial_weights

    arguments = arguments_for(prefix, "", 1)
    dataset = open_dataset(arguments)
    split, pairs = dataset.split("train"), {}
    with parallel.process_groups(arguments.distributed, arguments.initialization.seed):
        exact = _in_fp64(arguments, dataset)
        for mode, extra in modes.items():
            arguments = arguments_for(prefix, f"{extra} {FOR_GRADIENTS}", 1)
            options, weight_K = arguments.multi_task, initial_weights(arguments.multi_task, dataset.tasks)
            trainer, before, pairs[mode] = Trainer(arguments, dataset.vocab_size, weight_K), {}, []
            for plan in plans_of(split, data_seed(split), steps):
                exact.load_state_dict(trainer.chunks[0].module.state_dict())
                exact.zero_grad()
                samples = _token_losses(exact, dataset, split, plan.packs_G)
                value, now = _book(
                    options.mft_loss, samples, weight_K, options.focal_gamma, options.focal_detach, before
                )
                value.backward()
                before |= {task: (p.item(), q.item()) for task, (p, q) in now.items()}
                gradients = {name: parameter.grad for name, parameter in exact.named_parameters()}
                norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm().item()
                losses = [(task, loss.detach().numpy()) for task, loss in samples]
                loss = reference_loss(options.mft_loss, losses, weight_K, options.focal_gamma)

                report = trainer.train_step(split, plan)
                chosen = {name: own for name, (_, _, own) in chosen_gradients(trainer).items()}
                book = {name: gradients[_name_in_model(name)].numpy() for name in chosen}
                pairs[mode].append(((report.loss, report.grad_norm, chosen), (loss, norm, book), value.item()))
    return pairs


def _name_in_model(name):
    if name in ("embedding", "output_layer"):
        return {"embedding": "embedding.word_embeddings.weight", "output_layer": "output_layer.weight"}[name]
    _, layer, what = name.split()
    return f"decoder.layers.{int(layer) - 1}.{'mlp.' if what == 'linear_fc2' else ''}{what}.weight"


def test_one_process_equals_the_book_in_fp64(dataset_prefix):
    """Loss, gradient norm and gradients of three steps, each at the weights that the trainer has then."""
    for mode, steps in run_on_ranks(1, _against_fp64, dataset_prefix, MODES, 3)[0].items():
        for step, ((loss, norm, gradients), (book_loss, book_norm, book_gradients), differentiated) in enumerate(steps):
            where = f"{mode}, step {step + 1}"
            assert loss == pytest.approx(book_loss, rel=TOLERANCE), where
            assert norm == pytest.approx(book_norm, rel=TOLERANCE), where
            assert_same_gradients(gradients, book_gradients, where)
            # the book in torch, which is differentiated, is the book in numpy, but for the surrogate of focal-task
            assert (differentiated == pytest.approx(book_loss, rel=1e-12)) == ("focal-task" not in mode), where


@pytest.fixture(scope="module")
def packed_for_two_lengths(dataset_prefix, tokenizer_folder, tmp_path_factory):
    """Prefixes of the same short samples packed for 128 and for 192 tokens, by length; nothing is held out."""
    from mft_megatron.data.layout import Layout
    from mft_megatron.data.preprocess import Recipe, preprocess
    from mft_megatron.data.repack import add_length
    from mft_megatron.data.sources import TaskSource

    folder = tmp_path_factory.mktemp("two_lengths")
    tasks = {}
    for path in sorted(Path(dataset_prefix).parent.glob("*.jsonl")):
        lines = [line for line in path.read_text().splitlines() if len(line) < 200][:12]
        tasks[path.stem] = TaskSource(path.stem, (folder / path.name,))
        tasks[path.stem].files[0].write_text("".join(f"{line}\n" for line in lines))
    layout = Layout(128, split=(1, 0, 0))
    recipe = Recipe(tasks, "HuggingFaceTokenizer", str(tokenizer_folder), folder / "packed", layout)
    preprocess(recipe)
    add_length(str(folder / "packed"), dataclasses.replace(layout, seq_length=192))
    return dict.fromkeys((128, 192), str(folder / "packed"))


def _whole_split(prefixes):
    """Two steps on all packs in each mode, by length."""
    results = {}
    for length, prefix in prefixes.items():
        packs = open_dataset(arguments_for(prefix, f"--seq-length {length}", 1)).split("train").num_packs
        options = f"--seq-length {length} --global-batch-size {packs} --micro-batch-size 1"
        results[length] = train_in_modes(prefix, options, 1, MODES, dict.fromkeys(MODES, 2))
    return results


def test_it_does_not_matter_which_samples_share_a_pack(packed_for_two_lengths):
    packs = {}
    for length, prefix in packed_for_two_lengths.items():
        dataset = open_dataset(arguments_for(prefix, f"--seq-length {length}", 1))
        split = dataset.split("train")
        packs[length] = {frozenset(split.pieces_of(pack).samples.tolist()) for pack in range(split.num_packs)}
        assert not any(cut.dropped for cut in dataset.entry.tasks)
    assert frozenset.union(*packs[128]) == frozenset.union(*packs[192])
    assert len(packs[128]) > len(packs[192]) > 5
    assert len(packs[128] & packs[192]) < len(packs[192]) / 3
    results = run_on_ranks(1, _whole_split, packed_for_two_lengths)[0]
    for mode in MODES:
        for step in range(2):
            where = f"{mode}, step {step + 1}"
            assert_same_step([results[192][mode][step]], results[128][mode][step], where)
