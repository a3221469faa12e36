"""Options of attention kernels, Transformer Engine, fp8 and fusions, as far as no device is needed."""

import pytest

from tests.arguments.command_line import parse
from tests.refusals import refused

FP8 = "--fp8-format hybrid --bf16 --transformer-impl transformer_engine"


def test_defaults():
    a = parse()
    assert (a.training.attention_backend, a.transformer_engine.transformer_impl) == ("auto", "local")
    assert a.transformer_engine.fp8_format is None
    assert set(vars(a.fusions).values()) == {True}
    assert set(vars(parse("--no-bias-dropout-fusion --no-gradient-accumulation-fusion").fusions).values()) == {
        True,
        False,
    }
    assert not parse("--swiglu --no-bias-swiglu-fusion").fusions.bias_swiglu_fusion


@pytest.mark.parametrize(
    "extra",
    [
        "--attention-backend local",
        "--attention-backend flash --bf16",
        "--attention-backend flash --fp16 --kv-channels 12",
        "--attention-backend flash --bf16 --window-size 5,0",
        "--attention-backend varlen --bf16 --attention-dropout 0",
        "--attention-backend fused --bf16",
        "--attention-backend fused --bf16 --attention-dropout 0 --window-size 5,0",
        "--attention-backend fused --bf16 --window-size=-1,0",
    ],
)
def test_backends_that_work_on_some_device(extra):
    assert parse(extra).training.attention_backend == extra.split()[1]


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        ("--attention-backend flash", "flash computes in bf16 or fp16, not in fp32; give --bf16"),
        ("--attention-backend varlen --bf16", "varlen has no dropout, and --attention-dropout is 0.1"),
        (
            "--attention-backend varlen --bf16 --attention-dropout 0 --kv-channels 12",
            "multiple of 8, and --kv-channels is 12",
        ),
        ("--attention-backend fused --bf16 --kv-channels 12", "multiple of 8, and --kv-channels is 12"),
        ("--attention-backend flash --bf16 --kv-channels 264", "heads of up to 256, and --kv-channels is 264"),
        ("--attention-backend fused --bf16 --window-size 5,0", "no dropout with --window-size"),
        ("--attention-backend unfused", "packs are streams without one; use local"),
        ("--attention-backend sdpa", "invalid choice: 'sdpa'"),
    ],
)
def test_backends_that_work_on_no_device(extra, text):
    with refused(text):
        parse(extra)


def test_fused_has_no_dropout_under_context_parallelism():
    layout = "--context-parallel-size 2 --bf16 --attention-backend fused"
    with refused("no dropout with --context-parallel-size"):
        parse(layout, 2)
    assert parse(f"{layout} --attention-dropout 0", 2).training.attention_backend == "fused"


def test_fp8_options():
    e = parse(
        f"{FP8} --fp8-margin 1 --fp8-amax-history-len 16 --fp8-amax-compute-algo max --no-fp8-wgrad"
    ).transformer_engine
    assert (e.fp8_format, e.fp8_recipe, e.fp8_margin) == ("hybrid", "delayed", 1)
    assert (e.fp8_amax_history_len, e.fp8_amax_compute_algo, e.fp8_wgrad) == (16, "max", False)
    first = parse(f"{FP8} --fp8-recipe tensorwise --first-last-layers-bf16 --num-layers-at-end-in-bf16 2")
    assert first.transformer_engine.num_layers_at_end_in_bf16 == 2


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        ("--fp8-format hybrid --transformer-impl transformer_engine", "has bf16 around it, and this run is fp32"),
        ("--fp8-format e4m3 --bf16", "give --transformer-impl transformer_engine"),
        ("--fp8-format e5m2", "invalid choice"),
        ("--fp8-param-gather", "leave it out"),
        ("--fp8-margin 1", "--fp8-margin has no effect without --fp8-format"),
        ("--fp8-recipe delayed", "--fp8-recipe has no effect without --fp8-format"),
        (f"{FP8} --fp8-recipe tensorwise --fp8-margin 1", "no effect without --fp8-recipe delayed"),
        (f"{FP8} --num-layers-at-start-in-bf16 2", "no effect without --first-last-layers-bf16"),
        (f"{FP8} --first-last-layers-bf16", "does not go with --fp8-recipe delayed"),
        (
            f"{FP8} --fp8-recipe tensorwise --first-last-layers-bf16 --num-layers-at-start-in-bf16 5",
            "at-start-in-bf16 5 is more than the 4 layers of a pipeline stage",
        ),
        (f"{FP8} --hidden-size 72", "multiples of 16, and --hidden-size 72"),
        (f"{FP8} --ffn-hidden-size 72", "multiples of 16, and --ffn-hidden-size 72"),
        (f"{FP8} --kv-channels 10", "--kv-channels 10 / --tensor-model-parallel-size 1 = 40 is none"),
        (
            f"{FP8} --kv-channels 8 --group-query-attention",
            "--num-query-groups 1 × --kv-channels 8 / --tensor-model-parallel-size 1 = 8 is none",
        ),
        (f"{FP8} --seq-length 100 --micro-batch-size 1", "--seq-length 100 / 1 ranks that split it = 100 is none"),
        (f"{FP8} --fp8-recipe mxfp8 --ffn-hidden-size 48", "multiples of 32, and --ffn-hidden-size 48"),
        (
            f"{FP8} --disable-bias-linear --num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 40",
            "--moe-ffn-hidden-size 40 / expert-tensor size 1 = 40 is none",
        ),
        ("--no-bias-swiglu-fusion", "--no-bias-swiglu-fusion has no effect without --swiglu"),
    ],
)
def test_refused(extra, text):
    with refused(text):
        parse(extra)


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        ("--ffn-hidden-size 40", "--ffn-hidden-size 40 / --tensor-model-parallel-size 2 = 20 is none"),
        ("--seq-length 24 --micro-batch-size 1 --sequence-parallel", "--seq-length 24 / 2 ranks that split it = 12"),
    ],
)
def test_fp8_sizes_are_those_of_a_rank(extra, text):
    with refused(text):
        parse(f"{FP8} --tensor-model-parallel-size 2 {extra}", 2)
