"""--transformer-impl transformer_engine: Megatron-Core's wrappers around a stand-in for Transformer Engine's layers.

They train as local layers do, from the same weights, and either loads the other's checkpoints.
"""

import json
from pathlib import Path

import pytest
import torch

from mft_megatron.errors import InputError
from tests import fake_kernels
from tests.command_lines import SHORT_RUN
from tests.ranks import run_tool, torchrun

SCRIPT = Path(__file__).parent / "layers_of_transformer_engine.py"
WITH_BIASES = "--normalization LayerNorm --disable-bias-linear --add-attention-bias --add-mlp-bias --qk-layernorm"


def found(process):
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(next(line for line in process.stdout.splitlines() if line.startswith("FOUND "))[6:])


def check(result, tolerance=1e-6):
    local, engine = result["local"], result["transformer_engine"]
    assert local["modules"] == ["ColumnParallelLinear", "RowParallelLinear"]
    assert engine["modules"] == ["TELayerNormColumnParallelLinear", "TERowParallelLinear"]
    assert local["core"] == engine["core"] == "PackedAttention"
    assert local["keys"] == engine["keys"]
    assert local["parameters"] == engine["parameters"]
    for ours, theirs in zip(
        [*engine["curve"], engine["third"], engine["third of the other's"], local["third of the other's"]],
        [*local["curve"], *[local["third"]] * 3],
        strict=True,
    ):
        assert ours == pytest.approx(theirs, rel=tolerance)


@pytest.mark.parametrize("options", [pytest.param("", marks=pytest.mark.slow), WITH_BIASES])
def test_layers_and_checkpoints_are_those_of_the_local_ones(dataset_prefix, tmp_path, options):
    check(found(run_tool("-W", "ignore", SCRIPT, dataset_prefix, tmp_path, *options.split())))


@pytest.mark.parametrize(
    "options",
    ["--bf16 --overlap-grad-reduce", pytest.param("--fp16 --initial-loss-scale 1024", marks=pytest.mark.slow)],
)
def test_they_add_gradients_of_weights_to_their_sums_themselves(dataset_prefix, tmp_path, options):
    """The norm of gradients would be NaN if the tensors that stand for them were added, and double if both were."""
    result = found(run_tool("-W", "ignore", SCRIPT, dataset_prefix, tmp_path, *options.split()))
    assert result["transformer_engine"]["fused"] is result["local"]["fused"] is True
    check(result, 5e-3)


@pytest.mark.slow
def test_experts_too(dataset_prefix, tmp_path):
    options = "--num-experts 4 --moe-router-topk 2"
    check(found(run_tool("-W", "ignore", SCRIPT, dataset_prefix, tmp_path, *options.split())))


@pytest.mark.slow
def test_under_tensor_and_sequence_parallelism(dataset_prefix, tmp_path):
    options = f"{WITH_BIASES} --tensor-model-parallel-size 2 --sequence-parallel"
    check(found(torchrun(2, SCRIPT, dataset_prefix, tmp_path, *options.split())))


BASE = f"{SHORT_RUN} --bf16"


def arguments_for(extra):
    from mft_megatron.arguments.command import parse_arguments

    return parse_arguments(f"{BASE} --transformer-impl transformer_engine {extra}".split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_refused_without_cuda():
    from mft_megatron.mcore.model.transformer_engine import require

    with pytest.raises(InputError, match=r"^--transformer-impl transformer_engine needs a CUDA device.*local$"):
        require(arguments_for(""))


@pytest.mark.parametrize(
    ("version", "extra", "capability", "text"),
    [
        (None, "", (9, 0), "which is not installed: pip install .*; or use --transformer-impl local"),
        ("2.3", "", (9, 0), "needs transformer-engine 2.9 or newer, and 2.3 is installed"),
        ("2.11.0", "--fp8-format hybrid", (8, 0), "delayed needs compute capability 8.9, and this GPU has 8.0"),
        ("2.11.0", "--fp8-format e4m3 --fp8-recipe mxfp8", (9, 0), "mxfp8 needs compute capability 10.0"),
    ],
)
def test_refused_where_it_cannot_work(monkeypatch, version, extra, capability, text):
    from mft_megatron.mcore.model.transformer_engine import require

    fake_kernels.install(monkeypatch, {"transformer_engine": version})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    with pytest.raises(InputError, match=text) as refused:
        require(arguments_for(extra))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("extra", "capability"),
    [
        ("", (7, 0)),
        ("--fp8-format hybrid", (8, 9)),
        ("--fp8-format hybrid --fp8-recipe blockwise", (9, 0)),
        ("--fp8-format hybrid --fp8-recipe mxfp8 --seq-length 128 --ffn-hidden-size 256", (10, 0)),
    ],
)
def test_accepted_where_it_can(monkeypatch, extra, capability):
    from mft_megatron.mcore.model.transformer_engine import require

    fake_kernels.install(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    require(arguments_for(extra))


@pytest.mark.filterwarnings("ignore:full scope is deprecated")
def test_fp8_reaches_megatrons_configuration():
    from mft_megatron.mcore.model.config import transformer_config

    config = transformer_config(arguments_for(""))
    assert (config.fp8, config.transformer_impl) == (None, "transformer_engine")
    extra = "--fp8-format hybrid --fp8-margin 2 --fp8-amax-history-len 7 --fp8-amax-compute-algo max --no-fp8-wgrad"
    config = transformer_config(arguments_for(extra))
    assert (config.fp8, config.fp8_recipe, config.fp8_margin, config.fp8_amax_history_len) == (
        *("hybrid", "delayed", 2, 7),
    )
    assert (config.fp8_amax_compute_algo, config.fp8_wgrad, config.fp8_param) == ("max", False, False)
    extra = "--fp8-format e4m3 --fp8-recipe tensorwise --first-last-layers-bf16 --num-layers-at-start-in-bf16 0"
    config = transformer_config(arguments_for(extra))
    assert (config.first_last_layers_bf16, config.num_layers_at_start_in_bf16) == (True, 0)
