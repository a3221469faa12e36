"""Cost of the objective of one micro-batch, against the plain mean and against a Python loop over tasks.

::

    rows of samples, K tasks, token losses ─┬─► plain mean            Σ m_t·l_t / Σ m_t
                                            ├─► Objective, six modes  before_step, contribution, sums
                                            └─► loop over tasks       a boolean mask and .item() for each

Each runs forward and backward, in turn, many times in one process, so that other load disturbs all alike. Reported are
medians, and medians of the ratios within a round.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from measuring.clocks import median_of, ratio_of, write_numbers
from measuring.device_clock import Clock, machine, main_clock

from mft_megatron.batch import Batch
from mft_megatron.loss_names import LOSSES
from mft_megatron.losses.focal import TaskStatistics
from mft_megatron.losses.objective import Objective
from mft_megatron.losses.supervision import Supervision
from mft_megatron.mcore.platform import devices

PLAIN, LOOP = "plain mean", "loop over tasks"


def packed_batch(tasks: int, rows: int, seq_length: int, mean_length: float, seed: int) -> tuple[Batch, Tensor]:
    """Rows full of samples with lognormal lengths, of tasks at random, the second half of each sample supervised.

    Returns:
        the fields of the micro-batch that the objective reads, on this process's device; and token losses to
        differentiate, fp32 [B, S].
    """
    rng = np.random.default_rng(seed)
    sample_ids, task_ids, mask = np.zeros((3, rows, seq_length), np.int64)
    starts = []
    for row in range(rows):
        position = 0
        while position < seq_length:
            # sigma 0.8: many short samples, few long ones
            length = max(2, round(rng.lognormal(np.log(mean_length) - 0.8**2 / 2, 0.8)))
            length = min(length, seq_length - position)
            tokens = slice(position, position + length)
            sample_ids[row, tokens], task_ids[row, tokens] = len(starts), rng.integers(tasks)
            mask[row, position + length // 2 : position + length - 1] = 1
            starts.append(row * seq_length + position)
            position += length
    cu_seqlens = torch.tensor([*starts, rows * seq_length], dtype=torch.int32)
    arrays = (torch.from_numpy(array) for array in (mask.astype(np.uint8), sample_ids, task_ids))
    moved = (tensor.to(devices.device()) for tensor in (*arrays, cu_seqlens))
    mask_BS, sample_ids_BS, task_ids_BS, cu_seqlens = moved
    batch = Batch(None, None, mask_BS, None, sample_ids_BS, task_ids_BS, cu_seqlens, 0)
    loss_BS = torch.from_numpy(rng.gamma(1.0, 1.5, (rows, seq_length)).astype(np.float32)).to(devices.device())
    return batch, loss_BS.requires_grad_()


def plain_mean(batch: Batch, loss_BS: Tensor) -> Tensor:
    """Mean of the supervised tokens' losses, which knows no tasks and logs nothing."""
    mask_BS = batch.loss_mask_BS.float()
    return (loss_BS * mask_BS).sum() / mask_BS.sum()


def loop_over_tasks(batch: Batch, loss_BS: Tensor, weights: list[float]) -> tuple[Tensor, dict[int, float]]:
    """The task-token loss as MFTCoder computes it: task by task, with their means for a log.

    MFTCoder loops over the tasks twice, once for the loss and once for the log; here one pass does both.
    """
    value, weight_sum, logged = 0.0, 0.0, {}
    mask_BS = batch.loss_mask_BS.bool()
    for task in batch.task_ids_BS.unique():
        index = task.item()
        counted_BS = (batch.task_ids_BS == index) & mask_BS
        tokens = counted_BS.sum().item()
        if tokens:
            mean = loss_BS[counted_BS].sum() / tokens
            value = value + weights[index] * mean
            weight_sum += weights[index]
            logged[index] = mean.item()
    return value / weight_sum, logged


def variants(tasks: int, batch: Batch, loss_BS: Tensor, seed: int) -> dict[str, Callable[[], Tensor]]:
    """The compared computations by name: functions that run one forward and backward and return the gradient."""
    # in training these come from the plan of the step, which is on the host
    tokens_K, samples_K = (count_K.cpu() for count_K in Supervision.of(batch).counts(tasks))
    weight_K = torch.from_numpy(np.random.default_rng(seed).uniform(0.5, 2.0, tasks))
    some_K = torch.full((tasks,), 0.5, dtype=torch.float64, device=loss_BS.device)
    before = TaskStatistics(some_K, 2 * some_K, torch.ones_like(some_K))

    def gradient(value: Tensor) -> Tensor:
        return torch.autograd.grad(value, loss_BS)[0]

    def of_objective(mode: str) -> Callable[[], Tensor]:
        objective = Objective(mode)

        def once() -> Tensor:
            factors = objective.before_step(tokens_K, samples_K, weight_K, before).to(loss_BS.device)
            weighed = objective.weigh(factors, batch)
            value, coefficient_BS = objective.contribution(factors, batch, loss_BS, weighed=weighed)
            objective.sums(batch, loss_BS, coefficient_BS, tasks, weighed=weighed)
            return gradient(value)

        return once

    weights = weight_K.tolist()
    return {
        PLAIN: lambda: gradient(plain_mean(batch, loss_BS)),
        **{mode: of_objective(mode) for mode in LOSSES},
        LOOP: lambda: gradient(loop_over_tasks(batch, loss_BS, weights)[0]),
    }


class _Operators(TorchDispatchMode):
    """Counts the operators that torch runs, backward included, without views; on a GPU each is one kernel or more."""

    number = 0

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        self.number += not operator.is_view
        return operator(*arguments, **(keywords or {}))


def operators_of(once: Callable[[], Tensor]) -> int:
    """Number of operators that a call runs."""
    with _Operators() as counted:
        once()
    return counted.number


def measure(tasks: int, options: argparse.Namespace) -> dict:
    """Readings of all variants for one number of tasks."""
    batch, loss_BS = packed_batch(tasks, options.rows, options.seq_length, options.mean_length, options.seed)
    compared = variants(tasks, batch, loss_BS, options.seed)
    # both must compute the same gradient; this also warms everything up
    gradients = {name: once() for name, once in compared.items()}
    torch.testing.assert_close(gradients["task-token"], gradients[LOOP], rtol=1e-4, atol=1e-9)

    clock, readings = Clock(), {name: [] for name in compared}
    for _ in range(options.repeat):
        for name, once in compared.items():
            with clock:
                for _ in range(options.calls):
                    once()
            readings[name].append(clock.take())
    return {
        "tasks": tasks,
        "tasks_present": len(batch.task_ids_BS.unique()),
        "samples": batch.num_segments,
        "variants": {
            name: {
                "operators": operators_of(compared[name]),
                "milliseconds": median_of(taken, 1000 / options.calls),
                "to_plain_mean": ratio_of(taken, readings[PLAIN]),
                "to_loop": ratio_of(taken, readings[LOOP]),
            }
            for name, taken in readings.items()
        },
    }


def table(result: dict) -> str:
    """Format the readings for one number of tasks as Markdown."""
    lines = [
        f"{result['tasks']} tasks, {result['tasks_present']} of them in this micro-batch, {result['samples']} samples",
        "",
        "| | operators | ms, wall | ms, CPU | × plain mean | × loop |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, numbers in result["variants"].items():
        took, plain, loop = (numbers[key] for key in ("milliseconds", "to_plain_mean", "to_loop"))
        lines.append(
            f"| {name} | {numbers['operators']} | {took['wall']:.2f} | {took['cpu']:.2f} | {plain[main_clock()]:.1f} "
            f"| {loop[main_clock()]:.3f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print the tables, and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tasks", type=int, nargs="+", default=[5, 50, 500])
    parser.add_argument("--rows", type=int, default=4, help="rows of the micro-batch")
    parser.add_argument("--seq-length", type=int, default=4096)
    parser.add_argument("--mean-length", type=float, default=500, help="tokens of a sample")
    parser.add_argument("--repeat", type=int, default=15, help="rounds; the median is reported")
    parser.add_argument("--calls", type=int, default=10, help="calls of each variant in a round")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    options = parser.parse_args()
    devices.use_device()
    print(machine())
    print(f"{options.rows} rows of {options.seq_length} tokens; ratios are those of {main_clock()} time\n")
    results = []
    for tasks in options.tasks:
        results.append(measure(tasks, options))
        print(table(results[-1]), flush=True)
    write_numbers(options, machine(), results)


if __name__ == "__main__":
    main()
