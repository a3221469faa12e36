"""How evenly packers spread the tasks over the steps of an epoch, with their rows, fill and time.

::

    three data sets ─┬─► best fit, decreasing and mixed ─► rows ─┐
                     └─► peers' packers ─────────────────► rows ─┴─ order of the epoch ─► steps of G rows ─► spread

The *coefficient of variation* (cv) of a task is the standard deviation over the steps of its tokens, divided by their
mean. It is compared with the cv of *random dealing*: each sample goes to a step that is chosen independently and
uniformly. *Presence* is the fraction of the steps that have a sample of the task, over the best possible one: 1, or the
task's samples over the steps where it has fewer. Both are means over several epochs.

The peers run in another interpreter, get the samples in random order, as their trainers give them with shuffling on,
and their rows are read in random order.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from peer_packers import PACKERS, MissingPeerError, add_options, run_packer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from measuring.clocks import in_turn, machine, median_of, write_numbers

from mft_megatron.data._sample_index import (
    best_fit_decreasing,
    best_fit_mixed,
    count_packs,
    epoch_order,
    mixed_order,
    rarest_tasks,
)
from tests.data.packing.mixing import five_tasks, short_tasks, tokens_of_steps, variation, zipf_tasks


class Packs(NamedTuple):
    """Indices of the samples, pack after pack, and offsets, as :func:`best_fit_decreasing` returns them."""

    indices: np.ndarray
    offsets: np.ndarray


class Samples(NamedTuple):
    """Tokens of each sample, int32 [samples], and its task, int32 [samples]; task after task."""

    lengths: np.ndarray
    tasks: np.ndarray


DATASETS = {
    "five tasks": five_tasks,
    "100 Zipf tasks": zipf_tasks,
    "35 tasks, five of 5–15 tokens": short_tasks,
}


def spread(samples: Samples, packs: Packs, orders: list[np.ndarray], global_batch_size: int) -> dict[str, float]:
    """Largest and median cv of a task over that of random dealing, smallest presence over the best possible."""
    by_epoch = [tokens_of_steps(*samples, packs, order, global_batch_size) for order in orders]
    ratio_K = np.mean([variation(tokens_SK, *samples) for tokens_SK in by_epoch], axis=0)
    presence_K = np.mean([(tokens_SK > 0).mean(0) for tokens_SK in by_epoch], axis=0)
    best_K = np.minimum(np.bincount(samples.tasks) / len(by_epoch[0]), 1)
    found = {"largest": ratio_K.max(), "median": np.median(ratio_K), "presence": (presence_K / best_K).min()}
    return {name: float(value) for name, value in found.items()}


def ours(samples: Samples, options: argparse.Namespace) -> list[tuple[str, float, Packs]]:
    """Our packers: name, CPU seconds and packs."""
    calls = {
        "ours, decreasing": lambda: best_fit_decreasing(samples.lengths, options.seq_length),
        "ours, mixed": lambda: best_fit_mixed(*samples, options.seq_length, options.seed),
    }
    readings = in_turn(calls, options.repeat)
    return [(name, median_of(readings[name])["cpu"], Packs(*call())) for name, call in calls.items()]


def of_peer(name: str, samples: Samples, options: argparse.Namespace) -> tuple[float, Packs] | str:
    """CPU seconds and packs of a peer, or the reason why there are none."""
    shuffled = np.random.default_rng(options.seed).permutation(len(samples.lengths))
    try:
        seconds, indices, offsets = run_packer(name, samples.lengths[shuffled], options)
    except MissingPeerError as reason:
        return str(reason)
    return seconds, Packs(shuffled[indices], offsets)


def measure(samples: Samples, options: argparse.Namespace) -> list[dict]:
    """Numbers of every packer, on one data set."""
    results = []
    contenders: list[tuple[str, float, Packs]] = ours(samples, options)
    fewest = len(contenders[0][2].offsets) - 1
    for name in PACKERS:
        found = of_peer(name, samples, options)
        if isinstance(found, str):
            results.append({"packer": name, "left_out": found})
        else:
            contenders.append((name, *found))
    for name, seconds, packs in contenders:
        rows = len(packs.offsets) - 1
        fill = samples.lengths.sum(dtype=np.int64) / (rows * options.seq_length)
        numbers = {"packer": name, "rows": rows, "over_decreasing": rows - fewest, "fill": float(fill), "cpu": seconds}
        for order, orders in orders_of(samples, packs, options, name.startswith("ours")).items():
            spreads = {size: spread(samples, packs, orders, size) for size in options.global_batch_size}
            results.append({**numbers, "order": order, "spread": spreads})
    return results


def orders_of(samples: Samples, packs: Packs, options: argparse.Namespace, mixed: bool) -> dict[str, list[np.ndarray]]:
    """Orders of the rows in each epoch, int64 [packs], by kind: random, and the one that mixes if that is wanted."""
    epochs, rows = range(options.epochs), len(packs.offsets) - 1
    orders = {"random": [epoch_order(rows, options.seed + epoch) for epoch in epochs]}
    if mixed:
        entries = count_packs(*packs, samples.tasks.astype(np.uint16), samples.lengths.astype(np.int64))
        groups = rarest_tasks(*entries[:3], rows)
        orders["mixed"] = [mixed_order(groups, options.seed + epoch) for epoch in epochs]
    return orders


def show(results: dict[str, list[dict]], sizes: list[int]) -> None:
    """Print a table for each data set."""
    for name, rows in results.items():
        print(f"{name}\n\n| packer | order | rows | fill, % | ms, CPU |", end="")
        print("".join(f" cv, largest (median), G = {size} | presence |" for size in sizes))
        print(f"|---|---|---:|---:|---:|{'---:|---:|' * len(sizes)}")
        for row in rows:
            if "left_out" in row:
                print(f"| {row['packer']} | left out: {row['left_out']} |||{'||' * len(sizes)}")
                continue
            print(f"| {row['packer']} | {row['order']} | {row['rows']:,} ({row['over_decreasing']:+,}) |", end="")
            print(f" {100 * row['fill']:.2f} | {1000 * row['cpu']:,.1f} |", end="")
            spreads = [row["spread"][size] for size in sizes]
            print("".join(f" {s['largest']:.2f} ({s['median']:.2f}) | {s['presence']:.3f} |" for s in spreads))
        print()


def main() -> None:
    """Measure, print the tables, and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--samples", type=int, default=84_000, help="of each data set")
    parser.add_argument("--seq-length", type=int, default=4096)
    parser.add_argument(
        "--global-batch-size", type=int, nargs="+", default=[32, 128], metavar="G", help="rows of a step"
    )
    parser.add_argument("--epochs", type=int, default=8, help="orders of the rows; means over them are reported")
    add_options(parser)
    parser.add_argument("--repeat", type=int, default=9, help="rounds of our packers; the median is reported")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    options = parser.parse_args()
    print(f"{machine()}\nrows of {options.seq_length} tokens\n")
    results = {}
    for name, make in DATASETS.items():
        samples = Samples(*make(options.samples, options.seq_length))
        results[name] = measure(samples, options)
    show(results, options.global_batch_size)
    write_numbers(options, machine(), results)


if __name__ == "__main__":
    main()
