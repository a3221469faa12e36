"""Showing packs: every sample slice with its text, and the file and line that it was read from."""

import dataclasses
import re
from pathlib import Path

import pytest

from mft_megatron.data.command import inspect_main
from mft_megatron.data.inspect_packs import origin_of, parse_packs, show_packs
from mft_megatron.data.storage.ledger import InputFile, TaskEntry
from mft_megatron.errors import InputError
from tests.refusals import refused

TASK = TaskEntry(
    "task", 7, 7, {}, 70, 30, False, 0, {}, None, None, None, [InputFile("a", 1, 3, ""), InputFile("b", 1, 4, "")]
)


@pytest.mark.parametrize(
    ("number", "changes", "words"),
    [
        (0, {}, "a:1"),
        (2, {}, "a:3"),
        (3, {}, "b:1"),
        (6, {}, "b:4"),
        # two of nine records were left out, and nothing says which
        (2, {"samples_in": 7, "kept": 5, "dropped": {"overlong": 2}}, "one of the lines a:3 to b:2"),
        (4, {"samples_in": 7, "kept": 5, "dropped": {"overlong": 2}}, "one of the lines b:2 to b:4"),
        # two records were split into two samples each
        (4, {"kept": 9, "added": 2}, "one of the lines a:3 to b:2"),
        # a record of a .json file or of parquet is no line
        (4, {"sources": [InputFile("a.parquet", 1, 0, "")]}, "record 5 of a.parquet"),
        (4, {"sources": [InputFile(name, 1, 1, "") for name in "abcd"]}, "record 5 of a … d (4 files)"),
    ],
)
def test_the_origin_of_a_sample_is_named_as_far_as_it_is_known(number, changes, words):
    assert origin_of(dataclasses.replace(TASK, **changes), number) == words


@pytest.fixture
def made(make_dataset):
    """A data set of two tasks packed for 32 tokens, with distinct texts."""
    records = {
        name: [{"prompt": f"{name} number {index} ", "completion": f"gives {index * 7}"} for index in range(12)]
        for name in ("code", "chat")
    }
    return make_dataset(records, seq_length=32, split=(1.0, 0.0, 0.0))


def test_packs_show_every_sample_once_with_its_line(made, capsys):
    prefix, ledger = made
    packs = range(ledger.lengths["32"].packs["train"].packs)
    shown = "\n".join(show_packs(prefix, ledger, packs, None, colour=False))
    for index, task in enumerate(("code", "chat")):
        for number in range(12):
            (found,) = re.findall(rf"── {task}, sample {12 * index + number}: \d+ tokens; (\S+)", shown)
            assert found == f"{ledger.tasks[index].sources[0].path}:{number + 1}"
            # what is at that line of the file is what is shown
            line = Path(found.rpartition(":")[0]).read_text().splitlines()[number]
            assert f"{task} number {number} " in line
            assert f"{task} number {number} ⟦gives {number * 7}" in shown
    inspect_main([str(prefix), "--packs", "0,1", "--seq-length", "32"])
    assert capsys.readouterr().out.count("══ pack ") == 2


def test_packs_that_are_not_there_are_refused(made):
    prefix, ledger = made
    with refused("--packs 99", "has packs 0 to"):
        list(show_packs(prefix, ledger, [99], None, colour=False))
    with refused("--seq-length 64", "is packed for 32"):
        list(show_packs(prefix, ledger, [0], 64, colour=False))
    for words in ("", "1,", "-1", "a"):
        with pytest.raises(InputError, match="give indices of packs"):
            parse_packs(words)
    assert parse_packs("3, 14") == (3, 14)
    with refused("--seq-length has no effect without --packs"):
        inspect_main([str(prefix), "--seq-length", "32"])
