"""Mock data: lengths as asked for, packed like a real data set; options that have no lengths are refused."""

import numpy as np
import pytest

from mft_megatron.arguments.command import read_command_line
from mft_megatron.arguments.groups.dry_run import DRY_RUN
from mft_megatron.arguments.values.mock_data import mock_task
from mft_megatron.data.loading.dataset import PackedDataset
from mft_megatron.dry_run.mock_data import LEAST_PADDED, MOST_TOKENS, write_mock_data
from mft_megatron.errors import InputError


def drawn(text, count=20000):
    return mock_task(text).lengths(count, np.random.default_rng(7))


def test_lengths_of_each_form(tmp_path):
    assert set(drawn("512", 5)) == {512}
    uniform = drawn("code=uniform:100:300")
    assert (uniform.min(), uniform.max()) == (100, 300)
    assert abs(uniform.mean() - 200) < 2
    lognormal = drawn("lognormal:600:1.2")
    assert abs(lognormal.mean() / 600 - 1) < 0.05
    assert abs(np.log(lognormal).std() / 1.2 - 1) < 0.05
    (tmp_path / "lengths").write_text("10\n20\n30\n")
    assert drawn(f"chat={tmp_path / 'lengths'}", 5).tolist() == [10, 20, 30, 10, 20]
    assert mock_task("code=uniform:100:300").name == "code"


@pytest.mark.parametrize(
    "text", ["", "1", "x=", "no_file", "uniform:5", "uniform:9:3", "lognormal:1:1", "lognormal:9:x"]
)
def test_what_is_no_length_is_refused(text, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError):  # noqa: PT011 (argparse adds the words)
        mock_task(text)


def written(folder, texts, seq_length, num_packs, mode="pack", supervised=1.0):
    write_mock_data(folder / "mock", [mock_task(text) for text in texts], seq_length, num_packs, 500, mode, supervised)
    return PackedDataset.open(folder / "mock", seq_length, "hashes")


def test_full_rows(tmp_path):
    dataset = written(tmp_path, ["64"], 64, 10)
    split = dataset.split("train")
    assert (dataset.vocab_size, dataset.tasks, split.num_packs) == (500, ("task1",), 10)
    assert dataset.split("valid").num_packs == 5
    assert split.totals.tokens_K.tolist() == [10 * 63]


def test_several_tasks_share_rows_and_long_samples_are_cut(tmp_path):
    dataset = written(tmp_path, ["a=uniform:2:40", "200"], 64, 50, supervised=0.25)
    split = dataset.split("train")
    assert dataset.tasks == ("a", "task2")
    assert 45 <= split.num_packs <= 55
    slices = split.slices(slice(None))
    assert slices.lengths.max() == 64
    # a quarter of 64 tokens, all of them targets
    assert split.totals.tokens_K[1] == 16 * split.totals.samples_K[1]
    assert split.totals.samples_K[0] == split.totals.samples_K[1]


def test_a_refused_value_is_named_with_the_reason_and_the_forms():
    with pytest.raises(InputError) as refusal:
        read_command_line("--dry-run --mock-data no_such.txt".split(), more=DRY_RUN)
    assert "--mock-data: no_such.txt: No such file or directory; give [NAME=]N, " in str(refusal.value)


def test_padded_and_joined_rows(tmp_path):
    (tmp_path / "joined").mkdir()
    padded = written(tmp_path, ["uniform:2:40"], 64, 12, "padding")
    assert padded.padded
    # so many that the longest rows are those of a large data set
    assert padded.split("train").num_packs == LEAST_PADDED
    joined = written(tmp_path / "joined", ["uniform:2:40"], 64, 12, "concat")
    assert joined.joined
    assert 10 <= joined.split("train").num_packs <= 13


def test_very_large_batches_use_rows_again(tmp_path):
    split = written(tmp_path, ["4096"], 4096, 10**7).split("train")
    assert 4096 * split.num_packs <= MOST_TOKENS


def test_names_are_different(tmp_path):
    with pytest.raises(InputError, match="--mock-data task2=…: two tasks"):
        written(tmp_path, ["task2=64", "64"], 64, 4)
