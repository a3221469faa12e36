"""Packers of other projects, each in an interpreter that has the project's packages.

:func:`run_packer` writes the lengths into a folder and starts that interpreter on this file::

    python peer_packers.py NAME LENGTHS.npy CAPACITY PACKS.npz [--megatron-bridge DIR]

PACKS.npz gets ``indices`` int64 [samples], pack after pack, ``offsets`` int64 [packs + 1], and the CPU seconds of the
packer itself. Nothing here needs mft_megatron, and no peer's code is here: it is called.
"""

import argparse
import importlib
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np

Packed = tuple[float, list[list[int]]]


def trl(lengths: np.ndarray, capacity: int, _: Path | None) -> Packed:
    """Pack with TRL: best fit decreasing, on 1000 samples at a time as its trainer does; it moves the tokens, too."""
    import pyarrow
    from datasets import Dataset
    from trl import pack_dataset

    # every token of a sample is the sample's index, by which it is recognised afterwards
    tokens = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    table = pyarrow.table({"input_ids": pyarrow.LargeListArray.from_arrays(offsets, tokens)})
    start = time.process_time()
    packed = pack_dataset(Dataset(table).with_format("arrow"), capacity, strategy="bfd")
    seconds = time.process_time() - start
    packs = []
    for row in packed.with_format(None):
        starts = np.cumsum(row["seq_lengths"]) - row["seq_lengths"]
        packs.append([row["input_ids"][start] for start in starts])
    return seconds, packs


def ms_swift(lengths: np.ndarray, capacity: int, _: Path | None) -> Packed:
    """Pack with the library that ms-swift calls, in its blocks: 1000 samples and the last pack of the block before."""
    import binpacking

    start, packs, rest = time.process_time(), [], []
    samples = list(enumerate(lengths.tolist()))
    for first in range(0, len(samples), 1000):
        packs += binpacking.to_constant_volume(rest + samples[first : first + 1000], capacity, weight_pos=1)
        if first + 1000 < len(samples):
            rest = packs.pop()
    seconds = time.process_time() - start
    return seconds, [[index for index, _ in pack] for pack in packs]


def first_fit_shuffle(lengths: np.ndarray, capacity: int, checkout: Path | None) -> Packed:
    """Pack with Megatron-Bridge, first fit in random order, its default."""
    return _megatron_bridge("first_fit_shuffle", lengths, capacity, checkout)


def first_fit_decreasing(lengths: np.ndarray, capacity: int, checkout: Path | None) -> Packed:
    """Pack with Megatron-Bridge, first fit from the longest to the shortest."""
    return _megatron_bridge("first_fit_decreasing", lengths, capacity, checkout)


def _megatron_bridge(algorithm: str, lengths: np.ndarray, capacity: int, checkout: Path | None) -> Packed:
    """Call the packer of a checkout, but leave out its packages' own code, which imports all of Megatron-Core."""
    if checkout is None:
        raise SystemExit("no --megatron-bridge")
    for package in ("megatron", "megatron.bridge", "megatron.bridge.data", "megatron.bridge.data.packing"):
        module = sys.modules[package] = types.ModuleType(package)
        module.__path__ = [str(checkout / "src" / package.replace(".", "/"))]
    algorithms = importlib.import_module("megatron.bridge.data.packing.algorithms")

    samples_by_length: dict[int, list[dict]] = {length: [] for length in range(capacity + 1)}
    for index, length in enumerate(lengths.tolist()):
        samples_by_length[length].append({"input_ids": [index], "loss_mask": [True]})
    np.random.seed(0)
    start = time.process_time()
    histogram = [len(samples) for samples in samples_by_length.values()]
    strategy, _ = algorithms.create_packing_strategy(histogram, capacity, algorithm)
    seconds = time.process_time() - start
    rows = algorithms.fill_packing_strategy(strategy, samples_by_length, capacity, 0)
    return seconds, [row["input_ids"] for row in rows]


PACKERS: dict[str, Callable[[np.ndarray, int, Path | None], Packed]] = {
    "TRL, bfd": trl,
    "ms-swift's binpacking": ms_swift,
    "Megatron-Bridge, first_fit_shuffle": first_fit_shuffle,
    "Megatron-Bridge, first_fit_decreasing": first_fit_decreasing,
}


class MissingPeerError(Exception):
    """A peer's packer cannot be run; the message says why."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where the peers are."""
    parser.add_argument("--peer-python", metavar="PYTHON", help="interpreter that has trl and binpacking")
    parser.add_argument("--megatron-bridge", type=Path, metavar="DIR", help="a checkout, for the peers' interpreter")


def run_packer(name: str, lengths: np.ndarray, options: argparse.Namespace) -> tuple[float, np.ndarray, np.ndarray]:
    """Run a peer's packer in its interpreter.

    Args:
        name: of ``PACKERS``.
        lengths: int32 [samples].
        options: ``seq_length`` and those of :func:`add_options`.

    Returns:
        CPU seconds; int64 [samples], indices of samples, pack after pack; int64 [packs + 1], the packs' offsets.

    Raises:
        MissingPeerError: no interpreter is given, or the packer failed there.
    """
    if options.peer_python is None:
        raise MissingPeerError("no --peer-python")
    with tempfile.TemporaryDirectory() as folder:
        given, packs = Path(folder, "lengths.npy"), Path(folder, "packs.npz")
        np.save(given, lengths)
        command = [options.peer_python, __file__, name, str(given), str(options.seq_length), str(packs)]
        if options.megatron_bridge:
            command += ["--megatron-bridge", str(options.megatron_bridge)]
        process = subprocess.run(command, capture_output=True, text=True)
        if process.returncode:
            raise MissingPeerError((process.stderr.strip().splitlines() or ["no message"])[-1])
        with np.load(packs) as found:
            return float(found["seconds"]), found["indices"], found["offsets"]


def main() -> None:
    """Pack, check that every sample is in one pack, write the packs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name", choices=PACKERS)
    parser.add_argument("lengths", type=Path)
    parser.add_argument("capacity", type=int)
    parser.add_argument("packs", type=Path)
    parser.add_argument("--megatron-bridge", type=Path, metavar="DIR", help="a checkout")
    options = parser.parse_args()
    lengths = np.load(options.lengths)
    seconds, packs = PACKERS[options.name](lengths, options.capacity, options.megatron_bridge)
    indices = np.concatenate([np.asarray(pack, np.int64) for pack in packs])
    offsets = np.concatenate([[0], np.cumsum([len(pack) for pack in packs])])
    if not np.array_equal(np.sort(indices), np.arange(len(lengths))):
        raise SystemExit(f"{options.name}: not every sample is in one pack")
    if np.add.reduceat(lengths[indices], offsets[:-1]).max() > options.capacity:
        raise SystemExit(f"{options.name}: a pack is longer than {options.capacity}")
    np.savez(options.packs, seconds=seconds, indices=indices, offsets=offsets)


if __name__ == "__main__":
    main()
