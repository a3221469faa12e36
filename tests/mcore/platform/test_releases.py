"""Differences between releases of Megatron-Core, each handled in both forms whatever is installed."""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

import dataclasses
import functools
import logging

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec

from mft_megatron.mcore.platform import releases
from mft_megatron.mcore.platform.releases import accepted, submodules_of


@dataclasses.dataclass
class _Submodules:
    linear_fc1: str = "linear"


def test_submodules_of_a_specification_and_of_a_partial():
    specification = ModuleSpec(object, submodules=_Submodules())
    partial = functools.partial(object, submodules=_Submodules())
    for spec in (specification, partial):
        submodules_of(spec).linear_fc1 = "quantised"
    assert specification.submodules.linear_fc1 == partial.keywords["submodules"].linear_fc1 == "quantised"


def test_submodules_of_megatrons_layer():
    dense, experts = (get_gpt_layer_local_spec(num_experts=count).submodules for count in (None, 4))
    assert hasattr(submodules_of(dense.self_attention), "linear_qkv")
    assert hasattr(submodules_of(dense.mlp), "linear_fc1")
    assert hasattr(submodules_of(experts.mlp), "experts")


def test_only_accepted_options_are_passed():
    def save(state, async_strategy="nvrx"):
        return async_strategy

    assert accepted(save, async_strategy="mcore", common_strategy=None) == {"async_strategy": "mcore"}


def test_notices_that_no_user_can_follow_are_left_out(caplog):
    for name, words in releases._NOTICES.items():
        logging.getLogger(name).warning(f"{words} and will be removed")
        logging.getLogger(name).warning(f"another matter of {name}")
    assert caplog.messages == [f"another matter of {name}" for name in releases._NOTICES]
