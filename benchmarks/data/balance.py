"""Balance of a global batch over data-parallel ranks: round robin and by cost, and the time that balancing takes.

::

    lognormal samples ─best fit─► packs ─at random─► global batches ─┬─► rows round robin, rank by rank
                                                                     └─► shard_plan: by Σ length² of the segments

A step waits for the most expensive rank: *imbalance* is its cost over the mean. A second table is about padded data
sets, one sample in a row: the fraction of positions that hold a token, at full width, round robin and by cost.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from measuring.clocks import in_turn, machine, median_of, write_numbers

from mft_megatron.batch import Ranks, StepPlan, TaskCounts
from mft_megatron.data._sample_index import best_fit_decreasing
from mft_megatron.data.loading.step_plan import shard_plan


def sample_lengths(samples: int, seq_length: int, seed: int) -> np.ndarray:
    """Lengths like those of multi-task data, int32: lognormal, median 403 tokens, cut at the length of a row."""
    return np.clip(np.random.default_rng(seed).lognormal(6, 1, samples), 1, seq_length).astype(np.int32)


def plans(costs: np.ndarray, options: argparse.Namespace) -> list[StepPlan]:
    """Plans of global batches of random rows."""
    rng, none = np.random.default_rng(options.seed + 1), TaskCounts(*np.zeros((4, 1)))
    size, nothing = options.global_batch_size, np.zeros(options.global_batch_size, np.int64)
    rows = (rng.choice(len(costs), size, replace=False) for _ in range(options.batches))
    return [StepPlan(packs_G, none, nothing, costs[packs_G]) for packs_G in rows]


def round_robin(plan: StepPlan, ranks: int, micro_batch_size: int) -> np.ndarray:
    """Row indices of all ranks, int64 [ranks, micro-batches, rows]: micro-batches in turn, whatever they cost."""
    return np.arange(len(plan.packs_G)).reshape(-1, ranks, micro_batch_size).swapaxes(0, 1)


def by_cost(plan: StepPlan, ranks: int, micro_batch_size: int, padded: bool) -> np.ndarray:
    """Row indices of all ranks, int64 [ranks, micro-batches, rows], as training distributes them."""
    return np.stack([shard_plan(plan, Ranks(rank, ranks), micro_batch_size, padded) for rank in range(ranks)])


def imbalance(plan: StepPlan, rows: np.ndarray) -> float:
    """Cost of the most expensive rank over the mean; ``rows`` are row indices [ranks, …]."""
    by_rank = plan.costs_G[rows].reshape(len(rows), -1).sum(1)
    return float(by_rank.max() / by_rank.mean())


def packed(lengths: np.ndarray, options: argparse.Namespace) -> list[dict]:
    """Imbalance of packed rows by number of ranks, and the time to distribute a batch; ``lengths`` int32 [samples]."""
    samples, offsets = best_fit_decreasing(lengths, options.seq_length)
    costs = np.add.reduceat(lengths[samples].astype(np.int64) ** 2, offsets[:-1])
    results = []
    for ranks in options.data_parallel:
        before, after = (
            [imbalance(plan, distribute(plan)) for plan in plans(costs, options)]
            for distribute in (
                lambda plan, n=ranks: round_robin(plan, n, 1),
                lambda plan, n=ranks: by_cost(plan, n, 1, padded=False),
            )
        )
        (plan, *_) = plans(costs, options)
        calls = {"shard": lambda plan=plan, n=ranks: [shard_plan(plan, Ranks(0, n), 1, False) for _ in range(100)]}
        readings = in_turn(calls, options.repeat)["shard"]
        results.append(
            {
                "data_parallel": ranks,
                "round_robin": {"median": float(np.median(before)), "worst": max(before)},
                "by_cost": {"median": float(np.median(after)), "worst": max(after)},
                "microseconds": median_of(readings, 1e6 / 100),
            }
        )
    return results


def padded(lengths: np.ndarray, options: argparse.Namespace) -> list[dict]:
    """Fraction of positions that hold a token in padded rows of widths that are multiples of 64; ``lengths`` int32."""
    results = []
    for ranks in options.data_parallel:
        tokens = turns = positions = 0
        for plan in plans(lengths.astype(np.int64), options):
            tokens += int(plan.costs_G.sum())
            turns += _positions(plan, round_robin(plan, ranks, options.micro_batch_size))
            positions += _positions(plan, by_cost(plan, ranks, options.micro_batch_size, padded=True))
        full = options.batches * options.global_batch_size * options.seq_length
        fractions = {"full_width": tokens / full, "round_robin": tokens / turns, "by_cost": tokens / positions}
        results.append({"data_parallel": ranks, **fractions})
    return results


def _positions(plan: StepPlan, rows: np.ndarray) -> int:
    widths = -(-plan.costs_G[rows].max(2) // 64) * 64
    return int(widths.sum() * rows.shape[2])


def main() -> None:
    """Measure, print the tables, and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--samples", type=int, default=400_000)
    parser.add_argument("--seq-length", type=int, default=4096)
    parser.add_argument("--data-parallel", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--global-batch-size", type=int, default=512)
    parser.add_argument("--micro-batch-size", type=int, default=4, help="rows of a padded micro-batch")
    parser.add_argument("--batches", type=int, default=50)
    parser.add_argument("--repeat", type=int, default=9, help="rounds; the median is reported")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    options = parser.parse_args()
    print(machine())
    print(f"global batches of {options.global_batch_size} rows of {options.seq_length} tokens\n")
    lengths = sample_lengths(options.samples, options.seq_length, options.seed)
    results = {"packed": packed(lengths, options), "padded": padded(lengths, options)}
    print(
        "| ranks | imbalance round robin: median (worst) | by cost | µs, wall | µs, CPU |",
        "|---:|---:|---:|---:|---:|",
        sep="\n",
    )
    for result in results["packed"]:
        turns, cost, took = result["round_robin"], result["by_cost"], result["microseconds"]
        print(
            f"| {result['data_parallel']} | {turns['median']:.4f} ({turns['worst']:.4f}) | {cost['median']:.4f} "
            f"({cost['worst']:.4f}) | {took['wall']:.1f} | {took['cpu']:.1f} |"
        )
    print(f"\npadded rows, {options.micro_batch_size} in a micro-batch: fraction of positions that hold a token\n")
    print("| ranks | full width | longest row, round robin | longest row, by cost |\n|---:|---:|---:|---:|")
    for result in results["padded"]:
        full, turns, cost = (result[name] for name in ("full_width", "round_robin", "by_cost"))
        print(f"| {result['data_parallel']} | {full:.3f} | {turns:.3f} | {cost:.3f} |")
    write_numbers(options, machine(), results)


if __name__ == "__main__":
    main()
