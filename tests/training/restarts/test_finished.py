"""A run that is finished, told from its folder, when its first command is given again."""

import pytest

from mft_megatron.arguments.command import read_command_line
from mft_megatron.arguments.groups.checkpointing import CheckpointArguments
from mft_megatron.exit_codes import FINISHED, LEFT
from mft_megatron.run_folder.outcome import record_outcome
from mft_megatron.training.restarts import finished as module
from mft_megatron.training.restarts.differences import options_of
from mft_megatron.training.restarts.finished import continued, is_over
from tests.arguments.command_line import checkpoint, resumed
from tests.command_lines import SHORT_RUN


class OfHash:
    """A ledger whose data set has the same hash for every length."""

    def __init__(self, text):
        self.text = text

    def dataset_hash(self, seq_length):
        return self.text


@pytest.mark.parametrize(
    ("of_run", "again", "data", "outcome", "over"),
    [
        ("--train-iters 5", "--train-iters 5", "abc", None, True),
        ("--train-iters 5", "--train-iters 5 --save-hf X --log-interval 7", "abc", None, True),
        ("--train-iters 5", "--train-iters 5 --lr 2", "abc", None, False),
        ("--train-iters 5", "--train-iters 5", "other", None, False),
        ("--train-iters 9", "--train-iters 9", "abc", None, False),
        ("--train-iters 9", "--train-iters 9", "abc", (FINISHED, 5), True),  # stopped early
        ("--train-iters 9", "--train-iters 9", "abc", (FINISHED, 4), False),
        ("--train-iters 9", "--train-iters 9", "abc", (LEFT, 5), False),
    ],
)
def test_which_runs_are_over(tmp_path, monkeypatch, of_run, again, data, outcome, over):
    before = checkpoint(tmp_path / "before")
    options = options_of(resumed(f"--load {before} --finetune {of_run} --seed 7"))
    folder = checkpoint(tmp_path / "run", options=options, mft_normalization=options["mft_normalization"])
    monkeypatch.setattr(module, "read_ledger", lambda prefix: OfHash(data))
    if outcome is not None:
        record_outcome(folder, outcome[0], "because", outcome[1])
    assert is_over(resumed(f"--load {folder} --save {folder} {again}")) == over


def test_which_commands_are_taken_as_continued(tmp_path):
    folder = checkpoint(tmp_path / "run")

    def load(words):
        command = continued(read_command_line(f"{SHORT_RUN} {words}".split()))
        return None if command is None else command.group(CheckpointArguments).load

    assert load(f"--save {folder}") == str(folder)
    assert load(f"--save {folder} --load elsewhere --finetune") == str(folder)
    for words in (
        "",
        f"--save {tmp_path}/new",
        f"--save {folder} --auto-resume",
        f"--save {folder} --skip-train",
        f"--save {folder} --load {folder}/",
    ):
        assert load(words) is None
