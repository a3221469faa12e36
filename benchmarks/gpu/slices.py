"""Training steps of one tensor-parallel rank of a large model, on one GPU: tokens a second, MFU, and where time goes.

::

    a layer of Llama-2-70B on TP 8 ─► 8 of 64 heads, 1 of 8 groups, 3584 of 28672 MLP columns, 4000 of 32000 ids

The hidden size is the model's, so every product has the shape that it has on a rank of TP 8; messages between ranks are
left out. There are as many layers as fit into the memory. Samples of lognormal lengths are packed, or padded to the
longest of their micro-batch; tokens are those of the samples in both cases.

A process measures one case: first whole steps without any wait in between, then steps whose parts are timed with
the device synchronised around each, and the peak memory of all of them.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from measuring.clocks import median_of, timed
from measuring.device_clock import Clock

from mft_megatron.arguments.command import parse_arguments
from mft_megatron.arguments.values.mock_data import mock_task
from mft_megatron.data.loading.dataset import PackedDataset, training_packs
from mft_megatron.data.loading.step_plan import plan_step
from mft_megatron.dry_run.mock_data import write_mock_data
from mft_megatron.mcore.model import gpt, kernels
from mft_megatron.mcore.parallel import process_groups
from mft_megatron.mcore.platform import devices
from mft_megatron.mcore.trainer import Trainer
from mft_megatron.training.throughput import segment_lengths, step_operations

LLAMA = (
    "--swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear "
    "--untie-embeddings-and-output-weights --group-query-attention --attention-dropout 0 --hidden-dropout 0"
)
# hidden size, and what one of 8 tensor-parallel ranks has: heads, groups, MLP columns, ids
SHAPES = {
    "70b": {"hidden": 8192, "heads": 8, "groups": 1, "columns": 3584, "vocabulary": 4000, "layers": 80},
    "34b": {"hidden": 8192, "heads": 8, "groups": 1, "columns": 2752, "vocabulary": 4002, "layers": 48},
    "tiny": {"hidden": 64, "heads": 4, "groups": 2, "columns": 96, "vocabulary": 500, "layers": 2},
}
# bf16 weights, fp32 gradients, main weights and two moments
BYTES_OF_A_PARAMETER = 2 + 4 + 4 + 8
# operations a second in bf16 without sparsity, from NVIDIA's data sheets; the first name that is in the device's counts
PEAKS = {"B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12}
# padding mode and rows of a micro-batch; two rows of the longest samples still fit where a packed row does
DATA = {"packed": ("pack", 1), "padded": ("padding", 2)}


def layers_that_fit(shape: dict[str, int], tokens: int, memory: int) -> int:
    """Layers whose training state and activations fit into 80 % of the memory, at most those of the model."""
    hidden, columns = shape["hidden"], shape["columns"]
    channels = 128 * (2 * shape["heads"] + 2 * shape["groups"])
    parameters = hidden * (channels + 3 * columns)
    # inputs of norms and products, queries to values, output of attention, MLP before and after its activation
    activations = 2 * tokens * (5 * hidden + 2 * channels + 5 * columns)
    beside = 2 * shape["vocabulary"] * hidden * BYTES_OF_A_PARAMETER + 2 * 2**30
    layer = BYTES_OF_A_PARAMETER * parameters + activations
    return int(np.clip((0.8 * memory - beside) // layer, 1, shape["layers"]))


def words_of(shape: dict[str, int], layers: int, prefix: str, options: argparse.Namespace) -> list[str]:
    """Options of ``pretrain_mft.py`` for a slice of a model."""
    micro = DATA[options.data][1]
    return (
        f"{LLAMA} --num-layers {layers} --hidden-size {shape['hidden']} --ffn-hidden-size {shape['columns']} "
        f"--num-attention-heads {shape['heads']} --num-query-groups {shape['groups']} --kv-channels "
        f"{128 if shape['hidden'] > 1000 else 16} --make-vocab-size-divisible-by 2 --seq-length {options.seq_length} "
        f"--micro-batch-size {micro} --global-batch-size {micro * options.micro_batches} --bf16 "
        f"--use-distributed-optimizer --mft-loss task-token --lr 1e-5 --train-iters 100 --data-path {prefix} "
        f"{options.more}"
    ).split()


def measure(options: argparse.Namespace) -> dict:
    """Measure one case: readings of whole steps and of their parts."""
    shape = SHAPES[options.model]
    memory = torch.cuda.get_device_properties(0).total_memory if devices.HAS_CUDA else 8 * 2**30  # noqa: TID251
    layers = options.num_layers or layers_that_fit(shape, options.seq_length, memory)
    with tempfile.TemporaryDirectory() as folder:
        prefix = f"{folder}/data"
        tasks = [mock_task(text) for text in options.mock_data]
        mode, micro = DATA[options.data]
        packs = micro * options.micro_batches * (options.warmup + 2 * options.steps)
        write_mock_data(Path(prefix), tasks, options.seq_length, packs, shape["vocabulary"], mode, 0.5)
        arguments = parse_arguments(words_of(shape, layers, prefix, options), 1, training_packs=training_packs)
        dataset = PackedDataset.open(prefix, options.seq_length)
        with process_groups.process_groups(arguments.distributed, 1):
            return {
                "model": options.model,
                "data": options.data,
                "layers": layers,
                **_steps(arguments, dataset, options),
            }


def _drawn_on_the_device(model: torch.nn.Module, *_: object) -> None:
    """Draw weights where they are; a run draws them on the host, a minute for billions, and its speed is the same."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.02)
            else:
                weight.fill_(1)


def _steps(arguments, dataset: PackedDataset, options: argparse.Namespace) -> dict:
    split, size = dataset.split("train"), arguments.training.global_batch_size
    with mock.patch.object(gpt, "initialize_weights", _drawn_on_the_device):
        trainer = Trainer(arguments, dataset.vocab_size, len(dataset.tasks))
    plans = [
        plan_step(split, seed=1, global_batch_size=size, consumed_samples=size * number)
        for number in range(options.warmup + 2 * options.steps)
    ]
    weight_K = np.ones(len(dataset.tasks))

    def steps(some) -> None:
        for plan in some:
            trainer.train_step(split, plan, weight_K)
        devices.synchronize()

    steps(plans[: options.warmup])
    whole = plans[options.warmup : options.warmup + options.steps]
    readings, _ = timed(lambda: steps(whole))
    # packs that differ, so operations are those of the very steps
    lengths = [segment_lengths(split, plan.packs_G) for plan in whole]
    supervised = [int(plan.counts.tokens_K.sum()) for plan in whole]
    operations = sum(
        step_operations(arguments, some, count, dataset.vocab_size)
        for some, count in zip(lengths, supervised, strict=True)
    )
    tokens = int(sum(some.sum() for some in lengths))
    peak = next((value for name, value in PEAKS.items() if name in devices.describe()), None)
    return {
        "parameters": trainer.num_parameters(),
        "kernels": kernels.describe(arguments, trainer.chunks[0].config),
        "step_seconds": {clock: value / options.steps for clock, value in readings.items()},
        "tokens_a_second": tokens / readings["wall"],
        "operations_a_second": operations / readings["wall"],
        "mfu": None if peak is None else operations / readings["wall"] / peak,
        "parts": _parts(trainer, split, plans[-options.steps :], weight_K),
        "memory": devices.memory(),
    }


def _parts(trainer: Trainer, split, plans, weight_K) -> dict[str, dict[str, float]]:
    """Medians of the seconds of a step's parts, with the device synchronised around each."""
    clocks = {"forward and backward": Clock(), "optimizer": Clock(), "whole step": Clock()}

    def clocked(clock: Clock, function):
        def call(*arguments, **others):
            with clock:
                return function(*arguments, **others)

        return call

    trainer._run = clocked(clocks["forward and backward"], trainer._run)
    trainer.optimizer.step = clocked(clocks["optimizer"], trainer.optimizer.step)
    readings = {name: [] for name in clocks}
    for plan in plans:
        with clocks["whole step"]:
            trainer.train_step(split, plan, weight_K)
        for name, clock in clocks.items():
            readings[name].append(clock.take())
    return {name: median_of(some) for name, some in readings.items()}


def main() -> None:
    """Measure a case and print it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=SHAPES, default="70b")
    parser.add_argument("--data", choices=DATA, default="packed")
    parser.add_argument("--num-layers", type=int, help="instead of as many as fit")
    parser.add_argument("--seq-length", type=int, default=4096)
    parser.add_argument("--micro-batches", type=int, default=4, help="in a step")
    parser.add_argument("--steps", type=int, default=4, help="measured; as many are measured again in parts")
    parser.add_argument("--warmup", type=int, default=2, help="steps before")
    parser.add_argument(
        "--mock-data", nargs="+", default=["lognormal:600:0.8", "lognormal:200:0.8"], help="lengths of tasks' samples"
    )
    parser.add_argument("--more", default="", help="further options of pretrain_mft.py, in one word")
    options = parser.parse_args()
    devices.use_device()
    print(json.dumps(measure(options)))


if __name__ == "__main__":
    main()
