"""Options of a mixture of experts: accepted, derived and refused ones."""

import dataclasses
import json

import pytest

from mft_megatron.arguments.values.layer_pattern import layer_frequency
from mft_megatron.run_folder.description import CheckpointInfo, write_info
from mft_megatron.run_folder.names import INFO, TRACKER, iteration_folder
from tests.arguments.command_line import parse, resumed
from tests.refusals import refused

BASE = "--ffn-hidden-size 96 --micro-batch-size 1"
EXPERTS = "--num-experts 4"
BALANCING = "--moe-router-load-balancing-type"
SHARED = "--moe-shared-expert-intermediate-size"


def parsed(words, world=1):
    """Parse a command line without biases, which experts cannot have."""
    return parse(f"{BASE} --disable-bias-linear {words}", world)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("2", 2),
        ("[0]+[1]*3", "[0,1,1,1]"),
        ("([1]*1+[0]*1)*2", "[1,0,1,0]"),
        ("[1, 0, 1, 0]", "[1,0,1,0]"),
    ],
)
def test_layer_frequency(text, value):
    assert layer_frequency(text) == layer_frequency(value) == value


@pytest.mark.parametrize("text", ["0", "-1", "[2,0]", "[1]*[0]", "print(1)", "[", "1.5", "[1]*99999999999"])
def test_no_layer_frequency(text):
    with pytest.raises(ValueError, match=r"number|below 1|0 and 1"):
        layer_frequency(text)
    with refused("--moe-layer-freq"):
        parsed(f"{EXPERTS} --moe-layer-freq {text}")


def test_which_layers_have_experts():
    assert parsed("").network.expert_layers == (False,) * 4
    assert parsed(EXPERTS).network.expert_layers == (True,) * 4
    assert parsed(f"{EXPERTS} --moe-layer-freq 3").network.expert_layers == (True, False, False, True)
    assert parsed(f"{EXPERTS} --moe-layer-freq [0]+[1]*3").network.expert_layers == (False, True, True, True)


def test_defaults_are_megatrons():
    from mft_megatron.mcore.model.config import (
        transformer_config,  # first, for it readies Megatron-Core for this machine
    )

    from megatron.core.transformer.transformer_config import TransformerConfig  # isort: skip

    ours = transformer_config(parsed(f"{EXPERTS} --moe-ffn-hidden-size 48"))
    for field in dataclasses.fields(TransformerConfig):
        if field.name.startswith("moe_") and field.name != "moe_ffn_hidden_size":
            assert getattr(ours, field.name) == field.default, field.name
    assert (ours.num_moe_experts, ours.moe_ffn_hidden_size, ours.ffn_hidden_size) == (4, 48, 96)


def test_every_option_reaches_megatron():
    from mft_megatron.mcore.model.config import transformer_config

    words = {
        "moe_ffn_hidden_size": 48,
        "moe_router_topk": 4,
        "moe_router_score_function": "sigmoid",
        "moe_router_topk_scaling_factor": 2.5,
        "moe_router_num_groups": 2,
        "moe_router_group_topk": 2,
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 0.01,
        "moe_shared_expert_intermediate_size": 32,
        "moe_shared_expert_gate": True,
        "moe_shared_expert_overlap": True,
        "moe_z_loss_coeff": 0.1,
        "moe_input_jitter_eps": 0.2,
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": "alltoall",
        "moe_expert_capacity_factor": 1.5,
        "moe_pad_expert_input_to_capacity": True,
        "moe_token_drop_policy": "position",
    }
    options = (f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}") for name, value in words.items())
    config = transformer_config(
        parsed(
            f"{EXPERTS} {' '.join(options)} --moe-layer-freq [0]+[1]*3 {BALANCING} aux_loss seq_aux_loss "
            "--moe-aux-loss-coeff 0.1 0.2"
        )
    )
    assert {name: getattr(config, name) for name in words} == words
    assert config.moe_layer_freq == [0, 1, 1, 1]
    assert config.moe_router_load_balancing_type == ["aux_loss", "seq_aux_loss"]
    assert config.moe_aux_loss_coeff == [0.1, 0.2]
    layout = transformer_config(
        parsed(
            f"{EXPERTS} --tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2 "
            "--expert-tensor-parallel-size 1",
            2,
        )
    )
    assert (layout.expert_model_parallel_size, layout.expert_tensor_parallel_size) == (2, 1)
    assert transformer_config(parsed(f"{EXPERTS} --moe-router-pre-softmax")).moe_router_pre_softmax
    assert transformer_config(parsed(f"{EXPERTS} --moe-expert-capacity-factor -1")).moe_expert_capacity_factor is None


def test_an_expert_is_as_large_as_an_mlp():
    assert parsed(EXPERTS).network.moe_ffn_hidden_size == 96
    assert parsed("").network.moe_ffn_hidden_size is None


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--moe-router-topk 4", "--moe-router-topk has no effect without --num-experts"),
        ("--moe-z-loss-coeff 1e-3", "--moe-z-loss-coeff has no effect without --num-experts"),
        (f"{EXPERTS} --moe-layer-freq [0,1]", "names 2 layers, --num-layers is 4"),
        (f"{EXPERTS} --moe-layer-freq [0]*4", "no layer has experts"),
        (f"{EXPERTS} --moe-router-topk 5", "--moe-router-topk 5 is more than --num-experts 4"),
        (f"{EXPERTS} --moe-router-topk 1", "add --moe-router-pre-softmax"),
        (f"{EXPERTS} --moe-router-enable-expert-bias", "--moe-router-score-function sigmoid; add that"),
        (f"{EXPERTS} --moe-router-score-function sigmoid --moe-router-pre-softmax", "--moe-router-pre-softmax has no"),
        (f"{EXPERTS} --moe-router-bias-update-rate 0.1", "without --moe-router-enable-expert-bias"),
        (f"{EXPERTS} --moe-shared-expert-gate", "has nothing to gate"),
        (f"{EXPERTS} --moe-shared-expert-overlap", f"--moe-shared-expert-overlap without {SHARED}"),
        (f"{EXPERTS} {SHARED} 32 --moe-shared-expert-overlap", "needs --moe-token-dispatcher-type alltoall"),
        (f"{EXPERTS} --moe-router-num-groups 2", "go together"),
        (f"{EXPERTS} --moe-router-num-groups 3 --moe-router-group-topk 1", "3 does not divide --num-experts 4"),
        (f"{EXPERTS} --moe-router-num-groups 2 --moe-router-group-topk 3", "3 is more than --moe-router-num-groups 2"),
        (
            f"{EXPERTS} --moe-router-topk 3 --moe-router-num-groups 2 --moe-router-group-topk 1",
            "more than the 2 experts of --moe-router-group-topk 1 groups",
        ),
        (
            f"{EXPERTS} --moe-router-topk 3 --moe-router-num-groups 4 --moe-router-group-topk 2",
            "--moe-router-group-topk 2 does not divide --moe-router-topk 3",
        ),
        (f"{EXPERTS} {BALANCING} aux_loss none", "none and sinkhorn stand alone"),
        (f"{EXPERTS} {BALANCING} aux_loss aux_loss --moe-aux-loss-coeff 1 1", "one of them twice"),
        (f"{EXPERTS} {BALANCING} aux_loss seq_aux_loss --moe-aux-loss-coeff 0.1", "has 1 numbers"),
        (f"{EXPERTS} {BALANCING} none --moe-aux-loss-coeff 0.1", "has no effect with"),
        (f"{EXPERTS} {BALANCING} sinkhorn --moe-aux-loss-coeff 0.1", "has no effect with"),
        (f"{EXPERTS} --moe-aux-loss-coeff -0.1", "must be at least 0"),
        (f"{EXPERTS} --moe-aux-loss-coeff inf", "must be at least 0 and finite"),
        (f"{EXPERTS} --moe-aux-loss-coeff nan", "must be at least 0 and finite"),
        (f"{EXPERTS} --moe-token-dispatcher-type flex", "needs DeepEP"),
        (f"{EXPERTS} --moe-grouped-gemm", "--moe-grouped-gemm is not supported"),
        (f"{EXPERTS} --moe-permute-fusion", "--moe-permute-fusion needs Transformer Engine"),
        (f"{EXPERTS} --moe-expert-capacity-factor 0", "no expert would take a token"),
        (f"{EXPERTS} --moe-pad-expert-input-to-capacity", "needs --moe-expert-capacity-factor"),
        (f"{EXPERTS} --moe-token-drop-policy position", "without --moe-expert-capacity-factor"),
        (f"{EXPERTS} {BALANCING} sinkhorn --moe-expert-capacity-factor 1", "does not go with"),
        (f"{EXPERTS} {BALANCING} other", "invalid choice: 'other'"),
        ("--num-experts 0", "--num-experts 0: must be at least 1"),
    ],
)
def test_refused(words, line):
    with refused(line):
        parsed(words)


def test_experts_have_no_bias():
    with refused("add --disable-bias-linear"):
        parse(f"{BASE} {EXPERTS}")


@pytest.mark.parametrize(
    ("world", "words", "line"),
    [
        (2, "--expert-model-parallel-size 2", "--expert-model-parallel-size 2 without --num-experts"),
        (1, "--expert-tensor-parallel-size 1", "--expert-tensor-parallel-size 1 without --num-experts"),
        (3, f"{EXPERTS} --expert-model-parallel-size 3", "3 does not divide --num-experts 4"),
        (3, f"{EXPERTS} --expert-model-parallel-size 2", "= 2; start a multiple of that with torchrun"),
        (2, f"{EXPERTS} --tensor-model-parallel-size 2", "needs --sequence-parallel"),
        (
            2,
            f"{EXPERTS} --expert-tensor-parallel-size 2 --moe-ffn-hidden-size 49",
            "--expert-tensor-parallel-size 2 does not divide --moe-ffn-hidden-size 49",
        ),
        (
            2,
            f"{EXPERTS} --tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 1 --fp16",
            "a separate loss scale",
        ),
        (
            2,
            f"{EXPERTS} --tensor-model-parallel-size 2 --sequence-parallel {SHARED} 33",
            f"--tensor-model-parallel-size 2 does not divide {SHARED} 33",
        ),
    ],
)
def test_parallel_layouts_that_are_refused(world, words, line):
    with refused(line):
        parsed(f"{words} --global-batch-size 6", world)


@pytest.mark.parametrize("words", ["", f"{EXPERTS} --moe-layer-freq [0]+[1]*3 {SHARED} 32 --moe-shared-expert-gate"])
def test_the_shape_is_in_the_checkpoint(tmp_path, words):
    """The checkpoint of a dense model gives no option of experts."""
    network = parsed(words).network
    info = CheckpointInfo(0, 0, dataclasses.asdict(network), 500, {}, "", 1234, 1, 0, False, False)
    folder = iteration_folder(tmp_path, 0)
    folder.mkdir()
    write_info(folder, info)
    assert json.loads((folder / INFO).read_text())["architecture"]["num_experts"] == network.num_experts
    (tmp_path / TRACKER).write_text("0\n")
    assert resumed(f"--finetune --load {tmp_path}").network == network
    with refused("--num-experts"):
        resumed(f"--finetune --load {tmp_path} --num-experts 8")
