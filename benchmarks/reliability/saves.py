"""Duration of a save, and how long an asynchronous one keeps a run waiting, beside a plain copy of the same bytes.

::

    a model with Adam's states ─► one save ─► its files in memory
    in turn: those files written and synchronised │ a save │ an asynchronous save, until training goes on and to its end

One process, on the file system of ``--folder``. All of it is on the disk at the end of each reading.
"""

import argparse
import dataclasses
import os
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from measuring.clocks import machine, write_numbers

from mft_megatron.arguments.command import parse_arguments
from mft_megatron.mcore.checkpointing.checkpoint import Writer
from mft_megatron.mcore.parallel import process_groups
from mft_megatron.mcore.trainer import Trainer
from mft_megatron.run_folder.description import CheckpointInfo

MODEL = (
    "--num-attention-heads 8 --swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear "
    "--untie-embeddings-and-output-weights --lr 1e-4 --train-iters 10 --micro-batch-size 1 --seq-length 128 "
    "--data-path data --save run"
)
INFO = CheckpointInfo(1, 1, {}, 1, {}, "", 1, 1)
READINGS = ("plain copy", "save", "asynchronous: blocked", "asynchronous: complete")


def written(folder: Path, files: dict[str, bytes]) -> None:
    """Write files into a new folder, two at a time as a rank does, and synchronise them."""
    folder.mkdir()
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda item: _write(folder / item[0], item[1]), files.items()))


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def rounds(folder: Path, trainer: Trainer, repeat: int) -> tuple[dict[str, list[float]], int]:
    """Wall seconds of each reading in every round, and the bytes of a checkpoint."""
    options = trainer.arguments.checkpoint
    in_turn, behind = Writer(options), Writer(dataclasses.replace(options, async_save=True))
    for writer in (in_turn, behind, in_turn, behind):  # two saves make the plan
        path = writer.save(folder, trainer, INFO)
        writer.finish()
    files = {file.name: file.read_bytes() for file in path.iterdir()}
    seconds: dict[str, list[float]] = {name: [] for name in READINGS}
    for _ in range(repeat):
        start = time.perf_counter()
        written(folder / "copy", files)
        seconds["plain copy"].append(time.perf_counter() - start)
        shutil.rmtree(folder / "copy")
        shutil.rmtree(path)
        start = time.perf_counter()
        in_turn.save(folder, trainer, INFO)
        seconds["save"].append(time.perf_counter() - start)
        shutil.rmtree(path)
        start = time.perf_counter()
        behind.save(folder, trainer, INFO)
        seconds["asynchronous: blocked"].append(time.perf_counter() - start)
        behind.finish()
        seconds["asynchronous: complete"].append(time.perf_counter() - start)
    return seconds, sum(map(len, files.values()))


def main() -> None:
    """Measure, print the table, and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--num-layers", type=int, default=8)
    parser.add_argument("--hidden-size", type=int, default=768)
    parser.add_argument("--vocab-size", type=int, default=16384)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write; by default a temporary folder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    options = parser.parse_args()
    arguments = parse_arguments(
        f"{MODEL} --num-layers {options.num_layers} --hidden-size {options.hidden_size}".split()
    )
    with (
        tempfile.TemporaryDirectory(dir=options.folder) as folder,
        process_groups.process_groups(arguments.distributed, 1),
    ):
        trainer = Trainer(arguments, options.vocab_size, 1)
        trainer.optimizer.step()  # gradients are zero; the optimizer has its states afterwards
        seconds, size = rounds(Path(folder), trainer, options.repeat)
    print(f"{machine()}; {size / 1e6:,.0f} MB\n\n| | seconds | × plain copy |\n|---|---:|---:|")
    for name, values in seconds.items():
        ratio = statistics.median(ours / copy for ours, copy in zip(values, seconds["plain copy"], strict=True))
        print(f"| {name} | {statistics.median(values):.3f} | {ratio:.2f} |")
    write_numbers(options, machine(), {"bytes": size, "seconds": seconds})


if __name__ == "__main__":
    main()
