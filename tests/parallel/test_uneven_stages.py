"""Pipeline stages with different numbers of layers equal one process, whatever the split."""

import functools
from pathlib import Path

import pytest

from tests.parallel.run import TASK_WEIGHTS, arguments_for, open_dataset, plans_of
from tests.ranks import run_on_ranks

PP2, PP4 = "--pipeline-model-parallel-size 2", "--pipeline-model-parallel-size 4"
FIRST, LAST = "--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers"
EMBEDDING, LOSS = "--account-for-embedding-in-pipeline-split", "--account-for-loss-in-pipeline-split"
LAYOUT = "--pipeline-model-parallel-layout"
VPP2 = "--num-virtual-stages-per-pipeline-rank 2"
# ranks, shape, layers, options, layers of each stage by rank
CASES = {
    "tied, embedding and loss alone": (2, "tied", 6, f"{PP2} {LAYOUT} E|t*3|tt|tL", [[0, 2], [3, 1]]),
}
MORE = {
    "3 + 1": (2, "llama", 4, f"{PP2} {FIRST} 3", [[3], [1]]),
    "1 + 3": (2, "llama", 4, f"{PP2} {LAST} 3", [[1], [3]]),
    "tied 3 + 1": (2, "tied", 4, f"{PP2} {FIRST} 3", [[3], [1]]),
    "2 + 1 + 1 + 2": (4, "llama", 6, f"{PP4} {FIRST} 2 {LAST} 2", [[2], [1], [1], [2]]),
    "1 + 3 + 3 + 1": (4, "tied", 8, f"{PP4} {FIRST} 1 {LAST} 1", [[1], [3], [3], [1]]),
    "4 + 2 in two chunks": (2, "llama", 6, f"{PP2} {FIRST} 4 {VPP2}", [[2, 2], [1, 1]]),
    "embedding counted": (4, "llama", 7, f"{PP4} {EMBEDDING}", [[1], [2], [2], [2]]),
    "loss counted": (2, "tied", 3, f"{PP2} {LOSS}", [[2], [1]]),
    "both counted, in two chunks": (2, "llama", 6, f"{PP2} {EMBEDDING} {LOSS} {VPP2}", [[1, 2], [2, 1]]),
    "both counted, two layers each": (
        2,
        "llama",
        6,
        f"{PP2} {EMBEDDING} {LOSS} --num-layers-per-virtual-pipeline-stage 2",
        [[1, 2], [2, 1]],
    ),
    "stages without layers": (2, "tied", 2, f"{PP2} {LAYOUT} Et|(|)*1t|L", [[1, 1], [0, 0]]),
    "TP2 SP 3 + 1": (
        4,
        "llama",
        4,
        f"{PP2} {FIRST} 3 --tensor-model-parallel-size 2 --sequence-parallel",
        [[3], [1]],
    ),
}


def _train(prefix, extra, world, shape, steps, folder=None, save_after=None):
    """Train, saving or resuming; return the layers of this rank's model chunks, and loss and gradient norm per step."""
    from mft_megatron.mcore.checkpointing import checkpoint
    from mft_megatron.mcore.parallel import process_groups
    from mft_megatron.mcore.trainer import Trainer
    from mft_megatron.run_folder.description import CheckpointInfo
    from mft_megatron.run_folder.found import latest_checkpoint

    arguments = arguments_for(prefix, extra, world, shape)
    dataset = open_dataset(arguments)
    with process_groups.process_groups(arguments.distributed, arguments.initialization.seed):
        trainer = Trainer(arguments, dataset.vocab_size, 4)
        layers = [[layer.layer_number for layer in chunk.module.decoder.layers] for chunk in trainer.chunks]
        curve, start = [], 0
        if folder is not None and save_after is None:
            newest = latest_checkpoint(folder)
            path, info = newest.path, newest.info
            checkpoint.load(path, trainer, info, arguments.checkpoint)
            start = info.iteration
        for number, plan in enumerate(plans_of(dataset.split("train"), 1, steps)[start:], start + 1):
            report = trainer.train_step(dataset.split("train"), plan, TASK_WEIGHTS)
            curve.append((report.loss, report.grad_norm))
            if number == save_after:
                info = CheckpointInfo(
                    number, 0, {}, dataset.vocab_size, {}, "", 1, 8, layout=process_groups.parallel_layout()
                )
                checkpoint.save(Path(folder), trainer, info, arguments.checkpoint)
        return layers, curve


@functools.cache
def one_process(prefix, shape, layers, steps):
    return run_on_ranks(1, _train, prefix, f"--num-layers {layers} --micro-batch-size 8", 1, shape, steps)[0][1]


def layers_of(stages):
    """Layer indices of each model chunk of each pipeline rank: all ranks' first chunks come before their second."""
    numbers, layers = iter(range(1, 100)), [[] for _ in stages]
    for chunk in range(len(stages[0])):
        for rank, sizes in enumerate(stages):
            layers[rank].append([next(numbers) for _ in range(sizes[chunk])])
    return layers


def compare(prefix, case, steps):
    world, shape, layers, options, stages = case
    expected = one_process(prefix, shape, layers, steps)
    ranks = run_on_ranks(world, _train, prefix, f"--num-layers {layers} {options}", world, shape, steps)
    for rank, (layers, curve) in enumerate(ranks):
        assert layers == layers_of(stages)[rank * len(stages) // world]
        for ours, theirs in zip(curve, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_equals_one_process(dataset_prefix, case):
    compare(dataset_prefix, CASES[case], 3)


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE)
def test_more_splits(dataset_prefix, case):
    compare(dataset_prefix, MORE[case], 5)


@pytest.mark.parametrize("layout", [f"{PP2} {LAYOUT} Ett|t|t|L", pytest.param("", marks=pytest.mark.slow)])
def test_a_checkpoint_is_resumed_with_another_split(dataset_prefix, tmp_path, layout):
    _, whole = run_on_ranks(2, _train, dataset_prefix, f"{PP2} {LAST} 3", 2, "llama", 3, str(tmp_path), 2)[0]
    world = 2 if layout else 1
    extra = f"{layout} --seed 7"  # another seed, so that a weight that is not loaded would differ
    for _, rest in run_on_ranks(world, _train, dataset_prefix, extra, world, "llama", 3, str(tmp_path)):
        (ours,), (theirs,) = rest, whole[2:]
        assert ours == pytest.approx(theirs, rel=1e-6)


def test_megatron_core_splits_layers_alike(monkeypatch):
    """The checks of options count the same layers per stage as Megatron-Core builds."""
    from mft_megatron.mcore.model.config import (
        transformer_config,  # first, since it prepares Megatron-Core for this machine
    )

    from megatron.core import parallel_state  # isort: skip
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    for world, shape, layers, options, stages in {**CASES, **MORE}.values():
        arguments = arguments_for("x", f"--num-layers {layers} {options}", world, shape)
        virtual = arguments.distributed.num_virtual_stages_per_pipeline_rank
        assert (virtual or 1) == len(stages[0])
        monkeypatch.setattr(parallel_state, "get_virtual_pipeline_model_parallel_world_size", lambda v=virtual: v)
        config = transformer_config(arguments)
        for rank, sizes in enumerate(stages):
            monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_rank", lambda rank=rank: rank)
            for chunk, size in enumerate(sizes):
                stage = {"vp_stage": None if virtual is None else chunk}
                assert get_num_layers_to_build(config, **stage) == size
                numbers = layers_of(stages)[rank][chunk]
                assert not numbers or get_transformer_layer_offset(config, **stage) == numbers[0] - 1
