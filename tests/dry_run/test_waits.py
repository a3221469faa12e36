"""The counters of a step: a new wait of the host, or another copy to the GPU, fails here.

While the host waits, it launches nothing, and the GPU has no work for as long as the next launches take. A step may
read the gradient norm, and with fp16 whether gradients overflowed, before it updates the weights: nothing else.
"""

import functools

import pytest

from tests.dry_run.simulated import MODEL, report_of_rank

SMALL = f"{MODEL} --num-layers 2 --global-batch-size 2"
ONE_LAYER = f"{MODEL} --num-layers 1 --global-batch-size 2"
FP16 = SMALL.replace("--bf16", "--fp16")
TP, PP, CP = (
    "--tensor-model-parallel-size 2",
    "--pipeline-model-parallel-size 2 --global-batch-size 4",
    "--context-parallel-size 2",
)
OVERLAP = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
PADDED = {"padding_mode": "padding", "longest": 300, "overlong": "truncate"}
# options, ranks, rank, options of the data set
CASES = {
    "dense": ("", 1, 0, {}),
    "TP SP": (f"{TP} --sequence-parallel", 2, 1, {}),
    "first of two stages": (PP, 2, 0, {}),
    "last of two stages, padded": (PP, 2, 1, PADDED),
    "interleaved": (f"{PP} --num-layers 4 --num-layers-per-virtual-pipeline-stage 1", 2, 1, {}),
    "CP, focal-sample": (f"{CP} --mft-loss focal-sample", 2, 0, {}),
    "DP overlap": (OVERLAP, 2, 1, {}),
    "full recompute, dropout": (f"{FULL} --attention-dropout 0.1 --hidden-dropout 0.1", 1, 0, {}),
    "Megatron's cross entropy": (f"--cross-entropy-impl megatron {TP}", 2, 0, {}),
    "focal-task": ("--mft-loss focal-task", 1, 0, {}),
    "weights, by micro-batch": ("--mft-normalization micro-batch", 1, 0, {"weighted": "samples turns"}),
    "LoRA": ("--peft-type lora", 1, 0, {}),
}


# Reads of values that a file may make in a step. Megatron-Core 0.19 also reads the norm of experts that there are not.
NORM = {"megatron/core/optimizer/clip_grads.py": 2}
OVERFLOW = {"megatron/core/optimizer/optimizer.py": 1, "mft_megatron/mcore/parallel/process_groups.py": 1}
ZEROS = {"megatron/core/optimizer/clip_grads.py": 3}


def check(report, most=NORM):
    """Nothing waits within micro-batches, only ``most`` in the rest of a step, and each micro-batch is one copy."""
    step = report.steps[-1]
    assert not [wait for wait in step.waits if wait.in_micro_batches]
    assert not [wait for wait in step.waits if wait.kind != "value"]
    for wait in step.waits:
        assert wait.outside <= most.get(wait.line.partition(":")[0], 0), step.waits
    assert sum(wait.outside for wait in step.waits) <= 4
    assert all(copies.pinned for copies in step.copies), step.copies
    assert sum(copies.in_micro_batches for copies in step.copies) == step.micro_batches
    # counts and weights of the tasks
    assert sum(copies.count for copies in step.copies) == step.micro_batches + 1


@pytest.mark.parametrize("case", CASES)
def test_a_step_reads_the_gradient_norm_and_nothing_else(simulation, case):
    words, world_size, rank, data = CASES[case]
    check(simulation.report(words, world_size, rank, SMALL, **data))


def test_with_fp16_a_step_also_reads_whether_gradients_overflowed(simulation):
    check(simulation.report("", 1, 0, FP16), most=NORM | OVERFLOW)


def test_zeros_of_gradients_are_read_only_where_they_are_logged(simulation):
    check(simulation.report("--log-num-zeros-in-grad", 1, 0, SMALL), most=ZEROS)


def test_waits_of_experts_are_known(simulation):
    """Sizes that depend on the routing are read in Megatron-Core, three times at most in a layer and micro-batch."""
    words = "--num-experts 4 --moe-ffn-hidden-size 64 --moe-router-topk 2"
    step = simulation.report(words, 1, 0, SMALL).steps[-1]
    assert {wait.kind for wait in step.waits if wait.in_micro_batches} == {"size", "copy"}
    assert sum(wait.in_micro_batches for wait in step.waits) <= 3 * 2 * step.micro_batches


def _plants(torch, devices):
    """Functions of token losses that make the host wait, by name."""
    return {
        "reads": lambda loss: loss.sum().item(),
        "copies": lambda loss: torch.ones(2).to(devices.device(), non_blocking=True),  # not from pinned memory
        "brings back": lambda loss: loss.detach().cpu(),
        "takes a number": lambda loss: torch.tensor(1.0, device=devices.device()),
        "waits for all": lambda loss: devices.synchronize(),
    }


def _report_of_planted(plant, of_step, words, world_size, rank):
    """Report on a rank where something waits that must not, in every micro-batch or at the end of the step."""
    import torch

    from mft_megatron.losses.objective import Objective
    from mft_megatron.mcore.platform import devices
    from mft_megatron.mcore.trainer import Trainer

    contribution, step, wait = Objective.contribution, Trainer.train_step, _plants(torch, devices)[plant]

    def planted_contribution(self, factors, batch, loss_BS, *others):
        wait(loss_BS)
        return contribution(self, factors, batch, loss_BS, *others)

    def planted_step(self, *arguments):
        report = step(self, *arguments)
        wait(report.loss_K)
        return report

    if of_step:
        Trainer.train_step = planted_step
    else:
        Objective.contribution = planted_contribution
    return report_of_rank(words, world_size, rank)


@pytest.mark.parametrize(
    ("plant", "of_step"),
    [
        ("reads", False),
        ("copies", False),
        pytest.param("brings back", False, marks=pytest.mark.slow),
        pytest.param("takes a number", False, marks=pytest.mark.slow),
        ("waits for all", False),
        ("reads", True),
    ],
)
def test_the_check_sees_a_planted_wait(simulation, plant, of_step):
    report = simulation.report("", 1, 0, ONE_LAYER, functools.partial(_report_of_planted, plant, of_step))
    with pytest.raises(AssertionError):
        check(report)
