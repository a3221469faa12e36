"""Fused operations of a run, and the line about its kernels in the log."""

import sys
import types

import pytest
import torch

from tests import fake_kernels
from tests.command_lines import SHORT_RUN

BASE = f"{SHORT_RUN} --swiglu"


def of(extra):
    """Parse options; return the arguments and Megatron-Core's configuration."""
    from mft_megatron.arguments.command import parse_arguments
    from mft_megatron.mcore.model.config import transformer_config

    arguments = parse_arguments(f"{BASE} {extra}".split())
    return arguments, transformer_config(arguments)


def fused(config):
    names = ("bias_activation_fusion", "bias_dropout_fusion", "gradient_accumulation_fusion")
    assert not any([config.masked_softmax_fusion, config.apply_rope_fusion, config.persist_layer_norm])
    return [getattr(config, name) for name in names]


@pytest.fixture
def apex(monkeypatch):
    monkeypatch.setitem(sys.modules, "fused_weight_gradient_mlp_cuda", types.ModuleType("apex's kernel"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_none_on_the_cpu(apex):
    from mft_megatron.mcore.model.kernels import describe

    arguments, config = of("--bf16")
    assert fused(config) == [False, False, False]
    assert describe(arguments, config) == "attention: local; linear layers: Megatron-Core; fused: nothing"


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ("", [True, True, False]),
        ("--no-bias-swiglu-fusion", [False, True, False]),
        ("--no-bias-dropout-fusion", [True, False, False]),
    ],
)
def test_on_cuda_without_apex(monkeypatch, extra, expected):
    from mft_megatron.mcore.model.kernels import describe

    monkeypatch.setitem(sys.modules, "fused_weight_gradient_mlp_cuda", None)
    fake_kernels.install(monkeypatch)
    arguments, config = of(f"--bf16 {extra}")
    assert fused(config) == expected
    line = describe(arguments, config)
    assert line.startswith("attention: flash; linear layers: Megatron-Core; fused: bias and ")
    assert line.endswith("(sums of gradients not: apex's kernel for it is not installed)")


def test_on_cuda_with_apex(monkeypatch, apex):
    from mft_megatron.mcore.model.kernels import describe

    fake_kernels.install(monkeypatch)
    arguments, config = of("--bf16")
    assert fused(config) == [True, True, True]
    assert describe(arguments, config).endswith("fused: bias and SwiGLU, bias and dropout, sums of gradients")
    arguments, config = of("--bf16 --no-gradient-accumulation-fusion")
    assert fused(config) == [True, True, False]
    assert describe(arguments, config).endswith("fused: bias and SwiGLU, bias and dropout")


def test_gelu_is_not_fused(monkeypatch):
    from mft_megatron.arguments.command import parse_arguments
    from mft_megatron.mcore.model.kernels import fusions

    fake_kernels.install(monkeypatch)
    arguments = parse_arguments(BASE.removesuffix(" --swiglu").split())
    assert not fusions(arguments)["bias_activation_fusion"]


def test_fp8_is_in_the_description(monkeypatch):
    from mft_megatron.mcore.model.kernels import describe

    fake_kernels.install(monkeypatch)
    line = describe(*of("--bf16 --transformer-impl transformer_engine --fp8-format hybrid --kv-channels 16"))
    assert "linear layers: Transformer Engine in fp8 (hybrid, delayed); fused: " in line


def test_a_backend_reaches_every_layer_and_transformer_engines_choice(monkeypatch):
    """``fused`` sets Megatron-Core's option, by which it sets environment variables; ``local`` turns all off."""
    from megatron.core.transformer.enums import AttnBackend

    fake_kernels.install(monkeypatch)
    assert of("--bf16 --attention-backend fused")[1].attention_backend == AttnBackend.fused
    assert of("--bf16 --attention-backend flash")[1].attention_backend == AttnBackend.local
    from mft_megatron.mcore.model.layer_spec import block_spec

    arguments, config = of("--bf16 --attention-backend flash")
    monkeypatch.setattr("mft_megatron.mcore.model.layer_spec.get_num_layers_to_build", lambda *others: 4)
    monkeypatch.setattr("mft_megatron.mcore.model.layer_spec.get_transformer_layer_offset", lambda *others: 0)
    for layer in block_spec(config, arguments, None).layer_specs:
        assert layer.submodules.self_attention.submodules.core_attention.params == {"backend": "flash"}
