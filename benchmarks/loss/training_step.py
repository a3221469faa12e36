"""Fraction of a training step that the objective takes.

::

    Python's standard library ─► samples, distributed to K tasks ─► tools/preprocess_data.py ─► Trainer.train_step
                                                     a clock in before_step, contribution, sums, and backward ┘

Every mode and the plain mean take their steps in turn, on the same model in one process. The clock is wrapped around
the engine's functions; nothing in the engine knows of it.
"""

import argparse
import functools
import json
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from measuring.clocks import median_of, ratio_of, write_numbers
from measuring.device_clock import Clock, machine, main_clock

from mft_megatron.arguments.command import parse_arguments
from mft_megatron.data.loading.dataset import PackedDataset
from mft_megatron.data.loading.step_plan import plan_step
from mft_megatron.loss_names import LOSSES
from mft_megatron.losses.objective import SUMS, Objective
from mft_megatron.mcore.parallel import process_groups
from mft_megatron.mcore.platform import devices
from mft_megatron.mcore.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
PLAIN = "plain mean"
TIMED = ("before_step", "weigh", "contribution", "sums", "statistics_after", "by_task")
MODEL = (
    "--num-attention-heads 8 --swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear "
    "--untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 --lr 1e-4 --train-iters 1000"
)


class PlainMean(Objective):
    """The mean of a micro-batch's supervised tokens, without coefficients and without anything to report."""

    def weigh(self, factors, batch) -> None:
        """Nothing: the mean has no coefficients."""

    def contribution(self, factors, batch, loss_BS: Tensor, *others) -> tuple[Tensor, Tensor]:
        """The mean, a scalar, and the mask in place of coefficients, [B, S]."""
        mask_BS = batch.loss_mask_BS.float()
        return (loss_BS * mask_BS).sum() / mask_BS.sum().clamp(min=1), mask_BS

    def sums(self, batch, loss_BS: Tensor, coefficient_BS: Tensor, num_tasks: int, *others) -> Tensor:
        """Zeros: nothing is reported."""
        return torch.zeros(len(SUMS), num_tasks, dtype=torch.float64, device=loss_BS.device)


class _BackwardMark(torch.autograd.Function):
    """Identity that calls a function when the gradient arrives."""

    @staticmethod
    def forward(context, value: Tensor, reached) -> Tensor:
        context.reached = reached
        return value.view_as(value)

    @staticmethod
    def backward(context, gradient: Tensor) -> tuple[Tensor, None]:
        context.reached()
        return gradient, None


def timed(objective: Objective, clock: Clock, names: tuple[str, ...] = TIMED) -> Objective:
    """Put a clock around the named functions of an objective and around its part of the backward pass."""

    def counted(function):
        @functools.wraps(function)
        def call(*arguments, **keywords):
            with clock:
                return function(*arguments, **keywords)

        return call

    clocked = {name: counted(getattr(objective, name)) for name in names}

    def contribution(factors, batch, loss_BS: Tensor, *others) -> tuple[Tensor, Tensor]:
        marked_BS = _BackwardMark.apply(loss_BS, clock.stop)
        value, coefficient_BS = clocked["contribution"](factors, batch, marked_BS, *others)
        return _BackwardMark.apply(value, clock.start), coefficient_BS

    for name, function in {**clocked, "contribution": contribution}.items():
        object.__setattr__(objective, name, function)  # the dataclass is frozen
    return objective


def library_samples(options: argparse.Namespace) -> Iterator[dict[str, str]]:
    """Records with lognormal lengths, in tokens about ``--mean-length``, out of the standard library's modules."""
    rng = np.random.default_rng(options.seed)
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = "".join(path.read_text(encoding="utf-8", errors="ignore") for path in paths)
    position = 0
    for _ in range(options.samples):
        # a token of such a vocabulary is three to four characters of code; a prompt leaves space for its completion
        length = round(3.5 * rng.lognormal(np.log(options.mean_length) - 0.8**2 / 2, 0.8))
        length = min(max(16, length), 2 * options.seq_length - 32)
        position = position if position + length < len(text) else 0
        sample = text[position : position + length]
        position += length
        yield {"prompt": sample[: length // 2], "completion": sample[length // 2 :]}


def make_tokenizer(folder: Path, options: argparse.Namespace) -> Path:
    """A byte-level BPE tokenizer, trained on the samples by the demo's command."""
    (folder / "all").mkdir()
    records = library_samples(options)
    (folder / "all" / "all.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    words = ("--tasks-dir", folder / "all", "--output-dir", folder / "tokenizer", "--vocab-size", options.vocab_size)
    _run("examples/demo/train_tokenizer.py", *words)
    return folder / "tokenizer"


def make_dataset(folder: Path, tokenizer: Path, tasks: int, options: argparse.Namespace) -> str:
    """Distribute the samples to the tasks and pack them with the project's command; returns the prefix."""
    files = folder / f"{tasks}_tasks"
    files.mkdir()
    records = list(library_samples(options))
    for task in range(tasks):
        (files / f"task{task}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records[task::tasks]))
    words = ["--tokenizer-model", tokenizer, "--seq-length", options.seq_length, "--split", "100,0,0"]
    words += ["--overlong", "truncate", "--output-prefix", files / "mixed"]
    named = [f"task{task}={files}/task{task}.jsonl" for task in range(tasks)]
    _run("tools/preprocess_data.py", *words, "--task", *named)
    return str(files / "mixed")


def _run(*command) -> None:
    words = [sys.executable, *map(str, command)]
    process = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    if process.returncode:
        sys.exit(process.stderr)


def measure(prefix: str, tasks: int, options: argparse.Namespace) -> dict:
    """Readings of whole steps and of the objective inside them, for one number of tasks."""
    shape = (
        f"{MODEL} --num-layers {options.num_layers} --hidden-size {options.hidden_size} --seq-length "
        f"{options.seq_length} --micro-batch-size {options.micro_batch_size} --global-batch-size "
        # the plain mean is an objective of this file, and the fused cross entropy asks for gradients beforehand
        f"{options.global_batch_size} --data-path {prefix} --cross-entropy-impl megatron"
    )
    arguments = parse_arguments(shape.split())
    dataset = PackedDataset.open(prefix, options.seq_length)
    split, rows = dataset.split("train"), options.global_batch_size
    clock, whole = Clock(), Clock()
    compared = {PLAIN: timed(PlainMean("token"), clock, ("contribution",))}
    compared.update({mode: timed(Objective(mode), clock) for mode in LOSSES})
    inside, steps = {name: [] for name in compared}, {name: [] for name in compared}
    present = []
    with process_groups.process_groups(arguments.distributed, options.seed):
        trainer = Trainer(arguments, dataset.vocab_size, tasks)
        weight_K = np.random.default_rng(options.seed).uniform(0.5, 2.0, tasks)
        for number in range(options.warmup + options.steps):
            # the modes of a round share their batch
            plan = plan_step(split, seed=1, global_batch_size=rows, consumed_samples=rows * number)
            for name, objective in compared.items():
                trainer.objective = objective
                with whole:
                    _ = trainer.train_step(split, plan, weight_K).loss
                readings = clock.take(), whole.take()
                if number >= options.warmup:
                    inside[name].append(readings[0])
                    steps[name].append(readings[1])
            present.append(int((plan.counts.samples_K > 0).sum()))
        parameters = trainer.num_parameters()
    return {
        "tasks": tasks,
        "tasks_present": int(np.median(present[options.warmup :])),
        "parameters": parameters,
        "variants": {
            name: {
                "objective_milliseconds": median_of(inside[name], 1000),
                "step_milliseconds": median_of(steps[name], 1000),
                "share": ratio_of(inside[name], steps[name]),
            }
            for name in compared
        },
    }


def table(result: dict) -> str:
    """Format the readings for one number of tasks as Markdown."""
    millions = result["parameters"] / 1e6
    lines = [
        f"{result['tasks']} tasks, {result['tasks_present']} of them in a step; model of {millions:.1f} M parameters",
        "",
        f"| | objective, ms {main_clock()} | step, ms {main_clock()} | share, CPU | share, wall | over plain mean |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, numbers in result["variants"].items():
        inside, step, share = (numbers[key] for key in ("objective_milliseconds", "step_milliseconds", "share"))
        clock = main_clock()
        over = share[clock] - result["variants"][PLAIN]["share"][clock]
        lines.append(
            f"| {name} | {inside[clock]:.2f} | {step[clock]:.0f} | {share['cpu']:.3%} | {share['wall']:.3%} "
            f"| {over:.3%} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print the tables, and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tasks", type=int, nargs="+", default=[5, 50, 500])
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--seq-length", type=int, default=1024)
    parser.add_argument("--micro-batch-size", type=int, default=1, help="rows")
    parser.add_argument("--global-batch-size", type=int, default=2, help="rows")
    parser.add_argument("--samples", type=int, default=3000, help="samples of the data set")
    parser.add_argument("--mean-length", type=float, default=250, help="tokens of a sample, about")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before the clock counts")
    parser.add_argument("--steps", type=int, default=5, help="rounds, one step of each variant; the median is reported")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    options = parser.parse_args()
    devices.use_device()
    print(machine())
    print(
        f"steps of {options.global_batch_size} rows of {options.seq_length} tokens, {options.micro_batch_size} a time\n"
    )
    results = []
    with tempfile.TemporaryDirectory() as name:
        tokenizer = make_tokenizer(Path(name), options)
        for tasks in options.tasks:
            results.append(measure(make_dataset(Path(name), tokenizer, tasks, options), tasks, options))
            print(table(results[-1]), flush=True)
    write_numbers(options, machine(), results)


if __name__ == "__main__":
    main()
