"""Packing, opening a large index, and building micro-batches.

::

    lognormal lengths ─► best fit, decreasing and mixed; with --peer-python also the peers' packers
    an index of --packs packs, tokens left out ─► PackedDataset.open, plan_step, planned digests
    samples on disk ─┬─► rows: tokens, labels, masks, positions, segments of whole rows
                     └─► each sample as a slice of a plain np.memmap, in the same order

The peers (peer_packers.py) run in another interpreter on the same lengths and measure their time there. Megatron-LM is
not among them: its data sets cut a stream of samples into rows and pack nothing.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from balance import sample_lengths
from peer_packers import PACKERS, MissingPeerError, add_options, run_packer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from measuring.clocks import in_turn, machine, median_of, ratio_of, resident_bytes, timed, write_numbers

from mft_megatron.data._sample_index import best_fit_decreasing, best_fit_mixed
from mft_megatron.data.loading.build_batch import build_batch
from mft_megatron.data.loading.dataset import PackedDataset
from mft_megatron.data.loading.step_plan import plan_step
from mft_megatron.data.loading.usage import planned_usage
from mft_megatron.data.packing.packs import pack_split
from mft_megatron.data.sample_slices import SampleSlices
from mft_megatron.data.storage.indexed_dataset import _HEADER, CODES, MAGIC, VERSION
from mft_megatron.data.storage.ledger import (
    ORDER_VERSION,
    ArrayEntry,
    Ledger,
    LengthEntry,
    PackEntry,
    TaskCut,
    TaskEntry,
    TokenizerEntry,
    ledger_path,
)

TASKS, VOCABULARY = 5, 50_000


def packing(options: argparse.Namespace) -> list[dict]:
    """Time and fill of packing, for each number of samples, ours and the peers'."""
    results = []
    for samples in options.samples:
        lengths = sample_lengths(samples, options.seq_length, options.seed)
        tasks = np.random.default_rng(options.seed).integers(TASKS, size=samples, dtype=np.int32)
        calls = {
            "decreasing": lambda lengths=lengths: best_fit_decreasing(lengths, options.seq_length),
            "mixed": lambda lengths=lengths, tasks=tasks: best_fit_mixed(lengths, tasks, options.seq_length, 0),
        }
        readings = in_turn(calls, options.repeat if samples <= 1_000_000 else min(options.repeat, 3))
        for name, call in calls.items():
            took, packs = median_of(readings[name], 1000), len(call()[1]) - 1
            over = ratio_of(readings[name], readings["decreasing"])
            numbers = {"samples": samples, "by": f"ours, {name}", "milliseconds": took, "over_decreasing": over}
            results.append(numbers | _fill(lengths, packs))
        if samples <= options.peer_samples:
            results += [{"samples": samples, **peer(name, lengths, options)} for name in PACKERS]
    return results


def _fill(lengths: np.ndarray, packs: int) -> dict:
    return {"packs": packs, "tokens": int(lengths.sum(dtype=np.int64))}


def peer(name: str, lengths: np.ndarray, options: argparse.Namespace) -> dict:
    """A peer's numbers, or the reason why there are none."""
    try:
        seconds, _, offsets = run_packer(name, lengths, options)
    except MissingPeerError as reason:
        return {"by": name, "left_out": str(reason)}
    return {"by": name, "milliseconds": {"cpu": 1000 * seconds}, **_fill(lengths, len(offsets) - 1)}


def write_index(prefix: str, lengths: np.ndarray, seq_length: int, tokens: bool, rng: np.random.Generator) -> int:
    """Write a data set of one split whose samples have these lengths, int32 [samples]; returns the number of packs.

    Without ``tokens`` the files of tokens and masks are holes of the right size, which take no space on a disk.
    """
    lengths, task_ids = lengths.astype(np.int32), rng.integers(TASKS, size=len(lengths)).astype(np.uint16)
    samples = np.arange(len(lengths))
    slices = SampleSlices(samples, np.zeros_like(samples), lengths.astype(np.int64))
    packed = pack_split(slices, slices.lengths // 2, task_ids, [samples], seq_length, "pack", lengths, mixing_seeds=[0])
    for end, values in {**packed.files("train", seq_length), "_task_ids.npy": task_ids}.items():
        np.save(f"{prefix}{end}", values)
    total = int(lengths.sum(dtype=np.int64))
    for name, dtype in (("input_ids", np.dtype(np.uint16)), ("loss_mask", np.dtype(np.uint8))):
        with open(f"{prefix}_{name}.bin", "wb") as file:
            if tokens:
                file.write(rng.integers(2 if name == "loss_mask" else VOCABULARY, size=total, dtype=dtype).tobytes())
            else:
                file.truncate(total * dtype.itemsize)
        with open(f"{prefix}_{name}.idx", "wb") as file:
            file.write(_HEADER.pack(MAGIC, VERSION, CODES[dtype], len(lengths), len(lengths) + 1))
            starts = np.cumsum(lengths, dtype=np.int64) - lengths
            for part in (lengths, starts * dtype.itemsize, np.arange(len(lengths) + 1)):
                file.write(part.tobytes())
    files = list(Path(prefix).parent.glob(f"{Path(prefix).name}_*"))
    arrays = {file.name.removeprefix(Path(prefix).name): ArrayEntry(file.stat().st_size, "") for file in files}
    packs = len(packed.offsets) - 1
    entries = {"train": PackEntry(packs, len(lengths), total, 0, total / packs / seq_length)}
    samples_K = np.bincount(task_ids, minlength=TASKS).tolist()
    tasks = [TaskEntry(f"t{k}", n, n, {}, 0, 0, False, 0, {}, None, None, None, []) for k, n in enumerate(samples_K)]
    cuts = [TaskCut(n, 0, 0, 0, 0, 0, 0, {}, {"train": n, "valid": 0, "test": 0}, {"1": n}) for n in samples_K]
    length = LengthEntry({"padding_mode": "pack"}, cuts, entries, ORDER_VERSION)
    tokenizer = TokenizerEntry("HuggingFaceTokenizer", "", "", VOCABULARY, None, 0, 0)
    ledger = Ledger(tasks, tokenizer, {"stop_token_ids": []}, {str(seq_length): length}, arrays)
    ledger_path(prefix).write_text(ledger.to_json())
    return packs


def opening(folder: Path, options: argparse.Namespace) -> dict:
    """Open a large index in a separate process, in which nothing is loaded yet."""
    rng = np.random.default_rng(options.seed)
    # about two samples a row, or writing the index would take the most time here
    lengths = np.clip(rng.lognormal(7.6, 0.8, int(2.05 * options.packs)), 1, options.seq_length).astype(np.int32)
    write_index(str(folder / "index"), lengths, options.seq_length, False, rng)
    command = [sys.executable, __file__, "--open", str(folder / "index"), "--seq-length", str(options.seq_length)]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def open_index(prefix: str, seq_length: int) -> dict:
    """Do with an index what a run does before its first step, and at the end of an epoch; seconds by step."""
    opened, dataset = timed(lambda: PackedDataset.open(prefix, seq_length))
    split, plan = dataset.split("train"), dict(seed=1, global_batch_size=512)
    first = timed(lambda: plan_step(split, consumed_samples=0, **plan))[0]
    next_step = timed(lambda: plan_step(split, consumed_samples=512, **plan))[0]
    peak = resident_bytes("VmHWM")
    gigabytes = peak / 1e9 if peak is not None else None
    digests = timed(lambda: planned_usage(split))[0]
    numbers = {"open": opened, "first plan": first, "another plan": next_step, "planned digests": digests}
    return {"packs": split.num_packs, "samples": split.num_slices, "seconds": numbers, "gigabytes": gigabytes}


def assembly(folder: Path, options: argparse.Namespace) -> dict:
    """Samples per second in micro-batches of random packs; files in the page cache."""
    rng = np.random.default_rng(options.seed)
    prefix = str(folder / "tokens")
    lengths = sample_lengths(options.stored_samples, options.seq_length, options.seed)
    write_index(prefix, lengths, options.seq_length, True, rng)
    dataset = PackedDataset.open(prefix, options.seq_length)
    split, size = dataset.split("train"), options.micro_batch_size
    order = rng.permutation(split.num_packs)[: options.rows // size * size].reshape(-1, size)
    samples = [split.slices_of_packs(packs)[0].samples.tolist() for packs in order]
    plain = np.memmap(f"{prefix}_input_ids.bin", np.uint16, "r")
    starts, sizes = dataset.tokens.start_of(np.arange(len(lengths))).tolist(), lengths.tolist()

    def rows() -> None:
        for packs in order:
            build_batch(dataset, [split.slices_of(pack) for pack in packs])

    def slices() -> None:
        for samples_of_batch in samples:
            for sample in samples_of_batch:
                np.array(plain[starts[sample] : starts[sample] + sizes[sample]])

    readings = in_turn({"rows": rows, "np.memmap slices": slices}, options.repeat)
    count = sum(map(len, samples))
    seconds = {name: median_of(taken) for name, taken in readings.items()}
    per_row = {name: median_of(taken, 1000 / order.size) for name, taken in readings.items()}
    rates = {name: {clock: count / value for clock, value in took.items()} for name, took in seconds.items()}
    return {"rows": int(order.size), "samples": count, "samples_per_second": rates, "milliseconds_per_row": per_row}


def show(results: dict, seq_length: int) -> None:
    """Print all tables."""
    print("| samples | packed by | ms, CPU | packs | fill, % |\n|---:|---|---:|---:|---:|")
    for row in results["packing"]:
        if "left_out" in row:
            print(f"| {row['samples']:,} | {row['by']} | left out: {row['left_out']} | | |")
        else:
            fill = 100 * row["tokens"] / (row["packs"] * seq_length)
            took = row["milliseconds"]["cpu"]
            print(f"| {row['samples']:,} | {row['by']} | {took:,.1f} | {row['packs']:,} | {fill:.3f} |")
    if opened := results.get("opening"):
        print(
            f"\n{opened['packs']:,} packs of {opened['samples']:,} samples, {opened['gigabytes'] or 0:.2f} GB at most\n"
        )
        print("| | s, wall | s, CPU |\n|---|---:|---:|")
        for name, took in opened["seconds"].items():
            print(f"| {name} | {took['wall']:.4f} | {took['cpu']:.4f} |")
    if made := results.get("assembly"):
        print(f"\n{made['rows']:,} rows of {made['samples']:,} samples\n")
        print("| | samples/s, wall | samples/s, CPU | ms a row, CPU |\n|---|---:|---:|---:|")
        for name, rate in made["samples_per_second"].items():
            milliseconds = made["milliseconds_per_row"][name]["cpu"]
            print(f"| {name} | {rate['wall']:,.0f} | {rate['cpu']:,.0f} | {milliseconds:.3f} |")


def main() -> None:
    """Measure, print the tables, and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--samples", type=int, nargs="+", default=[100_000, 10_000_000], help="to pack")
    parser.add_argument("--seq-length", type=int, default=4096)
    parser.add_argument("--packs", type=int, default=10_000_000, help="of the index to open, about; 0 for none")
    parser.add_argument("--stored-samples", type=int, default=100_000, help="with tokens, for assembly; 0 for none")
    parser.add_argument("--rows", type=int, default=2000, help="to build")
    parser.add_argument("--micro-batch-size", type=int, default=4)
    add_options(parser)
    parser.add_argument("--peer-samples", type=int, default=100_000, help="peers pack no more than so many")
    parser.add_argument("--repeat", type=int, default=9, help="rounds; the median is reported")
    parser.add_argument("--folder", type=Path, help="for temporary files; the index takes 3 GB")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--open", metavar="PREFIX", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    options = parser.parse_args()
    if options.open:
        print(json.dumps(open_index(options.open, options.seq_length)))
        return
    print(machine())
    print(f"rows of {options.seq_length} tokens\n")
    results = {"packing": packing(options)}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        if options.packs:
            results["opening"] = opening(Path(folder), options)
        if options.stored_samples:
            results["assembly"] = assembly(Path(folder), options)
    show(results, options.seq_length)
    write_numbers(options, machine(), results)


if __name__ == "__main__":
    main()
