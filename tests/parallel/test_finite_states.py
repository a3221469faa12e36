"""Weights and states that are not finite are neither saved nor loaded; all ranks of a layout say the same."""

from pathlib import Path

import numpy as np
import pytest

from mft_megatron.exit_codes import DAMAGED, DIVERGED
from mft_megatron.run_folder.found import latest_checkpoint
from tests.parallel.run import arguments_for, info_of_step, plans_of, trainer_and_split
from tests.ranks import run_on_ranks

SHARDED = "--bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 30001"
PIPELINE = "--pipeline-model-parallel-size 2 --optimizer sgd --sgd-momentum 0.9 --hidden-dropout 0"
NAN, INFINITY = float("nan"), -float("inf")
FC2 = "decoder.layers.mlp.linear_fc2.weight"
MEAN, SQUARES = "Adam's mean of gradients (exp_avg)", "Adam's mean of squared gradients (exp_avg_sq)"
# by layout: ranks, options, and by what is spoilt, what is said of it
CASES = {
    "one process": (
        1,
        "",
        {
            ("weight", 3, NAN): f"{FC2} [3] has NaN",
            ("exp_avg", 0, INFINITY): f"{MEAN} of {FC2} [0] has an infinity",
            ("exp_avg_sq", 1, NAN): f"{SQUARES} of {FC2} [1] has NaN",
        },
    ),
    "DP2, states on one rank": (
        2,
        SHARDED,
        {
            ("fp32_param", 1, NAN): f"the fp32 main weight of {FC2} [1] has NaN",
            ("exp_avg_sq", 2, NAN): f"{SQUARES} of {FC2} [2] has NaN",
        },
    ),
    "PP2, the second stage": (
        2,
        PIPELINE,
        {
            ("weight", 3, INFINITY): f"{FC2} [3] has an infinity",
            ("momentum_buffer", 2, NAN): f"the momentum (momentum_buffer) of {FC2} [2] has NaN",
        },
    ),
}


def _state(trainer, kind, layer):
    """This rank's elements of a state of a layer's second matrix, to be changed in place; ``None`` if it has none."""
    from mft_megatron.mcore.optim.finite_states import held_states

    weights = [
        one.mlp.linear_fc2.weight
        for chunk in trainer.chunks
        for one in chunk.module.decoder.layers
        if one.layer_number == layer + 1
    ]
    for state in held_states(trainer.chunks, trainer.optimizer):
        if any(state.weight is weight for weight in weights) and (state.kind or "weight") == kind:
            return state.content.view(-1)
    return None


def _spoil(prefix, options, world, folder, spoilt, unchecked):
    """Save; then spoil one state after another and try to save again.

    Args:
        spoilt: kind of state, layer and value.
        unchecked: save the last of them as releases before the check did, and load it.

    Returns:
        what was said of each, what is in the run folder then, and what was said of loading.
    """
    from mft_megatron.errors import InputError
    from mft_megatron.mcore.checkpointing import checkpoint
    from mft_megatron.mcore.parallel import process_groups

    arguments = arguments_for(prefix, options, world)
    said, loading = [], None
    with process_groups.process_groups(arguments.distributed, 1):
        trainer, split = trainer_and_split(prefix, options, world)
        trainer.train_step(split, plans_of(split, 1, 1)[0], np.ones(4))
        checkpoint.save(Path(folder), trainer, info_of_step(1), arguments.checkpoint)
        for kind, layer, value in spoilt:
            state = _state(trainer, kind, layer)
            before = None if state is None else state[-1].clone()
            if state is not None:
                state[-1] = value
            try:
                checkpoint.save(Path(folder), trainer, info_of_step(2), arguments.checkpoint)
            except InputError as error:
                said.append((str(error), error.code, error.always))
            else:
                said.append(None)
            if state is not None:
                state[-1] = before
        left = latest_checkpoint(folder).info.iteration, sorted(path.name for path in Path(folder).iterdir())
        if unchecked:
            kind, layer, value = spoilt[-1]
            state = _state(trainer, kind, layer)
            if state is not None:
                state[-1] = value
            check, checkpoint.find_non_finite = checkpoint.find_non_finite, lambda *_: None
            path = checkpoint.save(Path(folder), trainer, info_of_step(2), arguments.checkpoint)
            checkpoint.find_non_finite = check
            again, _ = trainer_and_split(prefix, options, world)
            try:
                checkpoint.load(path, again, info_of_step(2), arguments.checkpoint)
            except InputError as error:
                loading = str(error), error.code
    return said, left, loading


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=pytest.mark.slow if name == "one process" else ()) for name in CASES]
)
def test_a_state_that_is_not_finite_is_neither_saved_nor_loaded(dataset_prefix, tmp_path, layout):
    world, options, spoilt = CASES[layout]
    unchecked = layout.startswith("DP2")
    outcomes = run_on_ranks(world, _spoil, dataset_prefix, options, world, str(tmp_path), list(spoilt), unchecked)
    assert outcomes.count(outcomes[0]) == world
    said, (newest, names), loading = outcomes[0]
    for one, expected in zip(said, spoilt.values(), strict=True):
        message, code, always = one
        assert message.startswith(f"{tmp_path / 'iter_0000002'}: {expected} in it, and is not saved; the previous ")
        assert (code, always) == (DIVERGED, False)
    assert newest == 1
    assert "iter_0000002" not in names
    if unchecked:
        message, code = loading
        assert message.startswith(f"{tmp_path / 'iter_0000002'}: {list(spoilt.values())[-1]} in it, and every loss")
        assert message.endswith("take an earlier one with --ckpt-step")
        assert code == DAMAGED


def _spoil_a_run(prefix, folder):
    """Run with a checkpoint after each step, and a NaN in Adam's state after the third."""
    from mft_megatron.errors import InputError
    from mft_megatron.mcore.trainer import Trainer
    from mft_megatron.training.pretrain import pretrain

    train_step, steps = Trainer.train_step, []

    def spoilt(self, *arguments):
        report = train_step(self, *arguments)
        steps.append(report.loss)
        if len(steps) == 3:
            _state(self, "exp_avg_sq", 1)[0] = NAN
        return report

    Trainer.train_step = spoilt
    try:
        pretrain(arguments_for(prefix, f"--save-interval 1 --save {folder}", 1))
    except InputError as error:
        return str(error), error.code, len(steps)


def test_a_run_ends_with_advice_that_is_good(dataset_prefix, tmp_path):
    """The checkpoint before is the newest, and its weights have had a finite loss."""
    said, code, steps = run_on_ranks(1, _spoil_a_run, dataset_prefix, str(tmp_path))[0]
    assert (code, steps) == (DIVERGED, 3)
    assert said.startswith(
        f"step 3: {SQUARES} of {FC2} [1] has NaN in it, so nothing is saved: training has diverged. "
    )
    assert said.endswith(f", and continue from {tmp_path / 'iter_0000002'} with --load {tmp_path}")
    assert latest_checkpoint(tmp_path).info.iteration == 2
