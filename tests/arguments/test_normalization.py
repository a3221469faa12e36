"""The value of ``--mft-normalization`` that a run has if it is not given, and what is said where it is."""

import dataclasses

import pytest
import yaml

from mft_megatron.arguments.completion import complete, default_normalization
from mft_megatron.arguments.notes import notes
from mft_megatron.loss_names import FINE_TUNING_NORMALIZATION as TUNED
from mft_megatron.run_folder.configuration import effective_configuration
from tests.arguments.command_line import checkpoint, parse, resumed
from tests.refusals import refused

CONVERTED = {"source": "LlamaForCausalLM", "dataset_hash": "", "iteration": 0}


def value(a):
    return a.multi_task.mft_normalization


@pytest.mark.parametrize("loss", ["token", "task-token", "task-sample", "focal-task"])
def test_from_scratch_the_default_is_global(loss):
    a = parse(f"--mft-loss {loss}")
    assert (value(a), default_normalization(a)) == ("global", ("global", "the default"))


@pytest.mark.parametrize("start", ["--load {} --finetune", "--pretrained-checkpoint {}", "--load {}"])
@pytest.mark.parametrize(
    ("loss", "expected"),
    [("task-token", TUNED), ("task-sample", TUNED), *((loss, "global") for loss in ("token", "sample", "focal-task"))],
)
def test_fine_tuning_with_task_weights_has_a_default_of_its_own(tmp_path, start, loss, expected):
    """Also for a model that was converted, with no more than --load."""
    fields = {} if start != "--load {}" else CONVERTED
    folder = checkpoint(tmp_path / "model", mft_normalization="micro-batch", **fields)
    a = resumed(f"{start.format(folder)} --mft-loss {loss}")
    assert value(a) == expected
    assert default_normalization(a)[1] == ("the default of fine-tuning" if expected == TUNED else "the default")
    assert not [note for note in notes(a, 20, True) if "normalization" in note]
    assert value(resumed(f"{start.format(folder)} --mft-loss task-token --mft-normalization global")) == "global"


def test_adapters_are_fine_tuning(tmp_path):
    words = f"--pretrained-checkpoint {checkpoint(tmp_path)} --peft-type lora --lora-target-modules linear_qkv"
    assert value(resumed(words)) == TUNED


@pytest.mark.parametrize("of_checkpoint", ["global", "epoch", "micro-batch"])
def test_a_resumed_run_keeps_that_of_its_checkpoint(tmp_path, of_checkpoint):
    folder = checkpoint(tmp_path, mft_normalization=of_checkpoint)
    a = resumed(f"--load {folder} --save {folder}")
    assert (value(a), default_normalization(a)) == (of_checkpoint, (of_checkpoint, "that of the checkpoint"))
    assert value(resumed(f"--load {folder} --mft-loss token")) == of_checkpoint
    # no run of a focal loss has another one
    assert value(resumed(f"--load {folder} --mft-loss focal-task")) == "global"
    for given in ("global", "epoch", "micro-batch"):
        a = resumed(f"--load {folder} --save {folder} --mft-normalization {given}")
        assert value(a) == given
        said = [note for note in notes(a, 20, True) if note.startswith("--mft-normalization")]
        assert len(said) == (given != of_checkpoint)
        assert all(f"{given}: the run had {of_checkpoint} up to its checkpoint" in note for note in said)


def test_an_old_checkpoint_does_not_say_what_its_run_had(tmp_path):
    folder = checkpoint(tmp_path, format_version=2)
    assert value(resumed(f"--load {folder} --save {folder}")) == "global"
    for given, said in (("global", 0), ("micro-batch", 0), ("epoch", 1)):
        a = resumed(f"--load {folder} --save {folder} --mft-normalization {given}")
        assert len([note for note in notes(a, 20, True) if note.startswith("--mft-normalization")]) == said


def test_a_value_that_does_not_fit_is_refused_only_where_it_is_given(tmp_path):
    with refused("--mft-normalization epoch"):
        resumed(f"--load {checkpoint(tmp_path)} --mft-loss focal-sample --mft-normalization epoch")


def test_the_configuration_file_has_the_effective_value(tmp_path):
    tuned = resumed(f"--load {checkpoint(tmp_path)} --finetune")
    text = effective_configuration(tuned.as_options(), 1)
    assert yaml.safe_load(text)["mft_normalization"] == TUNED
    (tmp_path / "config.yaml").write_text(text)
    again = parse(f"--yaml-cfg {tmp_path}/config.yaml", base="")
    assert again.multi_task == tuned.multi_task
    assert dataclasses.asdict(complete(again).multi_task) == dataclasses.asdict(tuned.multi_task)
    overridden = parse(f"--yaml-cfg {tmp_path}/config.yaml --mft-normalization micro-batch", base="")
    assert value(overridden) == "micro-batch"
