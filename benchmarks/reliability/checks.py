"""Time of the checks that keep a run from writing and from reading what is wrong, beside what they are part of.

::

    states of a model ─► are they finite?         beside the save that follows
    a micro-batch     ─► ids and masks known?     beside building it
    files of the data ─► the same as when opened? beside the 30 s between two looks

The run folder is in a temporary folder, or in ``--folder`` on the file system to be measured.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from measuring.clocks import in_turn, median_of, ratio_of, write_numbers
from measuring.device_clock import machine

from mft_megatron.arguments.command import parse_arguments
from mft_megatron.arguments.values.mock_data import MockTask
from mft_megatron.data.loading import build_batch as building
from mft_megatron.data.loading.dataset import PackedDataset
from mft_megatron.data.loading.step_plan import plan_step
from mft_megatron.dry_run.mock_data import write_mock_data
from mft_megatron.mcore.checkpointing import checkpoint
from mft_megatron.mcore.optim.finite_states import find_non_finite, held_states
from mft_megatron.mcore.parallel import process_groups
from mft_megatron.mcore.platform import devices
from mft_megatron.mcore.trainer import Trainer
from mft_megatron.run_folder.description import CheckpointInfo

MODEL = (
    "--num-attention-heads 8 --swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear "
    "--untie-embeddings-and-output-weights --lr 1e-4 --train-iters 1000 --micro-batch-size 1 --global-batch-size 1"
)
BATCHES = 50


def states(prefix: Path, folder: Path, precision: str, options: argparse.Namespace) -> dict:
    """Time of looking at all states of a model, and of a save with it and without it."""
    shape = (
        f"{MODEL} {precision} --num-layers {options.num_layers} --hidden-size {options.hidden_size} --seq-length "
        f"{options.seq_length} --data-path {prefix}"
    )
    arguments = parse_arguments(shape.split())
    dataset = PackedDataset.open(prefix, options.seq_length)
    with process_groups.process_groups(arguments.distributed, 1):
        trainer = Trainer(arguments, dataset.vocab_size, 1)
        plan = plan_step(dataset.split("train"), seed=1, global_batch_size=1, consumed_samples=0)
        trainer.train_step(dataset.split("train"), plan, np.ones(1))
        layout = process_groups.parallel_layout()
        info = CheckpointInfo(1, 0, {}, dataset.vocab_size, {}, "", 1, 1, layout=layout)
        writer = checkpoint.Writer(arguments.checkpoint)

        def save() -> None:
            writer.save(folder, trainer, info)

        def save_unchecked() -> None:
            checkpoint.find_non_finite = lambda *_: None
            save()
            checkpoint.find_non_finite = find_non_finite

        def look() -> None:
            find_non_finite(trainer.chunks, trainer.optimizer)

        save()
        readings = in_turn({"look": look, "save": save, "unchecked": save_unchecked}, options.repeat)
        size = sum(state.content.nbytes for state in held_states(trainer.chunks, trainer.optimizer))
    return {
        "bytes": size,
        "milliseconds": {name: median_of(reading, 1e3) for name, reading in readings.items()},
        "share": ratio_of(readings["look"], readings["unchecked"]),
    }


def micro_batches(dataset: PackedDataset, rows: int, options: argparse.Namespace) -> dict:
    """Time of building a micro-batch with the check of its values, and without it."""
    split = dataset.split("train")
    packs = [split.slices_of(pack % split.num_packs) for pack in range(rows)]
    check = building.refuse_unknown_values

    def build() -> None:
        for _ in range(BATCHES):
            building.build_batch(dataset, packs)

    def unchecked() -> None:
        building.refuse_unknown_values = lambda *_: None
        build()
        building.refuse_unknown_values = check

    readings = in_turn({"checked": build, "unchecked": unchecked}, options.repeat)
    return {
        "tokens": rows * dataset.seq_length,
        "microseconds": {name: median_of(reading, 1e6 / BATCHES) for name, reading in readings.items()},
        "ratio": ratio_of(readings["checked"], readings["unchecked"]),
    }


def files(dataset: PackedDataset, options: argparse.Namespace) -> dict:
    """Time of a look at the files, as it is taken now and then, and of the one at the end of an epoch."""

    def poll() -> None:
        dataset.files._next = 0.0
        dataset.files.poll()

    readings = in_turn({"now and then": poll, "end of an epoch": dataset.files.refuse_change}, options.repeat)
    return {name: median_of(reading, 1e6) for name, reading in readings.items()}


def main() -> None:
    """Measure, print the tables, and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--seq-length", type=int, default=4096)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4], help="rows of a micro-batch")
    parser.add_argument("--repeat", type=int, default=5, help="rounds; the median is reported")
    parser.add_argument("--folder", help="where the run folder is written")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    options = parser.parse_args()
    devices.use_device()
    print(machine(), "\n")
    results: dict = {"states": {}, "micro_batches": []}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        prefix = Path(name) / "data"
        write_mock_data(
            prefix, [MockTask("60-600", "task", "uniform", (60, 600))], options.seq_length, 64, options.vocab_size
        )
        print("| states | MB | look, ms | GB/s | save, ms | look / save |\n|---|---:|---:|---:|---:|---:|")
        for precision in ("", "--bf16", "--bf16 --use-distributed-optimizer"):
            numbers = states(prefix, Path(name) / "run", precision, options)
            results["states"][precision or "fp32"] = numbers
            look, save = (numbers["milliseconds"][call]["wall"] for call in ("look", "unchecked"))
            print(
                f"| {precision or 'fp32'} | {numbers['bytes'] / 1e6:,.0f} | {look:.1f} "
                f"| {numbers['bytes'] / look / 1e6:.1f} | {save:.0f} | {numbers['share']['wall']:.2%} |"
            )
        dataset = PackedDataset.open(prefix, options.seq_length, "hashes")
        print("\n| tokens of a micro-batch | build, µs | with the check, µs | ratio |\n|---:|---:|---:|---:|")
        for rows in options.rows:
            numbers = micro_batches(dataset, rows, options)
            results["micro_batches"].append(numbers)
            before, after = (numbers["microseconds"][call]["cpu"] for call in ("unchecked", "checked"))
            print(f"| {numbers['tokens']:,} | {before:.0f} | {after:.0f} | {numbers['ratio']['cpu']:.3f} |")
        results["files"] = files(dataset, options)
        count = len(dataset.ledger.arrays_for(options.seq_length))
        for what, numbers in results["files"].items():
            print(f"\nlook at {count} files, {what}: {numbers['wall']:,.0f} µs")
    write_numbers(options, machine(), results)


if __name__ == "__main__":
    main()
