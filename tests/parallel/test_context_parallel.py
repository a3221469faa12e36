"""Context parallelism in cases that the layout matrix does not have.

Ranks whose tokens have no target, or are only padding; token losses; evaluation, draws and micro-batch normalisation;
checkpoints that are loaded on another parallel layout. All are compared with one process.
"""

import dataclasses
import functools

import numpy as np
import pytest

from tests.batches import one_segment
from tests.made_dataset import batch_of_packs, write_dataset
from tests.parallel.run import arguments_for, open_dataset, plans_of, some_steps, train
from tests.ranks import run_on_ranks

CP2, CP4 = "--context-parallel-size 2", "--context-parallel-size 4"
LAYOUTS = {
    "CP2": (2, CP2),
    "CP4": (4, CP4),
    "CP2 TP2 SP": (4, f"{CP2} --tensor-model-parallel-size 2 --sequence-parallel"),
    "CP2 PP2": (4, f"{CP2} --pipeline-model-parallel-size 2"),
    "CP2 PP2 VPP2": (4, f"{CP2} --pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2"),
}
WEIGHTS = (1.0, 2.0, 0.5, 3.0)
# tokens of a row of 128 with which the last of four ranks, which has positions 48 to 79, has padding alone
PADDING_ALONE = 48


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """Padded rows of short samples: at least half of the widest micro-batch is padding."""
    prefix = tmp_path_factory.mktemp("short") / "set"
    write_dataset(prefix, 128, longest=70, split=(80, 20, 0), padding_mode="padding")
    return str(prefix)


def _steps(prefix, extra, world_size, modes):
    """Train a step in each mode; return loss and gradient norm, and for each micro-batch of this rank three counts.

    Counted are the rank's tokens, those of them that are not padding, and those with a target.
    """
    from mft_megatron.data.loading.step_plan import plan_step
    from mft_megatron.mcore import trainer as step
    from mft_megatron.mcore.parallel import process_groups
    from mft_megatron.mcore.trainer import Trainer

    arguments = arguments_for(prefix, extra, world_size)
    dataset = open_dataset(arguments)
    split, seen, curves = dataset.split("train"), [], {}
    to_device = step.to_device

    def keep(batch):
        on_device = to_device(batch)
        lengths = np.repeat(np.diff(batch.cu_seqlens), np.diff(batch.cu_seqlens))
        supervised = np.unique(batch.sample_ids_BS[batch.loss_mask_BS > 0])
        real = np.isin(batch.sample_ids_BS.ravel(), supervised)
        index_T = on_device.shard.index_T
        index_T = np.arange(lengths.size) if index_T is None else index_T.numpy()
        seen.append((len(index_T), int(real[index_T].sum()), len(on_device.shard.supervised_N)))
        return on_device

    step.to_device, step.WIDTH_MULTIPLE = keep, 128  # so that all rows have the full width
    with process_groups.process_groups(arguments.distributed, arguments.initialization.seed):
        plans = (plan_step(split, seed=seed, global_batch_size=4, consumed_samples=0) for seed in range(1, 1000))
        plan = next(plan for plan in plans if plan.costs_G.min() <= PADDING_ALONE)
        for mode in modes:
            trainer = Trainer(arguments_for(prefix, f"{extra} {mode}", world_size), dataset.vocab_size, 4)
            report = trainer.train_step(split, plan, np.ones(4))
            curves[mode] = (report.loss, report.grad_norm, *report.tokens_K.tolist())
    return curves, seen


# sums of a sample over ranks, some of which have no token of it
MODES = ("--mft-loss focal-sample",)


@functools.cache
def short_in_one_process(prefix):
    return run_on_ranks(1, _steps, prefix, "--micro-batch-size 1", 1, MODES)[0][0]


def quick(*names):
    """Parameters for pytest: parallel layouts, of which those named in ``names`` are in every run."""
    return [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS]


@pytest.mark.parametrize("layout", quick("CP4"))
def test_ranks_without_targets_and_with_padding_alone(short, layout):
    world, extra = LAYOUTS[layout]
    expected = short_in_one_process(short)
    results = run_on_ranks(world, _steps, short, f"{extra} --micro-batch-size 1", world, MODES)
    for curves, _ in results:
        for mode in MODES:
            assert curves[mode] == pytest.approx(expected[mode], rel=1e-6), mode
    seen = [one for _, of_rank in results for one in of_rank]
    assert any(supervised == 0 and real > 0 for _, real, supervised in seen)
    if layout == "CP4":
        assert any(real == 0 for _, real, _ in seen)


def _token_losses(prefix, extra, world_size, shape, unpacked):
    """Compute losses of all tokens of some packs; 0 for tokens of other ranks.

    Args:
        unpacked: compute each sample in a separate row, in the same order; NaN where there is no target.
    """
    import torch

    from mft_megatron.mcore.model.gpt import PackedGPTModel
    from mft_megatron.mcore.model.initialize import initialize_weights
    from mft_megatron.mcore.parallel import process_groups
    from mft_megatron.mcore.parallel.device_batch import to_device

    arguments = arguments_for(prefix, extra, world_size, shape)
    dataset = open_dataset(arguments)
    with process_groups.process_groups(arguments.distributed, arguments.initialization.seed):
        model = PackedGPTModel(arguments, dataset.vocab_size)
        initialize_weights(model, arguments.initialization.seed, arguments.initialization.init_method_std)
        model.eval()

        def losses(batch):
            batch = dataclasses.replace(batch, loss_mask_BS=np.ones_like(batch.loss_mask_BS))
            with torch.no_grad():
                return model.run(to_device(batch)).numpy().ravel()

        split = dataset.split("train")
        # three rows, whose borders are not those of the context-parallel blocks
        batch = batch_of_packs(split, np.arange(3))
        if not unpacked:
            return losses(batch)
        borders = list(zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False))
        # padding and the last token of a segment have no target
        values = np.full(batch.tokens_BS.size, np.nan)
        for start, end in borders:
            if batch.loss_mask_BS.ravel()[start:end].any():
                values[start : end - 1] = losses(one_segment(batch.tokens_BS.ravel()[start:end]))[:-1]
        return values


@pytest.mark.parametrize("shape", ["llama", "window", "Megatron's defaults"])
@pytest.mark.parametrize("layout", ["CP2", pytest.param("CP4", marks=pytest.mark.slow)])
def test_packed_equals_unpacked(dataset_prefix, shape, layout):
    """Token losses agree on whichever rank computes them; positions are rotary, within a window, and learned."""
    world, extra = LAYOUTS[layout]
    unpacked = run_on_ranks(1, _token_losses, dataset_prefix, "", 1, shape, True)[0]
    of_ranks = run_on_ranks(world, _token_losses, dataset_prefix, extra, world, shape, False)
    packed = np.sum(of_ranks, 0)
    assert ((np.array(of_ranks) != 0).sum(0) == 1).all()
    has_target = np.isfinite(unpacked)
    assert has_target.mean() > 0.7
    blocks = has_target.reshape(2 * world, -1)
    assert (blocks[:-1, -1] & blocks[1:, 0]).any()  # a sample in several blocks
    np.testing.assert_allclose(packed[has_target], unpacked[has_target], rtol=0, atol=5e-6)


def _evaluate(prefix, extra, world_size):
    """Evaluate the validation split and train a step.

    Returns objective, sums and the balancers' losses of the split, and the samples that the step used.
    """
    from mft_megatron.mcore.parallel import process_groups
    from mft_megatron.mcore.trainer import Trainer
    from mft_megatron.training.evaluation import evaluation_plans

    arguments, values = arguments_for(prefix, extra, world_size), []
    dataset = open_dataset(arguments)
    train, valid = dataset.split("train"), dataset.split("valid")
    with process_groups.process_groups(arguments.distributed, arguments.initialization.seed):
        for mode in ("focal-sample", "focal-task"):
            arguments = arguments_for(prefix, f"{extra} --mft-loss {mode}", world_size)
            trainer = Trainer(arguments, dataset.vocab_size, 4)
            report = trainer.evaluate(valid, list(evaluation_plans(arguments, valid, limit=None)), np.array(WEIGHTS))
            draw = trainer.task_losses(dataset, [valid.slices_of(pack) for pack in range(5)])
            values += [report.loss, *report.loss_K.tolist(), *report.tokens_K.tolist(), *draw.tolist()]
            trainer.train_step(train, plans_of(train, 1, 1)[0], np.array(WEIGHTS))
            # a sample whose tokens are on several ranks was used once
            values += [*process_groups.sum_over_data(trainer.usage.of(0).slices_K).tolist(), trainer.num_parameters()]
    return values


@pytest.mark.parametrize("layout", quick("CP2"))
def test_evaluation_and_draws(dataset_prefix, layout):
    """The last evaluation batch has empty rows, so some ranks have only padding."""
    world, extra = LAYOUTS[layout]
    expected = run_on_ranks(1, _evaluate, dataset_prefix, "--micro-batch-size 4", 1)[0]
    for result in run_on_ranks(world, _evaluate, dataset_prefix, f"{extra} --micro-batch-size 2", world):
        assert result == pytest.approx(expected, rel=1e-6, nan_ok=True)  # a task that is missing from the draw


@functools.cache
def micro_batches_of_two(prefix):
    options = "--mft-loss sample --mft-normalization micro-batch --micro-batch-size 2"
    return options, run_on_ranks(1, train, prefix, options, 1, WEIGHTS, 2)[0]


@pytest.mark.parametrize("layout", quick("CP2"))
def test_micro_batch_normalisation(dataset_prefix, layout):
    """Each micro-batch is normalised by all of its tokens, not by those of one rank."""
    options, (expected, expected_sums) = micro_batches_of_two(dataset_prefix)
    world, extra = LAYOUTS[layout]
    for curve, sums in run_on_ranks(world, train, dataset_prefix, f"{options} {extra}", world, WEIGHTS, 2):
        for ours, theirs in zip(curve, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-6)
        for name, values in sums.items():
            assert values == pytest.approx(expected_sums[name], rel=1e-6), name


def test_a_resumed_run_is_the_same_bit_by_bit(dataset_prefix, tmp_path):
    """With dropout, so that each rank's random-number state must be restored."""
    extra = f"{CP2} --hidden-dropout 0.1 --attention-dropout 0.1"
    whole = run_on_ranks(2, some_steps, dataset_prefix, extra, 2, str(tmp_path), 1, 2)
    again = run_on_ranks(2, some_steps, dataset_prefix, extra, 2, str(tmp_path), None, 2, 99)
    assert again[0] == again[1] == whole[0][1:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        ("CP2", ""),
        ("", "CP2"),
        ("CP2 PP2", "CP2"),
        ("CP2", "CP2 TP2 SP"),
    ],
)
def test_a_checkpoint_changes_its_layout(dataset_prefix, tmp_path, saved, loaded):
    """Saved on one parallel layout and resumed on another, with another seed, so that everything must be loaded."""
    (world, extra), (other_world, other) = (LAYOUTS.get(name, (1, "")) for name in (saved, loaded))
    whole = run_on_ranks(world, some_steps, dataset_prefix, extra, world, str(tmp_path), 1, 2)[0]
    for curve in run_on_ranks(other_world, some_steps, dataset_prefix, other, other_world, str(tmp_path), None, 2, 99):
        assert curve[0] == pytest.approx(whole[1], rel=1e-6)
