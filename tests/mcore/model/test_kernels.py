"""Fused operations of a run, and the line about its kernels in the log."""

import sys
import types

import pytest
import torch

from tests import fake_kernels, fake_products
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


def on_cuda(monkeypatch, release, apex):
    """Seem to have an H100 with a release of torch, with or without apex's kernel."""
    fake_kernels.install(monkeypatch)
    fake_products.install(monkeypatch, release)
    module = types.ModuleType("apex's kernel") if apex else None
    monkeypatch.setitem(sys.modules, "fused_weight_gradient_mlp_cuda", module)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
@pytest.mark.parametrize(
    ("extra", "fused_there"),
    [("", "nothing"), ("--bf16", "sums of gradients in fp32"), ("--bf16 --no-gradient-accumulation-fusion", "nothing")],
)
def test_on_the_cpu(extra, fused_there):
    from mft_megatron.mcore.model.kernels import describe

    arguments, config = of(extra)
    assert fused(config) == [False, False, fused_there != "nothing"]
    assert describe(arguments, config) == f"attention: local; linear layers: Megatron-Core; fused: {fused_there}"


@pytest.mark.parametrize(
    ("extra", "expected", "words"),
    [
        ("", [True, True, True], "bias and SwiGLU, bias and dropout, sums of gradients in fp32"),
        ("--no-bias-swiglu-fusion", [False, True, True], "bias and dropout, sums of gradients in fp32"),
        ("--no-bias-dropout-fusion", [True, False, True], "bias and SwiGLU, sums of gradients in fp32"),
        ("--no-gradient-accumulation-fusion", [True, True, False], "bias and SwiGLU, bias and dropout"),
        ("--grad-reduce-in-bf16", [True, True, True], "bias and SwiGLU, bias and dropout, sums of gradients"),
    ],
)
def test_on_cuda(monkeypatch, extra, expected, words):
    from mft_megatron.mcore.model.kernels import describe

    on_cuda(monkeypatch, "2.10", apex=False)
    arguments, config = of(f"--bf16 {extra}")
    assert fused(config) == expected
    line = describe(arguments, config)
    assert line.startswith("attention: flash; linear layers: Megatron-Core; fused: bias and ")
    assert line.endswith(f"fused: {words}")


@pytest.mark.parametrize(
    ("release", "apex", "words"),
    [
        ("2.10", True, "sums of gradients in fp32"),
        ("2.8", True, "sums of gradients in fp32 (apex)"),
        ("2.8", False, "sums of gradients in fp32, by a second operation (torch 2.10 needs one)"),
        ("2.6", False, "sums of gradients rounded to 16 bits before they are added (torch 2.8 keeps fp32)"),
    ],
)
def test_sums_of_gradients_with_older_torch(monkeypatch, release, apex, words):
    """Fused with every release; apex is taken only where torch needs two operations."""
    from mft_megatron.mcore.model.kernels import describe

    on_cuda(monkeypatch, release, apex)
    arguments, config = of("--bf16")
    assert config.gradient_accumulation_fusion
    assert describe(arguments, config).endswith(f"bias and dropout, {words}")


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("", ""),
        ("--position-embedding-type rope", "rotary embedding: "),
        ("--apply-layernorm-1p", "norms: "),
        ("--position-embedding-type rope --normalization RMSNorm --apply-layernorm-1p", "rotary embedding and norms: "),
    ],
)
@pytest.mark.parametrize(
    ("obstacle", "how"),
    [(None, "Triton; "), ("no gcc", "PyTorch's operators, since Triton cannot run (no gcc); ")],
)
def test_kernels_in_triton(monkeypatch, extra, words, obstacle, how):
    from mft_megatron.mcore.kernels import triton_support
    from mft_megatron.mcore.model.kernels import describe

    on_cuda(monkeypatch, "2.10", apex=False)
    monkeypatch.setattr(triton_support, "obstacle", lambda device: obstacle)
    line = describe(*of(f"--bf16 {extra}"))
    assert f"attention: flash; {words}{how if words else ''}linear layers: " in line


def test_a_norm_without_a_kernel_of_torch(monkeypatch):
    """RMSNorm is in Triton where torch is older than 2.9."""
    from mft_megatron.mcore.kernels import triton_support
    from mft_megatron.mcore.model import kernels

    on_cuda(monkeypatch, "2.10", apex=False)
    monkeypatch.setattr(triton_support, "obstacle", lambda device: None)
    for has_kernel in (False, True):
        monkeypatch.setattr(kernels, "has_torchs_kernel", lambda has_kernel=has_kernel: has_kernel)
        assert ("; norms: Triton" in kernels.describe(*of("--bf16 --normalization RMSNorm"))) != has_kernel


def test_gelu_is_not_fused(monkeypatch):
    from mft_megatron.arguments.command import parse_arguments
    from mft_megatron.mcore.model.kernels import fusions

    fake_kernels.install(monkeypatch)
    arguments = parse_arguments(BASE.removesuffix(" --swiglu").split())
    assert not fusions(arguments)["bias_activation_fusion"]


def test_fp8_is_in_the_description(monkeypatch):
    from mft_megatron.mcore.model.kernels import describe

    on_cuda(monkeypatch, "2.6", apex=False)
    line = describe(*of("--bf16 --transformer-impl transformer_engine --fp8-format hybrid --kv-channels 16"))
    assert "linear layers: Transformer Engine in fp8 (hybrid, delayed); fused: " in line
    assert line.endswith("bias and dropout, sums of gradients in fp32")  # Transformer Engine's, with any torch


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


@pytest.mark.parametrize(("extra", "expected"), [("", False), ("--deterministic-mode", True)])
def test_megatron_is_told_to_be_deterministic_on_cuda(monkeypatch, extra, expected):
    """Its embedding then takes rows by index, whose gradient has a deterministic algorithm."""
    fake_kernels.install(monkeypatch)
    assert of(f"--bf16 {extra}")[1].deterministic_mode == expected


def test_ranks_agree_before_a_stage_is_built(monkeypatch):
    """Each rank takes part, also one whose stage has no layer, and only then chooses the kernels of its layers."""
    from mft_megatron.mcore.model import gpt

    done = []
    arguments, _ = of("--window-size 8,0 --attention-dropout 0.25")
    monkeypatch.setattr(gpt, "choose_compiler", lambda arguments: done.append("compiler and Triton"))
    monkeypatch.setattr(gpt, "agree", lambda *words: done.append(words))
    monkeypatch.setattr(gpt, "_build_chunk", lambda *words: done.append("stage"))
    monkeypatch.setattr(gpt, "wrap", lambda arguments, stages: stages)
    gpt.build_model(arguments, 128)
    shape = gpt.shape_of(gpt.transformer_config(arguments), 0.25)
    assert (shape.window, shape.dropout) == (8, 0.25)
    assert done == ["compiler and Triton", ("auto", shape), "stage"]
