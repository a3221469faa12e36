"""fp16 with a loss scale, gradients in bf16, and SGD: the state that a step changes and the state that it keeps."""

import numpy as np
import pytest

from tests.parallel.run import arguments_for, train, trainer_and_split
from tests.ranks import run_on_ranks

TOO_HIGH = 2.0**40


def _plans(split, steps):
    from mft_megatron.data.loading.step_plan import plan_step

    return [plan_step(split, seed=1, global_batch_size=8, consumed_samples=8 * step) for step in range(steps)]


def _overflow(prefix, options, world):
    """Record per step: overflow, loss scale, whether weights changed, steps of the schedule and of Adam."""
    from mft_megatron.mcore.optim.checkpointed_state import stored_state
    from mft_megatron.mcore.parallel import process_groups

    arguments = arguments_for(prefix, options, world)
    with process_groups.process_groups(arguments.distributed, 1):
        trainer, split = trainer_and_split(prefix, options, world)
        facts = []
        for plan in _plans(split, 5):
            before = [parameter.detach().clone() for parameter in trainer.chunks[0].parameters()]
            statistics = trainer.statistics
            report = trainer.train_step(split, plan, np.ones(4))
            with trainer.weights.whole():
                same = all(a.equal(b) for a, b in zip(before, trainer.chunks[0].parameters(), strict=True))
                steps = stored_state(trainer.optimizer, trainer.chunks[0].module.sharded_state_dict())["steps"]
            moved = [not same, trainer.statistics is not statistics]
            facts.append((report.overflow, report.loss_scale, *moved, trainer.scheduler.num_steps, steps))
            assert (report.grad_norm is None) == report.overflow
        return facts


@pytest.mark.parametrize(
    ("world", "options"),
    [
        pytest.param(1, "", marks=pytest.mark.slow),
        (2, "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 30001"),
    ],
)
def test_a_step_that_overflows_changes_nothing_but_the_loss_scale(dataset_prefix, world, options):
    """Two overflows halve the scale (--hysteresis); then it fits, and grows after two steps without overflow."""
    options = f"{options} --fp16 --initial-loss-scale {TOO_HIGH} --loss-scale-window 2 --mft-loss focal-task"
    start = f"{options} --hysteresis 2"
    assert (
        run_on_ranks(world, _overflow, dataset_prefix, start, world)
        == [[(True, scale, False, False, 0, 0) for scale in (TOO_HIGH, TOO_HIGH, 2.0**39, 2.0**38, 2.0**37)]] * world
    )
    options = options.replace(str(TOO_HIGH), "1024")
    assert (
        run_on_ranks(world, _overflow, dataset_prefix, options, world)
        == [
            [
                (False, scale, True, True, step, step)
                for step, scale in enumerate((1024.0, 1024.0, 2048.0, 2048.0, 4096.0), start=1)
            ]
        ]
        * world
    )


def _without_replacement(prefix, module, options):
    """Train after the replacement in a module of Megatron-Core has been undone."""
    import importlib

    import torch

    importlib.import_module(f"megatron.core.{module}").torch = torch
    return train(prefix, options, 1)


@pytest.mark.slow
def test_the_loss_scale_still_needs_its_replacement_without_cuda(dataset_prefix):
    with pytest.raises(pytest.fail.Exception, match="CUDA"):
        run_on_ranks(1, _without_replacement, dataset_prefix, "optimizer.grad_scaler", "--fp16")


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ("--fp16 --initial-loss-scale 1024", 5e-3),
        pytest.param("--fp16 --loss-scale 256 --accumulate-allreduce-grads-in-fp32", 5e-3, marks=pytest.mark.slow),
        ("--bf16 --grad-reduce-in-bf16", 3e-2),
        pytest.param("--fp16 --initial-loss-scale 1024 --cross-entropy-impl megatron", 5e-3, marks=pytest.mark.slow),
        pytest.param("--bf16 --loss-scale 1024", 1e-2, marks=pytest.mark.slow),
    ],
)
def test_half_precision_stays_close_to_fp32(dataset_prefix, options, tolerance):
    """Gradients are unscaled before the norm, which equals that of fp32."""
    exact = run_on_ranks(1, train, dataset_prefix, "", 1)[0][0]
    rounded = run_on_ranks(1, train, dataset_prefix, options, 1)[0][0]
    for ours, theirs in zip(rounded, exact, strict=True):
        assert ours == pytest.approx(theirs, rel=tolerance)
    assert rounded != exact


def _gradient_dtypes(prefix, options):
    from mft_megatron.mcore.parallel import process_groups

    arguments = arguments_for(prefix, options, 1)
    with process_groups.process_groups(arguments.distributed, 1):
        trainer, _ = trainer_and_split(prefix, options, 1)
        chunk = trainer.chunks[0]
        return {str(parameter.main_grad.dtype) for parameter in chunk.parameters()}, chunk.config.params_dtype


@pytest.mark.slow
def test_gradients_have_the_dtype_that_was_asked_for(dataset_prefix):
    for options, wanted in (
        ("--bf16", "float32"),
        ("--bf16 --grad-reduce-in-bf16", "bfloat16"),
        ("--fp16", "float16"),
        ("--fp16 --accumulate-allreduce-grads-in-fp32", "float32"),
    ):
        assert run_on_ranks(1, _gradient_dtypes, dataset_prefix, options)[0][0] == {f"torch.{wanted}"}


def _sgd(prefix, momentum):
    """Weights after two steps of the optimizer, and after SGD by hand with the same gradients."""
    import torch

    from mft_megatron.mcore.parallel import process_groups

    options = f"--optimizer sgd --sgd-momentum {momentum} --clip-grad 0 --lr-decay-style constant --lr 0.1"
    arguments = arguments_for(prefix, options, 1)
    with process_groups.process_groups(arguments.distributed, 1):
        trainer, split = trainer_and_split(prefix, options, 1)
        weight = trainer.chunks[0].module.output_layer.weight
        expected, velocity = weight.detach().clone(), torch.zeros_like(weight)
        for plan in _plans(split, 2):
            trainer.train_step(split, plan, np.ones(4))
            velocity = momentum * velocity + weight.main_grad + 0.01 * expected
            expected = expected - 0.1 * velocity
        return (weight - expected).abs().max().item(), expected.abs().max().item()


@pytest.mark.parametrize("momentum", [0.9, pytest.param(0.0, marks=pytest.mark.slow)])
def test_sgd_is_sgd(dataset_prefix, momentum):
    error, size = run_on_ranks(1, _sgd, dataset_prefix, momentum)[0]
    assert error <= 1e-6 * size


def _zeros(prefix, options, world):
    from mft_megatron.mcore.parallel import process_groups

    arguments = arguments_for(prefix, f"{options} --log-num-zeros-in-grad", world)
    with process_groups.process_groups(arguments.distributed, 1):
        trainer, split = trainer_and_split(prefix, f"{options} --log-num-zeros-in-grad", world)
        report = trainer.train_step(split, _plans(split, 1)[0], np.ones(4))
        counted = [int((p.main_grad == 0).sum()) for p in trainer.chunks[0].parameters()]
        return report.zeros_in_grad, sum(counted)


def test_zeros_of_gradients_are_counted(dataset_prefix):
    reported, counted = run_on_ranks(1, _zeros, dataset_prefix, "", 1)[0]
    assert reported == counted > 0
    for sharded, _ in run_on_ranks(2, _zeros, dataset_prefix, "--use-distributed-optimizer", 2):
        assert sharded == reported


def _refused(prefix, options):
    from mft_megatron.errors import InputError
    from mft_megatron.mcore.parallel import process_groups

    arguments = arguments_for(prefix, options, 1)
    with process_groups.process_groups(arguments.distributed, 1):
        try:
            trainer_and_split(prefix, options, 1)
        except InputError as error:
            return str(error)


def test_options_that_this_machine_lacks_are_refused(dataset_prefix):
    precise = "--use-distributed-optimizer --use-precision-aware-optimizer"
    assert "Transformer Engine" in run_on_ranks(1, _refused, dataset_prefix, f"{precise} --exp-avg-dtype bf16")[0]
    assert "no CUDA device" in run_on_ranks(1, _refused, dataset_prefix, f"--bf16 {precise} --optimizer-cpu-offload")[0]
