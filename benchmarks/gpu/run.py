"""All that ``make bench-gpu`` measures on one GPU, with a table at its end.

::

    slices.py             a rank of TP 8 of a 70B and of a 34B model: tokens a second, MFU, parts of a step
    loss/cross_entropy.py fused output layer against Megatron-Core's and, where it is installed, Liger's
    attention/kernels.py  every attention kernel that is available, at the heads of such a rank
    messages.py           collectives and sends between two GPUs, where there are two

Each part runs in a process of its own; one that fails is named, and the others are measured all the same.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from measuring.clocks import write_numbers
from measuring.device_clock import machine

from mft_megatron.mcore.platform import devices

HERE = Path(__file__).resolve().parent
SLICES = {
    "70b, packed": ["--model", "70b"],
    "70b, padded": ["--model", "70b", "--data", "padded"],
    "70b, packed, recomputed": [
        "--model", "70b", "--more", "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    ],
    "34b, packed": ["--model", "34b"],
}  # fmt: skip
KERNELS = {
    "cross entropy": [
        HERE.parent / "loss/cross_entropy.py", "--vocabularies", 4000, 152064, "--tokens", 4096, 4096,
        "--precisions", "bf16", "--supervised", 0.5, "--hidden-size", 8192, "--repeat", 5,
    ],
    "attention": [HERE.parent / "attention/kernels.py"],
    "messages": [
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", HERE / "messages.py"
    ],
}  # fmt: skip
LIMIT_SECONDS = 120


def run(*words: object) -> tuple[str | None, float]:
    """Run a program of Python; its output, or ``None`` after its error was printed, and its seconds."""
    started = time.perf_counter()
    command = [sys.executable, "-W", "ignore", *map(str, words)]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS)
        problem, output = process.stderr.strip()[-1500:] if process.returncode else None, process.stdout
    except subprocess.TimeoutExpired:
        problem, output = f"took more than {LIMIT_SECONDS} s", ""
    if problem is not None:
        print(f"failed: {' '.join(command[3:])}\n{problem}", flush=True)
    return (None if problem is not None else output), time.perf_counter() - started


def slice_row(name: str, found: dict) -> str:
    """Format one slice as a Markdown row."""
    parts = {part: reading["wall"] for part, reading in found["parts"].items()}
    whole = parts.pop("whole step")
    split = ", ".join(f"{part} {seconds / whole:.0%}" for part, seconds in parts.items())
    mfu = "" if found["mfu"] is None else f"{found['mfu']:.1%}"
    peak = found["memory"].get("max-allocated", 0) / 2**30
    return (
        f"| {name} | {found['layers']} | {found['tokens_a_second']:,.0f} | {found['operations_a_second'] / 1e12:,.1f} "
        f"| {mfu} | {found['step_seconds']['wall']:.3f} | {split} | {peak:.1f} |"
    )


def main() -> int:
    """Measure everything; the exit code is 1 where a part failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--slices", nargs="*", choices=SLICES, default=list(SLICES), help="default: all")
    parser.add_argument("--kernels", nargs="*", choices=KERNELS, help="default: all that these GPUs can")
    parser.add_argument("--more", default="", help="further options of slices.py, in one word")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    options = parser.parse_args()
    print(machine(), flush=True)
    results: dict[str, object] = {}
    tables, failed = [], 0
    usual = [name for name in KERNELS if name != "messages" or torch.cuda.device_count() > 1]  # noqa: TID251
    for name in usual if options.kernels is None else options.kernels:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "numbers.json"
            output, seconds = run(*KERNELS[name], "--json", file)
            failed += output is None
            if output is not None:
                results[name] = json.loads(file.read_text())["results"]
                tables.append(f"{name} ({seconds:.0f} s)\n\n{output}")
    rows = []
    for name in options.slices:
        output, seconds = run(HERE / "slices.py", *SLICES[name], *shlex.split(options.more))
        failed += output is None
        if output is not None:
            found = json.loads(output.strip().splitlines()[-1])
            results[name] = found
            rows.append(slice_row(name, found))
            print(f"{name}: {seconds:.0f} s; {found['kernels']}", flush=True)
    for text in tables:
        print(f"\n{text}")
    print(f"\none rank of TP 8 on {devices.describe()}\n")
    print("| slice | layers | tokens/s | TFLOP/s | MFU | s a step | of a step | peak, GiB |")
    print("|---|---:|---:|---:|---:|---:|---|---:|")
    print("\n".join(rows), flush=True)
    write_numbers(options, machine(), results)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
