"""A checkpoint whose architecture has fields of a newer version is refused by every reader, in one line."""

from pathlib import Path

import pytest

from mft_megatron.arguments.groups.network import NetworkArguments, stored_network
from mft_megatron.convert.huggingface.stored_model import CheckpointModel
from mft_megatron.convert.peft.adapted_weights import family_of_info
from mft_megatron.convert.peft.merge import refuse_other_model
from mft_megatron.run_folder.description import CheckpointInfo, CheckpointRef
from tests.refusals import refused

SHAPE = {"num_layers": 2, "hidden_size": 8, "num_attention_heads": 2}
NEWER = CheckpointInfo(
    7, 1, {**SHAPE, "a_new_field": 1, "another": None}, 9, {}, "hash", 1, 1, source="LlamaForCausalLM"
)


@pytest.mark.parametrize(
    "read",
    [
        lambda: CheckpointModel(CheckpointRef(Path("run/iter_0000007"), NEWER)),
        lambda: family_of_info(NEWER),
        lambda: refuse_other_model(None, NEWER, "the model"),
    ],
)
def test_fields_of_a_newer_version_are_named(read):
    with refused(
        "its architecture has a_new_field, another, which this version does not know; a newer version made it"
    ):
        read()


def test_fields_that_an_earlier_version_did_not_write_have_their_defaults():
    assert stored_network(SHAPE, "it") == NetworkArguments(**SHAPE)
