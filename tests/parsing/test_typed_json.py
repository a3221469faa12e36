"""JSON becomes dataclasses only if every key is known and every value has its field's type."""

import dataclasses
from typing import Any

import pytest

from mft_megatron.parsing.typed_json import from_json, parse_json


@dataclasses.dataclass(frozen=True)
class Inner:
    size: int
    parts: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Outer:
    name: str
    rate: float
    files: list[Inner]
    by_name: dict[str, Inner]
    anything: dict[str, Any]
    note: str | None = None


WHOLE = {
    "name": "a",
    "rate": 1,
    "files": [{"size": 2}],
    "by_name": {"x": {"size": 3, "parts": [4]}},
    "anything": {"b": []},
}


def test_values_are_read():
    outer = Outer("a", 1.0, [Inner(2)], {"x": Inner(3, (4,))}, {"b": []})
    assert from_json(Outer, WHOLE) == outer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 3}, "Expected `str`, got `int`"),
        ({"rate": "1"}, "Expected `float`, got `str`"),
        ({"files": [{"size": True}]}, "Expected `int`, got `bool`"),
        ({"files": [{"size": 2.5}]}, "Expected `int`, got `float`"),
        ({"files": {}}, "Expected `array`, got `object`"),
        ({"by_name": {"x": {}}}, "missing required field `size`"),
        ({"note": 0}, "Expected `str | null`, got `int`"),
        ({"more": 1}, "unknown key more"),
        ({"anything": {"n": [2**63]}}, r"anything\.n\.0 is a number of more than 64 bits"),
        ({"files": [{"size": 1}, {"size": 1, "more": 1}]}, r"unknown key files\.1\.more"),
        ({"by_name": {"x": {"size": 1, "more": 1}}}, r"unknown key by_name\.x\.more"),
    ],
)
def test_others_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        from_json(Outer, {**WHOLE, **change})


@pytest.mark.parametrize("content", [[], 3, "text", None])
def test_only_objects_become_dataclasses(content):
    with pytest.raises(ValueError, match="Expected `object`"):
        from_json(Outer, content)


def test_deep_nesting_is_no_crash(tmp_path):
    file = tmp_path / "deep.json"
    file.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json(file)
