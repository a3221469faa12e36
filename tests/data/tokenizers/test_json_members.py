"""The members before a large one are those that a whole parse finds, and the position is that of its value."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mft_megatron.data.tokenizers.json_members import members_before

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=3), values, max_size=4), values, st.sampled_from([None, 1, "\r\n\t"]))
def test_it_is_a_whole_parse_of_what_comes_before(members, value, indent):
    members.pop("model", None)
    text = json.dumps({**members, "model": value}, indent=indent)
    before, position = members_before(f"[0, {text}]", "model", 4)
    assert before == members
    assert json.JSONDecoder().raw_decode(f"[0, {text}]", position)[0] == value
    assert members_before(text, "other") is None


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"a" 1}', '{"a": 1 "model": 2}', '{"a": {"model": 1}}', '{"mod', "{1: 2}"]
)
def test_no_such_member(text):
    assert members_before(text, "model") is None
