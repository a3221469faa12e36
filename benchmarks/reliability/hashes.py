"""Cost of a checkpoint's hashes: on top of writing its files, and of reading them before a load.

::

    tensors ─► files of a rank, fsynced     with hashes, and without, in turns     seconds of each
    files   ─► compared with their hashes, and read alone, in turns                GB/s of each
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from measuring.clocks import machine, write_numbers

from mft_megatron.mcore.checkpointing.writers.part_files import write_files
from mft_megatron.run_folder.file_hash import FileHash, Hasher, read_blocks
from mft_megatron.run_folder.verification import FULL, Comparison

FILES = 2


def seconds_of(work: Callable[[], object]) -> float:
    """Duration of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def write(folder: Path, tensors: list[torch.Tensor]) -> dict[str, FileHash]:
    """Write the tensors as a rank does, into two new files; returns their hashes."""
    files = []
    for number in range(FILES):
        items = [
            (WriteItem(MetadataIndex(f"w{index}"), WriteItemType.TENSOR), tensor)
            for index, tensor in enumerate(tensors[number::FILES])
        ]
        files.append((folder / f"__0_{number}.distcp", f"__0_{number}.distcp", ([], items)))
    return write_files(files).hashes


def measure_writing(folder: Path, tensors: list[torch.Tensor], rounds: int) -> tuple[list[float], list[float]]:
    """Seconds with hashes and without, of each round; the order changes from round to round."""
    taken: dict[bool, list[float]] = {True: [], False: []}
    update = Hasher.update
    for number in range(rounds + 1):
        for hashed in (True, False) if number % 2 else (False, True):
            target = Path(tempfile.mkdtemp(dir=folder))
            Hasher.update = update if hashed else lambda self, data: None  # type: ignore[method-assign]
            seconds = seconds_of(lambda target=target: write(target, tensors))
            Hasher.update = update  # type: ignore[method-assign]
            shutil.rmtree(target)
            os.sync()
            if number:  # the first round warms up
                taken[hashed].append(seconds)
    return taken[True], taken[False]


def measure_reading(folder: Path, files: dict[str, FileHash], rounds: int) -> tuple[float, float]:
    """Median seconds to compare files with their hashes and to read them alone, from the page cache."""
    pieces = [(name, number) for name, file in files.items() for number in range(len(file.pieces))]
    comparison = Comparison(folder, files, pieces, FULL)

    def read() -> None:
        for name in files:
            for _ in read_blocks(folder / name):
                pass

    compared = [seconds_of(comparison.find_damage) for _ in range(rounds)]
    return statistics.median(compared), statistics.median(seconds_of(read) for _ in range(rounds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where files are written")
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers as JSON")
    options = parser.parse_args()
    tensors = [torch.randn(2**22) for _ in range(max(FILES, options.megabytes // 16))]
    size = sum(tensor.nbytes for tensor in tensors) / 1e9
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        with_hashes, without = measure_writing(folder, tensors, options.rounds)
        ratios = [one / other for one, other in zip(with_hashes, without, strict=True)]
        files = write(folder, tensors)
        compared, read = measure_reading(folder, files, options.rounds)
    numbers = {
        "GB": size,
        "seconds with hashes": statistics.median(with_hashes),
        "seconds without": statistics.median(without),
        "ratio of a round": statistics.median(ratios),
        "GB/s compared with hashes": size / compared,
        "GB/s read alone": size / read,
    }
    where = machine()
    print(where)
    for what, value in numbers.items():
        print(f"{what:28} {value:.3f}")
    write_numbers(options, where, numbers)


if __name__ == "__main__":
    main()
