"""Each replacement that layer files ask for works, and is still needed by the installed Megatron-Core."""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

import importlib.util

import pytest
import torch

from mft_megatron.mcore.platform import megatron_fixes
from tests.ranks import run_on_ranks

MODEL = (
    "--num-layers 1 --hidden-size 32 --num-attention-heads 4 --data-path data --seq-length 16 --micro-batch-size 1 "
    "--train-iters 1 --lr 1 --position-embedding-type rope --scale-embeddings-by-hidden-size --peft-type lora"
)
without_transformer_engine = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is not None, reason="Transformer Engine defines what is missing"
)


def _classes(exchange):
    """Classes of the modules of a model that are exchanged, and whether each has all it had before."""
    from mft_megatron.arguments.command import parse_arguments
    from mft_megatron.mcore.adapters import lora
    from mft_megatron.mcore.model import gpt
    from mft_megatron.mcore.parallel import process_groups

    if not exchange:
        gpt.become = lambda module, kind: None
        gpt.add_adapters = lambda model, options: None
    kept = []

    def become(module, kind):
        before = dict(vars(module))
        megatron_fixes.become(module, kind)
        kept.append(dict(vars(module)) == before)

    if exchange:
        gpt.become = lora.become = become
    arguments = parse_arguments(MODEL.split())
    with process_groups.process_groups(arguments.distributed, 1):
        (chunk,) = gpt.build_model(arguments, 100)
        model = chunk.module
        modules = (
            model.rotary_pos_emb,
            model.embedding.word_embeddings,
            model.output_layer,
            model.decoder.layers[0].self_attention.linear_qkv,
            model.decoder.layers[0].self_attention.linear_proj,
        )
        return [type(module).__name__ for module in modules], kept


def test_megatron_takes_no_class_for_these():
    """Left alone, the model has Megatron-Core's classes, so what we compute has to come in by an exchange."""
    (classes, _), *_ = run_on_ranks(1, _classes, False)
    assert classes == [
        "RotaryEmbedding",
        "VocabParallelEmbedding",
        "ColumnParallelLinear",
        "ColumnParallelLinear",
        "RowParallelLinear",
    ]


def test_an_exchanged_module_keeps_what_it_has():
    (classes, kept), *_ = run_on_ranks(1, _classes, True)
    assert classes == [
        "RotaryByPosition",
        "ScaledEmbedding",
        "FusedOutputLayer",
        "AdaptedColumnParallelLinear",
        "AdaptedRowParallelLinear",
    ]
    assert kept
    assert all(kept)


def test_a_module_becomes_a_subclass_of_its_class_only():
    linear = torch.nn.Linear(2, 2)
    with pytest.raises(TypeError, match="a Linear cannot become a RMSNorm, which is no subclass of it"):
        megatron_fixes.become(linear, torch.nn.RMSNorm)
    assert type(linear) is torch.nn.Linear


@without_transformer_engine
def test_routers_need_te_general_gemm(monkeypatch):
    from megatron.core.transformer.moe import moe_utils

    monkeypatch.delattr(moe_utils, "te_general_gemm", raising=False)
    product = (torch.ones(2, 4), torch.ones(3, 4), None, torch.float32)
    with pytest.raises(NameError, match="te_general_gemm"):
        moe_utils.router_gating_linear(*product)
    megatron_fixes.define_te_general_gemm()
    assert moe_utils.router_gating_linear(*product).eq(4).all()


def test_megatron_keeps_the_shape_of_the_first_scale(monkeypatch):
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler as Scaler

    monkeypatch.setattr(Scaler, "main_loss_backward_scale", torch.tensor(2.0))
    with pytest.raises(RuntimeError, match="shape"):
        Scaler.set_loss_scale(torch.ones(1))
    megatron_fixes.reset_expert_loss_scale()
    Scaler.set_loss_scale(torch.ones(1))
    assert Scaler.main_loss_backward_scale.tolist() == [1.0]


@without_transformer_engine
def test_recompute_asks_transformer_engine(monkeypatch):
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput

    hidden = torch.tensor([-1.0, 2.0], requires_grad=True)
    monkeypatch.setattr(CheckpointWithoutOutput.__init__, "__defaults__", (False,))
    with pytest.raises(NameError, match="FP8GlobalStateManager"):
        CheckpointWithoutOutput().checkpoint(torch.relu, hidden)
    megatron_fixes.recompute_without_transformer_engine()
    assert CheckpointWithoutOutput().checkpoint(torch.relu, hidden).tolist() == [0.0, 2.0]


@pytest.mark.skipif(importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None, reason="apex is here")
def test_linear_layers_ask_apex():
    """With ``gradient_accumulation_fusion`` Megatron-Core refuses to build them without it."""
    assert "apex" in run_on_ranks(1, _build_linear_layer, False)[0].lower()
    assert run_on_ranks(1, _build_linear_layer, True) == ["built"]


def _build_linear_layer(patched):
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear
    from megatron.core.transformer.transformer_config import TransformerConfig

    from mft_megatron.arguments.groups.distributed import DistributedArguments
    from mft_megatron.mcore.parallel import process_groups

    with process_groups.process_groups(DistributedArguments(), seed=1):
        config = TransformerConfig(
            num_layers=1,
            hidden_size=8,
            num_attention_heads=2,
            use_cpu_initialization=True,
            gradient_accumulation_fusion=True,
        )
        if patched:
            megatron_fixes.sum_weight_gradients_without_apex(lambda *tensors: None)
        try:
            ColumnParallelLinear(8, 8, config=config, init_method=torch.nn.init.zeros_, bias=False)
        except RuntimeError as error:
            return str(error)
        return "built"


def _precise_config():
    import sys
    from unittest import mock

    from megatron.core.optimizer import OptimizerConfig, optimizer_config

    sys.modules.setdefault("transformer_engine", None)  # not installed
    megatron_fixes.precise_states_without_transformer_engine()
    replaced = optimizer_config.is_te_min_version.__module__ != "megatron.core.utils"
    options = {"optimizer_cpu_offload": True, "use_precision_aware_optimizer": True, "use_distributed_optimizer": True}
    assert OptimizerConfig(**options).store_param_remainders is False
    from megatron.core import utils

    with mock.patch.object(optimizer_config, "is_te_min_version", utils.is_te_min_version):
        try:
            OptimizerConfig(**options)
        except TypeError:
            return replaced, True
    return replaced, False


@without_transformer_engine
def test_offloading_asks_transformer_engine():
    replaced, needed = run_on_ranks(1, _precise_config)[0]
    assert replaced == needed


def test_writers_start_a_process_for_their_results(monkeypatch):
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    # the function has had this name since 0.17, and one with an underscore before
    name = "get_write_results_queue"
    queue = getattr(filesystem_async, name if hasattr(filesystem_async, name) else f"_{name}")
    started = []
    monkeypatch.setattr(filesystem_async, "_results_queue", None)
    monkeypatch.setattr("multiprocessing.context.BaseContext.Manager", lambda context: started.append(context))
    with pytest.raises(AttributeError):  # there is no queue in this manager
        queue()
    assert len(started) == 1
    megatron_fixes.write_without_results_process()
    queue()
    assert len(started) == 1
