"""Properties of every option: spelling, type, bounds, help, config.yaml, and Megatron's default."""

import ast
import dataclasses
import math
import re
import shlex
import types
import typing
from pathlib import Path

import pytest

from mft_megatron.arguments.command import parse_arguments, read_command_line
from mft_megatron.arguments.groups.config_file import ConfigFileArguments
from mft_megatron.arguments.groups.dry_run import DRY_RUN
from mft_megatron.arguments.megatron_only import MEGATRON_ONLY
from mft_megatron.arguments.reference import markdown
from mft_megatron.arguments.table import GROUPS, Arguments
from mft_megatron.errors import InputError
from mft_megatron.options import build_parser, fill, info_of, out_of_range, spelling, spellings, value_count, value_type
from mft_megatron.options import parse as parse_words
from tests.arguments.command_line import parse
from tests.command_lines import SHORT_RUN

FIELDS = {field.name: (group, field) for _, group in GROUPS for field in dataclasses.fields(group)}
SOURCES = (*DRY_RUN, ("configuration file", ConfigFileArguments), *GROUPS)
NAMES = {name: field for _, group in SOURCES for field in dataclasses.fields(group) for name in spellings(field)}
GOLDEN = Path(__file__).parent.parent / "golden" / "megatron_options.txt"
KINDS = (int, float, bool, str)
BOUNDS = ("at_least", "above", "at_most", "below")
# Values of options with a reader.
OWN_KINDS = {"window_size": "20,0", "rope_scaling": '{"rope_type": "linear", "factor": 2.0}'}


def golden():
    """Return the default of every option of Megatron-LM, by name."""
    lines = [line for line in GOLDEN.read_text().splitlines() if not line.startswith("#")]
    return {name: ast.literal_eval(default) for name, default in (line.split(" ", 1) for line in lines)}


def given(*words):
    return parse_words(build_parser(GROUPS), words, GROUPS)


def words_of(field):
    """Return values that the option accepts, as words of a command line."""
    info, kind = info_of(field), value_type(field)
    if kind is bool:
        return ()
    if info.choices:
        word = info.choices[-1]
    elif kind not in KINDS:
        word = OWN_KINDS.get(field.name, "1")
    else:
        at_least, above, at_most, below = (info.bounds.get(name) for name in BOUNDS)
        low = max((bound for bound in (at_least, above) if bound is not None), default=1)
        word = low + (0 if above is None else 1) if kind is int else low + (0 if above is None else 1e-3)
        assert at_most is None or word <= at_most
        assert below is None or word < below
        word = word if kind in (int, float) else "text"
    return (str(word),) * (value_count(field) or 1)


def test_groups_are_in_the_order_of_the_arguments_and_share_no_name():
    kinds = [field.type for field in dataclasses.fields(Arguments)]
    assert kinds[: len(GROUPS)] == [group for _, group in GROUPS]
    assert len(FIELDS) == sum(len(dataclasses.fields(group)) for _, group in GROUPS)
    spelled = [name for _, group in SOURCES for field in dataclasses.fields(group)
               for name in spellings(field)]  # fmt: skip
    assert len(spelled) == len(set(spelled))
    titles = {title.replace(" ", "_").replace("-", "_") for title, _ in GROUPS}
    assert not titles & FIELDS.keys()


@pytest.mark.parametrize("name", FIELDS)
def test_an_option_is_read_as_its_type(name):
    group, field = FIELDS[name]
    kind, many = value_type(field), value_count(field) is not None
    for spelled in spellings(field):
        value = given(spelled, *words_of(field))[name]
        if kind is bool:
            assert value is (not field.default)
        elif many:
            assert isinstance(value, tuple)
            assert value == tuple(map(kind, words_of(field)))
        else:
            assert value == kind(*words_of(field))
        if kind in KINDS and not many:
            assert type(value) is kind
        assert out_of_range(fill(group, {name: value})) is None
    assert re.fullmatch(r"--[a-z][a-z0-9-]*", spelling(field))
    if field.default is not None and not many:
        assert isinstance(field.default, kind) if kind in KINDS else True


@pytest.mark.parametrize("name", [name for name, (_, field) in FIELDS.items() if value_type(field) is not bool])
def test_a_value_of_the_wrong_type_is_refused(name):
    _, field = FIELDS[name]
    if value_type(field) is str and not info_of(field).choices:
        with pytest.raises(InputError, match="expected"):
            given(spelling(field))
        return
    with pytest.raises(InputError) as refusal:
        given(spelling(field), *["xyzzy"] * (value_count(field) or 1))
    line = str(refusal.value)
    assert spelling(field) in line
    assert "xyzzy" in line
    assert "\n" not in line


BOUNDED = [
    (name, bound)
    for name, (_, field) in FIELDS.items()
    for bound in info_of(field).bounds
    if value_count(field) is None
]


@pytest.mark.parametrize(("name", "kind"), BOUNDED, ids=lambda value: str(value))
def test_bounds_are_checked_and_named(name, kind):
    group, field = FIELDS[name]
    bound, words = info_of(field).bounds[kind], kind.replace("_", " ")
    step = 1 if value_type(field) is int else abs(bound) * 1e-6 or 1e-9
    beyond = {"at_least": bound - step, "above": bound, "at_most": bound + step, "below": bound}[kind]
    within = {"at_least": bound, "above": bound + step, "at_most": bound, "below": bound - step}[kind]
    line = out_of_range(fill(group, {name: beyond}))
    assert line is not None
    assert line.startswith(f"{spelling(field)} {beyond}: must be ")
    assert f"{words} {bound}" in line
    line = out_of_range(fill(group, {name: within}))
    assert line is None or words not in line


@pytest.mark.parametrize("name", [name for name, (_, field) in FIELDS.items() if value_type(field) is float])
def test_numbers_are_finite(name):
    group, field = FIELDS[name]
    if value_count(field) is not None:
        return
    for value in (math.nan, math.inf, -math.inf):
        assert "finite" in out_of_range(fill(group, {name: value}))


def test_help_has_every_option_under_its_group(capsys):
    with pytest.raises(SystemExit) as stop:
        read_command_line(["--help"], more=DRY_RUN)
    assert stop.value.code == 0
    text = capsys.readouterr().out
    places = [text.index(f"\n{title}:\n") for title, _ in SOURCES]
    assert places == sorted(places)
    for (_, group), start, end in zip(SOURCES, places, [*places[1:], len(text)], strict=True):
        for field in dataclasses.fields(group):
            for name in spellings(field):
                assert re.search(rf"{re.escape(name)}[\s,]", text[start:end]), name
            assert info_of(field).text.rstrip().endswith("."), field.name


def test_config_has_every_option():
    a = parse("--mft-loss case4 --task-weights x=2 --hidden-dropout 0")
    options = a.as_options()
    assert list(options) == list(FIELDS)
    assert (options["mft_loss"], options["task_weights"], options["hidden_dropout"]) == ("task-sample", ("x=2",), 0.0)


def test_every_option_of_megatron_is_an_option_or_answered():
    known = golden()
    assert len(known) > 450
    missing = [name for name in known if name not in NAMES and name.replace("_", "-") not in MEGATRON_ONLY]
    assert missing == []
    assert not NAMES.keys() & MEGATRON_ONLY.keys()
    assert MEGATRON_ONLY.keys() <= known.keys()


def test_defaults_are_megatrons_or_the_help_says_otherwise():
    for name, theirs in golden().items():
        field = NAMES.get(name)
        if field is None or "Unlike in Megatron" in info_of(field).text:
            continue
        ours = field.default
        if value_type(field) is bool and (name.startswith(("--no-", "--disable-")) or theirs is None):
            # Megatron gives the value without the switch, where None is off.
            assert theirs in (None, True, False)
            continue
        if name == spelling(field) and info_of(field).flag:
            ours = False
        ours = ours[0] if isinstance(ours, tuple) and not isinstance(theirs, list) else ours
        ours = list(ours) if isinstance(ours, tuple) else ours
        assert ours == theirs, f"{name}: {ours}, Megatron has {theirs}"


def test_options_of_megatrons_are_answered():
    parser = build_parser(GROUPS, MEGATRON_ONLY)
    for name, sentence in MEGATRON_ONLY.items():
        assert len(sentence) > 15
        for word in (name, f"{name}=3", name.replace("-", "_").replace("__", "--", 1)):
            with pytest.raises(InputError) as refusal:
                parse_words(parser, ["--lr", "1", word, "1"], GROUPS)
            assert str(refusal.value) == f"{name}: {sentence}"


def test_answers_name_existing_options():
    of_other_commands = {"--split", "--task-sampling", "--fp8-"}
    for sentence in set(MEGATRON_ONLY.values()):
        for name in re.findall(r"--[a-z0-9-]+", sentence):
            assert name in NAMES or name in of_other_commands or name == "--help", sentence


def test_an_unknown_option_beside_one_of_megatrons():
    with pytest.raises(InputError, match=r"preprocess_data\.py makes the split"):
        parse("--split 98,2,0")
    with pytest.raises(InputError, match="unknown option --splt"):
        parse("--splt 98,2,0")


def test_the_reference_is_up_to_date():
    page = Path(__file__).parent.parent.parent / "docs" / "ARGUMENTS.md"
    assert page.read_text() == markdown(), "make docs"


def test_the_reference_has_every_option_and_what_differs():
    text = markdown()
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| `--")]
    assert {name for row in rows for name in re.findall(r"`(--[^`]*)`", row[0])} == {*NAMES, *MEGATRON_ONLY}
    (row,) = (row for row in rows if row[0] == "| `--eval-iters`")
    assert row[1] == ""
    assert row[3].startswith("The default is the whole validation split")
    assert "0 disables evaluation" in row[2]
    assert all(len(row) in (2, 4) for row in rows)


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_that_may_be_none_says_so_in_its_annotation(name):
    """A default of ``None`` stays only where the annotation allows it; else the option is required or derived."""
    _, field = FIELDS[name]
    info, optional = info_of(field), types.NoneType in typing.get_args(field.type)
    assert optional == (field.default is None and not info.required and not info.derived)
    assert field.default is None or not (info.required or info.derived)


@pytest.mark.parametrize(
    "extra",
    [
        "",
        "--swiglu --bf16",
        "--step-batch-size-schedule '0:2 2K:4'",
        "--group-query-attention --num-query-groups 2 --recompute-activations",
        "--num-experts 4 --disable-bias-linear",
    ],
)
def test_complete_arguments_have_every_required_and_derived_option(extra):
    a = parse_arguments(shlex.split(f"{SHORT_RUN} {extra}"), 1)
    for group in a.groups():
        for field in dataclasses.fields(group):
            value = getattr(group, field.name)
            assert value is not None or types.NoneType in typing.get_args(field.type), field.name
