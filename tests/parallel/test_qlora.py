"""Adapters beside a model in 4 bits equal adapters beside the dequantised model, on every parallel layout."""

import functools

import numpy as np
import pytest

from mft_megatron.mcore.model.parameters import weight_norm
from tests.parallel.adapters import FOR_GRADIENTS, KnownAdapters, adapter_shards, whole_adapters
from tests.parallel.layouts import ParallelLayout
from tests.parallel.run import TASK_WEIGHTS, arguments_for, data_seed, open_dataset, plans_of
from tests.ranks import run_on_ranks

# Each of two ranks has whole blocks of 64 of each row, and groups of 256 blocks end within the second rank's rows.
SHAPE = "--hidden-size 128 --ffn-hidden-size 384 --num-layers 2 --lora-rank 4"
MATRICES = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


def base_content(network, name, index):
    """Make a whole weight of the base, fp32, in Megatron's order of rows; no two blocks have the same magnitude."""
    import hashlib

    import torch

    generator = torch.Generator().manual_seed(
        int.from_bytes(hashlib.sha256(f"{name}{index}".encode()).digest()[:4], "big")
    )
    hidden, ffn, heads = network.hidden_size, network.ffn_hidden_size, network.num_attention_heads
    groups, head = network.num_query_groups, network.kv_channels
    rows, columns = {
        "linear_qkv": ((heads + 2 * groups) * head, hidden),
        "linear_proj": (hidden, heads * head),
        "linear_fc1": (ffn * (2 if network.gated else 1), hidden),
        "linear_fc2": (hidden, ffn),
    }.get(name.split(".")[-2], (1024, hidden))
    if "norm" in name:
        return 1 + 0.1 * torch.randn(hidden, generator=generator)
    if name.endswith("bias"):
        return 0.02 * torch.randn(rows, generator=generator)
    weight = torch.randn(rows, columns, generator=generator)
    return 0.05 * weight * torch.rand(rows, 1, generator=generator) * torch.rand(columns, generator=generator)


def rows_of_sources(network, name, rows):
    """Rows of Megatron's matrix for each of the Hugging Face matrices that it fuses; slow and obvious."""
    if "linear_qkv" in name:
        sources, row = ([], [], []), 0
        for _ in range(network.num_query_groups):
            for _ in range(network.num_attention_heads // network.num_query_groups):
                sources[0].extend(range(row, row := row + network.kv_channels))
            sources[1].extend(range(row, row := row + network.kv_channels))
            sources[2].extend(range(row, row := row + network.kv_channels))
        return sources
    if "linear_fc1" in name and network.gated:
        return list(range(rows // 2)), list(range(rows // 2, rows))
    return (list(range(rows)),)


def through_four_bits(network, name, weight):
    """Quantise and dequantise a whole weight, each of its Hugging Face matrices separately."""
    import torch

    from mft_megatron.mcore.adapters import nf4
    from tests.mcore.adapters.magnitudes import expand_all

    reference, again = nf4.Reference(), torch.empty_like(weight)
    for rows in rows_of_sources(network, name, len(weight)):
        codes, magnitudes = reference.quantize(weight[rows])
        rounded = expand_all(nf4.compress(magnitudes))
        again[rows] = reference.dequantize(codes, rounded, weight[rows].shape, weight.dtype)
    return again


class KnownBase:
    """A source of the base's weights, fp32; with ``quantized`` quantised and dequantised."""

    def __init__(self, network, quantized):
        self.network, self.quantized = network, quantized
        self.whole = functools.cache(self.whole)

    def read(self, wanted):
        """Read a slice of a weight."""
        return self.whole(wanted.name, wanted.index)[wanted.region]

    def whole(self, name, index):
        """A whole weight of one layer and expert."""
        weight = base_content(self.network, name, index)
        matrix = name.split(".")[-2] in MATRICES and name.endswith(".weight") and "experts" not in name
        has_codes = self.quantized and matrix
        return through_four_bits(self.network, name, weight) if has_codes else weight


def qlora_arguments(prefix, options, world_size, peft="qlora", shape="llama"):
    """Arguments of a run with adapters; the command line accepts a model in 4 bits only from a folder."""
    import dataclasses

    arguments = arguments_for(prefix, f"{FOR_GRADIENTS} {SHAPE} --peft-type lora {options}", world_size, shape)
    return dataclasses.replace(arguments, lora=dataclasses.replace(arguments.lora, peft_type=peft))


def make_trainer(arguments, dataset, quantized=False):
    """Build a trainer with a known base and known adapters; ``quantized``: fill the base with dequantised weights."""
    from mft_megatron.mcore.checkpointing.load_weights import fill_weights
    from mft_megatron.mcore.trainer import Trainer

    trainer = Trainer(arguments, dataset.vocab_size, 4)
    fill_weights(trainer, KnownBase(arguments.network, quantized))
    fill_weights(trainer, KnownAdapters(), adapters=True)
    return trainer


def train(prefix, options, world_size, peft, quantized, steps=2, shape="llama"):
    """Train; return losses and gradient norms, gradients of the first step, and the adapters after the last."""
    from mft_megatron.mcore.parallel import process_groups

    arguments = qlora_arguments(prefix, options, world_size, peft, shape)
    dataset = open_dataset(arguments)
    split = dataset.split("train")
    with process_groups.process_groups(arguments.distributed, arguments.initialization.seed):
        trainer = make_trainer(arguments, dataset, quantized)
        curve, gradients = [], None
        for plan in plans_of(split, data_seed(split), steps):
            report = trainer.train_step(split, plan, TASK_WEIGHTS)
            curve.append((report.loss, report.grad_norm))
            gradients = gradients or adapter_shards(trainer, lambda parameter: parameter.main_grad)
        return curve, gradients, adapter_shards(trainer, lambda parameter: parameter.detach())


def assert_same(ranks, expected):
    for curve, _, _ in ranks:
        np.testing.assert_allclose(curve, expected[0], rtol=1e-6)
    # ranks add in another order, and Adam divides gradients, including their rounding errors, by their size
    for item, tolerance in ((1, 5e-6), (2, 2e-5)):
        found = whole_adapters([rank[item] for rank in ranks])
        assert found.keys() == expected[item].keys()
        for name, matrix in expected[item].items():
            np.testing.assert_allclose(found[name], matrix, rtol=0, atol=tolerance * abs(matrix).max(), err_msg=name)


@functools.cache
def one_process(prefix, peft="lora", quantized=True, options="--micro-batch-size 1", shape="llama"):
    """Train in one process; by default adapters beside a whole model with dequantised weights."""
    curve, gradients, adapters = run_on_ranks(1, train, prefix, options, 1, peft, quantized, 2, shape)[0]
    return curve, whole_adapters([gradients]), whole_adapters([adapters])


LAYOUTS = [
    ParallelLayout("MB2", quick=True),
    ParallelLayout("TP2 SP", quick=True),
    ParallelLayout("TP2"),
    ParallelLayout("PP2"),
    ParallelLayout("DP2"),
    ParallelLayout("CP2"),
    ParallelLayout("MB1 full"),
    ParallelLayout("MB1 selective"),
    ParallelLayout("TP2 SP norms"),
    ParallelLayout("TP2 PP2 DO"),
    ParallelLayout("PP2 VPP2", "llama"),
]


@pytest.mark.parametrize(
    "layout", [pytest.param(each, marks=() if each.quick else pytest.mark.slow, id=str(each)) for each in LAYOUTS]
)
def test_equals_the_dequantised_model(dataset_prefix, layout):
    """Losses and gradients equal those beside the dequantised model, bit for bit on the same parallel layout."""
    size, deep = layout.world_size, " --num-layers 4" if "VPP" in layout.name else ""
    ranks, whole = (
        run_on_ranks(size, train, dataset_prefix, layout.options + deep, size, peft, peft == "lora")
        for peft in ("qlora", "lora")
    )
    for ours, theirs in zip(ranks, whole, strict=True):
        np.testing.assert_equal(ours, theirs)
    expected = one_process(dataset_prefix, options=f"--micro-batch-size 1{deep}")
    if layout.name.endswith("DO"):
        ranks, expected = [(curve, {}, adapters) for curve, _, adapters in ranks], (expected[0], {}, expected[2])
    assert_same(ranks, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "shape", "targets"),
    [
        ("--tensor-model-parallel-size 2 --sequence-parallel", "llama", "q_proj v_proj up_proj"),
        ("--tensor-model-parallel-size 2", "Megatron's defaults", "linear_fc2"),
        ("--expert-model-parallel-size 2 --num-layers 4", "experts", "linear_qkv linear_proj"),
    ],
)
def test_matrices_without_adapters_are_in_four_bits_too(dataset_prefix, layout, shape, targets):
    """Matrices of experts are the exception."""
    options = f"--lora-target-modules {targets} --micro-batch-size 1"
    deep = " --num-layers 4" if shape == "experts" else ""
    ranks = run_on_ranks(2, train, dataset_prefix, f"{options} {layout}", 2, "qlora", False, 2, shape)
    assert_same(ranks, one_process(dataset_prefix, options=options + deep, shape=shape))


@pytest.mark.slow
def test_four_bits_change_the_loss(dataset_prefix):
    """Otherwise the comparisons above would prove nothing."""
    rounded = one_process(dataset_prefix)[0]
    exact = one_process(dataset_prefix, quantized=False)[0]
    assert abs(rounded[0][0] - exact[0][0]) > 1e-5 * exact[0][0]


def inspect(prefix, options, world_size, shape):
    """Inspect a model in 4 bits.

    Returns:
        names of matrices with wrong content; bytes per element; over two steps, how many whole matrices were made per
        layer and micro-batch, how many existed when the next was made, and how many while reading.
    """
    import weakref

    import torch

    from mft_megatron.mcore.adapters import quantized_linear as quantized
    from mft_megatron.mcore.checkpointing.load_weights import fill_weights, slice_of
    from mft_megatron.mcore.parallel import process_groups

    arguments = qlora_arguments(prefix, options, world_size, shape=shape)
    dataset = open_dataset(arguments)
    split, made, existing, read = dataset.split("train"), [], [], []
    dequantize, expected = quantized.QuantizedWeight.dequantize, KnownBase(arguments.network, True)

    def watched(*args):
        existing.append(sum(weight() is not None for weight in made))
        weight = dequantize(*args)
        made.append(weakref.ref(weight))
        return weight

    class Watched(KnownBase):
        def read(self, wanted):
            content = super().read(wanted).clone()
            read.append(weakref.ref(content))
            most.append(sum(weight() is not None for weight in read))
            return content

    most = []
    with process_groups.process_groups(arguments.distributed, arguments.initialization.seed):
        trainer = make_trainer(arguments, dataset)
        fill_weights(trainer, Watched(arguments.network, False))
        model = trainer.chunks[0].module
        wrong = []
        for name, layer, shards in quantized.quantized_shards(model):
            parts = [expected.read(slice_of(shard)) for shard in shards]
            if not torch.cat(parts).equal(layer.quantized.dequantize(torch.float32)):
                wrong.append(name)
        layers = quantized.quantized_layers(model).values()
        assert not any("weight" in dict(layer.named_parameters()) for layer in layers)
        size = sum(layer.quantized.nbytes for layer in layers) / sum(layer.weight.numel() for layer in layers)
        quantized.QuantizedWeight.dequantize = watched
        for plan in plans_of(split, data_seed(split), 2):
            trainer.train_step(split, plan, TASK_WEIGHTS)
        micro_batches = 2 * arguments.training.global_batch_size // arguments.training.micro_batch_size
        return wrong, size, len(made) / (micro_batches * len(layers)), max(existing), max(most)


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        pytest.param("", "llama", marks=pytest.mark.slow),
        ("--tensor-model-parallel-size 2", "llama"),
        pytest.param("--tensor-model-parallel-size 2", "Megatron's defaults", marks=pytest.mark.slow),
        pytest.param("--hidden-size 256 --num-query-groups 4", "llama", marks=pytest.mark.slow),
    ],
)
def test_memory(dataset_prefix, options, shape):
    """Shards equal those of the whole matrices, bit for bit; at any time at most one matrix is in 16 or 32 bits."""
    world_size = 2 if options.startswith("--tensor") else 1
    for wrong, size, times, there, read in run_on_ranks(
        world_size, inspect, dataset_prefix, options, world_size, shape
    ):
        assert wrong == []
        # codes, magnitudes, an index per row of at least 128 elements, and two values per group
        assert 0.5 + 1 / 64 < size < 0.5 + 1 / 64 + 4 / 64 + 0.01
        assert (times, there) == (2, 0)
        assert read <= 2  # gate and up projection


def count(prefix, options, world_size, peft, quantized):
    from mft_megatron.mcore.parallel import process_groups

    arguments = qlora_arguments(prefix, options, world_size, peft)
    dataset = open_dataset(arguments)
    with process_groups.process_groups(arguments.distributed, arguments.initialization.seed):
        trainer = make_trainer(arguments, dataset, quantized)
        return (
            trainer.num_parameters(),
            trainer.num_parameters(trained=True),
            weight_norm(trainer.chunks),
        )


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2", ""])
def test_weights_in_four_bits_are_counted(dataset_prefix, layout):
    found, expected = (run_on_ranks(2, count, dataset_prefix, layout, 2, p, p == "lora")[0] for p in ("qlora", "lora"))
    assert found == pytest.approx(expected, rel=1e-12)
