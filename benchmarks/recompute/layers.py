"""Activations kept or computed again (``--recompute-*``): time of a forward and backward pass, and peak memory.

::

    tokens [1, T] ─► all layers, fused cross entropy ─► Σ l_t ─► backward        once for each way of recomputing

Time: all in turn in one process, medians of rounds. Memory: each in a fresh process, peak resident memory (VmHWM of
Linux) above the resident memory before; torch's counters with a GPU.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from measuring.clocks import median_of, ratio_of, write_numbers
from measuring.device_clock import Clock, machine, main_clock
from measuring.peak_memory import peak_memory_of

from mft_megatron.arguments.command import parse_arguments
from mft_megatron.batch import Batch
from mft_megatron.mcore.model.gpt import build_model
from mft_megatron.mcore.parallel import process_groups
from mft_megatron.mcore.parallel.device_batch import to_device
from mft_megatron.mcore.platform import devices

FULL, SELECTIVE = "--recompute-granularity full --recompute-method", "--recompute-granularity selective"
KEPT = "all kept"
VARIANTS = {
    KEPT: "",
    "core_attn": f"{SELECTIVE} --recompute-modules core_attn",
    "layernorm": f"{SELECTIVE} --recompute-modules layernorm",
    "mlp": f"{SELECTIVE} --recompute-modules mlp",
    "core_attn, layernorm, mlp": f"{SELECTIVE} --recompute-modules core_attn layernorm mlp",
    "half of the layers": f"{FULL} block --recompute-num-layers {{half}}",
    "every layer": f"{FULL} uniform --recompute-num-layers 1",
    "every two layers": f"{FULL} uniform --recompute-num-layers 2",
}
MODEL = (
    "--num-attention-heads 8 --swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear "
    "--untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 --lr 1e-4 --train-iters 1 "
    "--data-path none --micro-batch-size 1"
)


class Case:
    """A model with one way of recomputing, and a micro-batch of one row of equal segments."""

    def __init__(self, variant: str, options: argparse.Namespace):
        words = (
            f"{MODEL} --num-layers {options.num_layers} --hidden-size {options.hidden_size} --seq-length "
            f"{options.seq_length} {VARIANTS[variant].format(half=options.num_layers // 2)}"
        )
        arguments = parse_arguments(words.split())
        (self.chunk,) = build_model(arguments, options.vocab_size)
        self.chunk.train()
        tokens = np.random.default_rng(options.seed).integers(0, options.vocab_size, (1, options.seq_length))
        positions = np.arange(options.seq_length) % options.segment_length
        segments = np.arange(options.seq_length)[None] // options.segment_length
        ends = [*range(0, options.seq_length, options.segment_length), options.seq_length]
        mask, task = np.ones(tokens.shape, np.uint8), np.zeros_like(tokens)
        labels, cu_seqlens = np.roll(tokens, -1), np.array(ends, np.int32)
        batch = Batch(tokens, labels, mask, positions[None], segments, task, cu_seqlens, options.segment_length)
        self.batch = to_device(batch)

    def run(self) -> None:
        """Run forward and backward; gradients are summed in DDP's buffers."""
        self.chunk.zero_grad_buffer()
        self.chunk.module.run(self.batch).sum().backward()


def measure_time(options: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Seconds of each variant in each round, by clock."""
    cases = {variant: Case(variant, options) for variant in VARIANTS}
    readings, clock = {variant: [] for variant in VARIANTS}, Clock()
    for number in range(options.warmup + options.rounds):
        for variant, case in cases.items():
            with clock:
                case.run()
            taken = clock.take()
            if number >= options.warmup:
                readings[variant].append(taken)
    return readings


def measure_memory(variant: str) -> int:
    """Peak memory in bytes, measured in a fresh process."""
    words = [sys.executable, __file__, *sys.argv[1:], "--peak-of", variant]
    process = subprocess.run(words, capture_output=True, text=True)
    if process.returncode:
        sys.exit(process.stderr)
    return int(process.stdout)


def table(result: dict) -> str:
    """Format all variants as Markdown."""
    lines = [
        f"| computed again | step, ms {main_clock()} | over {KEPT} | peak, MiB | of {KEPT} |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, numbers in result.items():
        part = numbers["peak_bytes"] / result[KEPT]["peak_bytes"]
        lines.append(
            f"| {name} | {numbers['milliseconds'][main_clock()]:.0f} | {numbers['to_kept'][main_clock()] - 1:+.0%} | "
            f"{numbers['peak_bytes'] / 2**20:.0f} | {part:.0%} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print the tables, and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--num-layers", type=int, default=8)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--seq-length", type=int, default=2048)
    parser.add_argument("--segment-length", type=int, default=512)
    parser.add_argument("--warmup", type=int, default=1, help="rounds before the clock counts")
    parser.add_argument("--rounds", type=int, default=3, help="passes of each variant; the median is reported")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    parser.add_argument("--peak-of", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    devices.use_device()
    layout = parse_arguments(f"{MODEL} --num-layers 1 --hidden-size 64 --seq-length 8".split()).distributed
    with process_groups.process_groups(layout, options.seed):
        if options.peak_of:
            print(peak_memory_of(Case(options.peak_of, options).run))
            return
        print(machine())
        readings = measure_time(options)
    result = {
        variant: {
            "milliseconds": median_of(taken, 1000),
            "to_kept": ratio_of(taken, readings[KEPT]),
            "peak_bytes": measure_memory(variant),
        }
        for variant, taken in readings.items()
    }
    print(table(result))
    write_numbers(options, machine(), result)


if __name__ == "__main__":
    main()
