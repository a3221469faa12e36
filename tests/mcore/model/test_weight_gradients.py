"""Gradients of linear layers' weights over micro-batches: not rounded to 16 bits before they are added in fp32."""

import functools

import pytest
import torch

from tests import fake_products
from tests.ranks import run_on_ranks

TOKENS, HIDDEN, WIDE, MICRO_BATCHES = 16, 24, 40, 3


def layers_of(fusion, sequence_parallel, overlap):
    """A column- and a row-parallel layer in bf16 and Megatron's data parallelism around them."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.transformer_config import TransformerConfig

    from mft_megatron.mcore.kernels.mixed_products import add_weight_gradient
    from mft_megatron.mcore.platform.megatron_fixes import sum_weight_gradients_without_apex

    sum_weight_gradients_without_apex(add_weight_gradient)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        tensor_model_parallel_size=2,
        sequence_parallel=sequence_parallel,
        params_dtype=torch.bfloat16,
        use_cpu_initialization=True,
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=fusion,
    )
    options = {"config": config, "init_method": functools.partial(torch.nn.init.normal_, std=0.2), "bias": True}
    torch.manual_seed(5)
    column = ColumnParallelLinear(HIDDEN, WIDE, gather_output=False, skip_bias_add=False, **options)
    row = RowParallelLinear(WIDE, HIDDEN, input_is_parallel=True, skip_bias_add=False, **options)
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, overlap_grad_reduce=overlap, average_in_collective=False
    )
    pair = torch.nn.ModuleList([column, row])
    DistributedDataParallel(config, settings, pair)  # hooks the weights, whose hooks hold it
    return column, row


def errors_of(fusion, sequence_parallel, overlap, tied):
    """Largest error of both weights' sums over micro-batches, relative to the largest element, against fp64."""
    from megatron.core import parallel_state

    column, row = layers_of(fusion, sequence_parallel, overlap)
    column.weight.zero_out_wgrad = tied  # as Megatron marks a weight that is also an embedding
    rank = parallel_state.get_tensor_model_parallel_rank()
    expected = {"column": 0.0, "row": 0.0}
    for number in range(MICRO_BATCHES):
        generator = torch.Generator().manual_seed(number)
        whole, slope = torch.randn(2, TOKENS, 1, HIDDEN, generator=generator).bfloat16()
        shard = (lambda tensor: tensor.chunk(2)[rank]) if sequence_parallel else (lambda tensor: tensor)
        seen = {}
        wide = column(shard(whole).clone().requires_grad_())[0]
        wide.register_hook(lambda gradient, seen=seen: seen.update(wide=gradient))
        output = row(torch.nn.functional.silu(wide))[0]
        value = (output * shard(slope)).sum()
        if tied:
            # each row once, so that the other use's gradient is not rounded
            value = value + torch.nn.functional.embedding(torch.arange(len(column.weight)), column.weight).sum()
            expected["column"] = expected["column"] + 1.0
        value.backward()
        inner = torch.nn.functional.silu(wide.detach())
        expected["column"] = expected["column"] + seen["wide"][:, 0].double().T @ whole[:, 0].double()
        expected["row"] = expected["row"] + slope[:, 0].double().T @ inner[:, 0].double()
    found = {"column": column.weight.main_grad, "row": row.weight.main_grad}
    return [float((found[name].double() - expected[name]).abs().max() / expected[name].abs().max()) for name in found]


def on_ranks(sequence_parallel):
    """Errors of all cases of a layout, by case."""
    from mft_megatron.arguments.groups.distributed import DistributedArguments
    from mft_megatron.mcore.parallel import process_groups

    errors = {}
    layout = DistributedArguments(tensor_model_parallel_size=2, sequence_parallel=sequence_parallel)
    with process_groups.process_groups(layout, seed=1):
        for place, *case in CASES:
            with pytest.MonkeyPatch.context() as patch:
                if place != "cpu":
                    fake_products.install(patch, place)
                errors[(place, *case)] = errors_of(case[0], sequence_parallel, *case[1:])
    return errors


@functools.cache
def ranks_of(sequence_parallel):
    return run_on_ranks(2, on_ranks, sequence_parallel)


# torch's release for a GPU or the CPU, fusion, --overlap-grad-reduce, whether the weight is also an embedding
EXACT = [
    ("cpu", True, False, False),
    ("cpu", True, True, True),
    ("2.10", True, False, True),
    ("2.10", True, True, False),
    ("2.8", True, False, True),
]
# what the fusion is for, and what torch can do before 2.8
ROUNDED = [("cpu", False, False, False), ("2.6", True, False, False)]
CASES = [*EXACT, *ROUNDED]


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("case", EXACT, ids=str)
def test_sums_are_those_of_fp64(case, sequence_parallel):
    for errors in ranks_of(sequence_parallel):
        assert max(errors[case]) < 1e-6


@pytest.mark.parametrize("case", ROUNDED, ids=str)
def test_otherwise_they_are_rounded(case):
    for errors in ranks_of(False):
        assert min(errors[case]) > 1e-4
        assert max(errors[case]) < 2e-2
