"""How evenly data-parallel ranks share a global batch, in turns and dealt by cost, and what dealing costs.

::

    lognormal samples ─best fit─► packs ─at random─► global batches ─┬─► rows in turns, rank by rank
                                                                     └─► shard_plan: by Σ length² of the segments

The step waits for the rank that has most: *imbalance* is its cost over the mean. A second table is about padded data
sets, one sample in a row: the share of positions that hold a token, at full width, in turns and dealt.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from stopwatch import in_turn, machine, median_of

from mft_megatron.batch import Ranks, StepPlan
from mft_megatron.data._sample_index import best_fit_decreasing
from mft_megatron.data.loading.step_plan import shard_plan


def sample_lengths(samples: int, seq_length: int, seed: int) -> np.ndarray:
    """Lengths like those of multi-task data, int32: lognormal, median 403 tokens, cut at the length of a row."""
    return np.clip(np.random.default_rng(seed).lognormal(6, 1, samples), 1, seq_length).astype(np.int32)


def plans(costs: np.ndarray, options: argparse.Namespace) -> list[StepPlan]:
    """Global batches of rows at random."""
    rng, none = np.random.default_rng(options.seed + 1), np.zeros(1, np.int64)
    size, nothing = options.global_batch_size, np.zeros(options.global_batch_size, np.int64)
    rows = (rng.choice(len(costs), size, replace=False) for _ in range(options.batches))
    return [StepPlan(packs_G, none, none, nothing, costs[packs_G]) for packs_G in rows]


def in_turns(plan: StepPlan, ranks: int, micro_batch_size: int) -> np.ndarray:
    """Places of all ranks, [ranks, micro-batches, rows], dealt micro-batch by micro-batch without a look at costs."""
    return np.arange(len(plan.packs_G)).reshape(-1, ranks, micro_batch_size).swapaxes(0, 1)


def dealt(plan: StepPlan, ranks: int, micro_batch_size: int, padded: bool) -> np.ndarray:
    return np.stack([shard_plan(plan, Ranks(rank, ranks), micro_batch_size, padded) for rank in range(ranks)])


def imbalance(plan: StepPlan, places: np.ndarray) -> float:
    """Cost of the dearest rank over the mean."""
    by_rank = plan.costs_G[places].reshape(len(places), -1).sum(1)
    return float(by_rank.max() / by_rank.mean())


def packed(lengths: np.ndarray, options: argparse.Namespace) -> list[dict]:
    samples, offsets = best_fit_decreasing(lengths, options.seq_length)
    costs = np.add.reduceat(lengths[samples].astype(np.int64) ** 2, offsets[:-1])
    results = []
    for ranks in options.data_parallel:
        before, after = (
            [imbalance(plan, deal(plan)) for plan in plans(costs, options)]
            for deal in (
                lambda plan, n=ranks: in_turns(plan, n, 1),
                lambda plan, n=ranks: dealt(plan, n, 1, padded=False),
            )
        )
        (plan, *_) = plans(costs, options)
        calls = {"deal": lambda plan=plan, n=ranks: [shard_plan(plan, Ranks(0, n), 1, False) for _ in range(100)]}
        readings = in_turn(calls, options.repeat)["deal"]
        results.append(
            {
                "data_parallel": ranks,
                "in_turns": {"median": float(np.median(before)), "worst": max(before)},
                "dealt": {"median": float(np.median(after)), "worst": max(after)},
                "microseconds": median_of(readings, 1e6 / 100),
            }
        )
    return results


def padded(lengths: np.ndarray, options: argparse.Namespace) -> list[dict]:
    """Share of positions with a token; widths are multiples of 64."""
    results = []
    for ranks in options.data_parallel:
        tokens = turns = positions = 0
        for plan in plans(lengths.astype(np.int64), options):
            tokens += int(plan.costs_G.sum())
            turns += _positions(plan, in_turns(plan, ranks, options.micro_batch_size))
            positions += _positions(plan, dealt(plan, ranks, options.micro_batch_size, padded=True))
        full = options.batches * options.global_batch_size * options.seq_length
        shares = {"full_width": tokens / full, "in_turns": tokens / turns, "dealt": tokens / positions}
        results.append({"data_parallel": ranks, **shares})
    return results


def _positions(plan: StepPlan, places: np.ndarray) -> int:
    widths = -(-plan.costs_G[places].max(2) // 64) * 64
    return int(widths.sum() * places.shape[2])


def main() -> None:
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
        "| ranks | imbalance in turns: median (worst) | dealt by cost | µs, wall | µs, CPU |",
        "|---:|---:|---:|---:|---:|",
        sep="\n",
    )
    for result in results["packed"]:
        turns, own, took = result["in_turns"], result["dealt"], result["microseconds"]
        print(
            f"| {result['data_parallel']} | {turns['median']:.4f} ({turns['worst']:.4f}) | {own['median']:.4f} "
            f"({own['worst']:.4f}) | {took['wall']:.1f} | {took['cpu']:.1f} |"
        )
    print(f"\npadded rows, {options.micro_batch_size} in a micro-batch: share of positions that hold a token\n")
    print("| ranks | full width | longest row, in turns | longest row, dealt |\n|---:|---:|---:|---:|")
    for result in results["padded"]:
        full, turns, own = (result[name] for name in ("full_width", "in_turns", "dealt"))
        print(f"| {result['data_parallel']} | {full:.3f} | {turns:.3f} | {own:.3f} |")
    if options.json:
        shape = {name: value for name, value in vars(options).items() if name != "json"}
        options.json.write_text(json.dumps({"machine": machine(), "options": shape, "results": results}, indent=1))


if __name__ == "__main__":
    main()
