"""Any optimizer resumes from any other's checkpoint: distributed or not, overlapped or not, on any parallel layout."""

from pathlib import Path

import numpy as np
import pytest

from mft_megatron.run_folder.found import latest_checkpoint
from tests.parallel.run import arguments_for, info_of_step, trainer_and_split
from tests.ranks import run_on_ranks
from tests.saved_checkpoints import optimizer_numbers, tensors_of

TP2 = "--tensor-model-parallel-size 2"
VPP = "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 --micro-batch-size 1"
# several buckets per model chunk, with padding between them
SHARDED = "--use-distributed-optimizer --overlap-grad-reduce --ddp-bucket-size 30001"
OVERLAP = f"{SHARDED} --overlap-param-gather"
DROPOUT = "--hidden-dropout 0.1 --attention-dropout 0.1"
FP16 = "--fp16 --initial-loss-scale 1024 --loss-scale-window 2"
LAYOUTS = {
    "one process": (1, ""),
    "DP2": (2, ""),
    "DP2 overlap": (2, OVERLAP),
    "TP2 DP2": (4, f"{TP2} --use-distributed-optimizer --micro-batch-size 1"),
    "DP4": (4, f"{SHARDED} --micro-batch-size 1 --no-ckpt-fully-parallel-save"),
    "VPP2 DP2 overlap": (4, f"{VPP} {OVERLAP}"),
}


def _step(trainer, split, number):
    from mft_megatron.data.loading.step_plan import plan_step

    plan = plan_step(split, seed=1, global_batch_size=8, consumed_samples=8 * number)
    report = trainer.train_step(split, plan, np.ones(4))
    return report.loss, report.grad_norm, report.learning_rate


def _save(trainer, folder, step):
    from mft_megatron.mcore.checkpointing import checkpoint

    checkpoint.save(Path(folder), trainer, info_of_step(step), trainer.arguments.checkpoint)


def _load(trainer, folder):
    from mft_megatron.mcore.checkpointing import checkpoint

    newest = latest_checkpoint(folder)
    path, info = newest.path, newest.info
    checkpoint.load(path, trainer, info, trainer.arguments.checkpoint)


def _write(prefix, options, world, folder, steps):
    """Train some steps and save."""
    from mft_megatron.mcore.parallel import process_groups

    arguments = arguments_for(prefix, options, world)
    with process_groups.process_groups(arguments.distributed, arguments.initialization.seed):
        trainer, split = trainer_and_split(prefix, options, world)
        for number in range(steps):
            _step(trainer, split, number)
        _save(trainer, folder, steps)


def _read(prefix, options, world, folders, with_step):
    """Load each folder into a model with another seed, and save it at once and again after another step."""
    from mft_megatron.mcore.parallel import process_groups

    arguments = arguments_for(prefix, options, world)
    with process_groups.process_groups(arguments.distributed, arguments.initialization.seed):
        for source, target in folders.items():
            trainer, split = trainer_and_split(prefix, f"{options} --seed 77", world)
            _load(trainer, source)
            _save(trainer, f"{target}/again", 2)
            if with_step:
                _step(trainer, split, 2)
                _save(trainer, f"{target}/next", 3)


def _tensors(folder):
    """Read all tensors of the newest checkpoint, by name."""
    return tensors_of(latest_checkpoint(folder).path)


def _numbers(folder):
    """Read the optimizer's scalars in the newest checkpoint: steps of Adam, and the loss scale with its counts."""
    of_optimizer = optimizer_numbers(latest_checkpoint(folder).path)
    return {name: of_optimizer[name] for name in ("steps", "loss_scale")}


def _exchange(prefix, folder, names, precision, with_step):
    """Save on each parallel layout of ``names`` and resume on each from each."""
    for name in names:
        world, options = LAYOUTS[name]
        run_on_ranks(world, _write, prefix, f"{options} {precision}", world, f"{folder}/{name}", 2)
    for name in names:
        world, options = LAYOUTS[name]
        folders = {f"{folder}/{writer}": f"{folder}/{writer} to {name}" for writer in names}
        run_on_ranks(world, _read, prefix, f"{options} {precision}", world, folders, with_step)
    for writer in names:
        saved = _tensors(f"{folder}/{writer}")
        assert _numbers(f"{folder}/{writer}")["steps"] == 2
        kinds = {name.split(".")[2] for name in saved if name.startswith("optimizer.state.")}
        assert kinds == {"exp_avg", "exp_avg_sq", *(["fp32_param"] if precision else [])}
        for reader in names:
            again = _tensors(f"{folder}/{writer} to {reader}/again")
            assert again.keys() == saved.keys()
            assert _numbers(f"{folder}/{writer} to {reader}/again") == _numbers(f"{folder}/{writer}")
            for name in saved:
                assert again[name].equal(saved[name]), f"{writer} to {reader}: {name}"
        if not with_step:
            continue
        expected = _tensors(f"{folder}/{writer} to one process/next")
        for reader in names:
            after = _tensors(f"{folder}/{writer} to {reader}/next")
            for name in expected:
                error = (after[name] - expected[name]).norm() / expected[name].norm().clamp(min=1e-30)
                assert error <= 1e-6, f"{writer} to {reader}: {name} differs by {error}"


def test_with_and_without_the_distributed_optimizer(dataset_prefix, tmp_path):
    """The checkpoint that is saved directly after loading has the same tensors and scalars, bit for bit."""
    _exchange(dataset_prefix, tmp_path, ("one process", "DP2 overlap"), FP16, False)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["", "--bf16", FP16])
def test_any_layout_resumes_from_any_other(dataset_prefix, tmp_path, precision):
    """Tensors are the same, bit for bit, and in fp32 equal up to rounding after another step."""
    _exchange(dataset_prefix, tmp_path, LAYOUTS, precision, not precision)


def _resume(prefix, options, world, folder, save_after):
    """Train steps 0 to 4 with a save after ``save_after``, or resume and train the remaining ones."""
    from mft_megatron.mcore.parallel import process_groups

    arguments = arguments_for(prefix, options, world)
    with process_groups.process_groups(arguments.distributed, arguments.initialization.seed):
        trainer, split = trainer_and_split(prefix, f"{options} --seed {1 if save_after else 77}", world)
        start, curve = 0, []
        if save_after is None:
            _load(trainer, folder)
            start = 3
        for number in range(start, 5):
            curve.append(_step(trainer, split, number))
            if number + 1 == save_after:
                _save(trainer, folder, save_after)
        return curve


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "options"),
    [
        (2, OVERLAP),
        (2, f"{OVERLAP} --bf16 {DROPOUT}"),
        (4, f"{VPP} {OVERLAP} {DROPOUT}"),
        (4, f"{TP2} {SHARDED} --bf16 {DROPOUT}"),
        (2, f"{OVERLAP} --fp16 --initial-loss-scale 65536 {DROPOUT}"),
        (2, f"{OVERLAP} --bf16 --grad-reduce-in-bf16"),
    ],
)
def test_resuming_is_bit_equal(dataset_prefix, tmp_path, world, options):
    whole = run_on_ranks(world, _resume, dataset_prefix, options, world, str(tmp_path), 3)[0]
    resumed = run_on_ranks(world, _resume, dataset_prefix, options, world, str(tmp_path), None)[0]
    assert resumed == whole[3:]
