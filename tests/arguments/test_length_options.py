"""The length of a run in epochs: the steps that follow, on resume too, and what is refused."""

import json

import pytest
import yaml

from mft_megatron.arguments.command import parse_arguments
from mft_megatron.run_folder.configuration import effective_configuration
from tests.arguments.command_line import WITHOUT_SHAPE, checkpoint
from tests.command_lines import SHORT_RUN
from tests.refusals import refused

LENGTH = "--train-iters 10"


def parse(extra, packs=17, base=SHORT_RUN, world_size=1):
    words = f"{base.replace(LENGTH, '')} {extra}".split()
    return parse_arguments(words, world_size, training_packs=lambda prefix, seq_length: packs)


@pytest.mark.parametrize(
    ("words", "packs", "total", "steps"),
    [
        ("--num-train-epochs 1 --global-batch-size 8", 16, 16, 2),
        ("--num-train-epochs 2 --global-batch-size 8", 17, 34, 5),
        ("--num-train-epochs 0.5 --global-batch-size 8", 17, 9, 2),
        ("--num-train-epochs 1e-9", 17, 1, 1),
        ("--num-train-epochs 3", 1, 3, 2),
        # in floating point 0.07 · 100 is 7.000000000000001, 1.1 · 10 is 11.000000000000002
        ("--num-train-epochs 0.07 --global-batch-size 2", 100, 7, 4),
        ("--num-train-epochs 1.1 --global-batch-size 2", 10, 11, 6),
        ("--num-train-epochs 1e3 --global-batch-size 2", 10**9, 10**12, 5 * 10**11),
        ("--num-train-epochs 2 --rampup-batch-size 4 4 24 --global-batch-size 12", 17, 34, 6),
        ("--num-train-epochs 1 --step-batch-size-schedule 0:4,1K:8", 17, 17, 4),
    ],
)
def test_the_steps_of_epochs(words, packs, total, steps):
    a = parse(words, packs)
    assert (a.total_packs, a.training.train_iters, a.learning_rate.lr_decay_iters) == (total, steps, steps)


def test_fractions_of_the_schedule_count_its_steps():
    a = parse("--num-train-epochs 2 --global-batch-size 8 --lr-warmup-fraction 0.4")
    assert a.learning_rate.warmup_steps == pytest.approx(2)
    assert parse("--num-train-epochs 2 --lr-decay-iters 3").learning_rate.lr_decay_iters == 3


def test_exactly_one_length_is_given():
    with refused("missing option: give --train-iters N or --num-train-epochs E"):
        parse("")
    with refused("--train-iters 10 and --num-train-epochs 2 both say how long the run is; give one of them"):
        parse("--train-iters 10 --num-train-epochs 2")
    for epochs, text in (("0", "above 0"), ("-1", "above 0"), ("nan", "finite"), ("inf", "finite"), ("1e7", "at most")):
        with refused(f"--num-train-epochs {float(epochs)}: must be", text):
            parse(f"--num-train-epochs {epochs}")


@pytest.mark.parametrize(
    ("epochs", "steps"),
    [
        # 10 of 34 packs were used in 5 steps of an earlier batch size; 24 are left for batches of 8
        (2, 5 + 3),
        (3, 5 + 6),
        (0.6, 5 + 1),
    ],
)
def test_a_resumed_run_counts_from_what_is_consumed(tmp_path, epochs, steps):
    a = parse(f"--load {checkpoint(tmp_path)} --global-batch-size 8 --num-train-epochs {epochs}", base=WITHOUT_SHAPE)
    assert a.training.train_iters == steps
    a = parse(f"--load {tmp_path} --finetune --global-batch-size 8 --num-train-epochs {epochs}", base=WITHOUT_SHAPE)
    assert a.training.train_iters == -(-a.total_packs // 8)


def test_a_configuration_of_the_run_is_read_again_and_overridden(tmp_path):
    a = parse("--num-train-epochs 2 --global-batch-size 8")
    path = tmp_path / "config.yaml"
    path.write_text(effective_configuration(a.as_options(), 1))
    assert "train_iters" not in yaml.safe_load(path.read_text())
    again = f"--yaml-cfg {path}"
    assert parse(again, base="") == a
    longer = parse(f"{again} --num-train-epochs 3", base="")
    assert (longer.training.train_iters, longer.learning_rate.lr_decay_iters) == (7, 7)
    other = parse("--num-train-epochs 2 --global-batch-size 8 --lr-decay-iters 3")
    path.write_text(effective_configuration(other.as_options(), 1))
    assert parse(again, base="") == other  # a decay that was given is not that of the run's length
    counted = parse(f"{again} --train-iters 4", base="")
    assert (counted.training.num_train_epochs, counted.training.train_iters) == (None, 4)
    file = tmp_path / "counted.json"
    file.write_text(json.dumps({"train_iters": 4}))
    assert parse(f"--yaml-cfg {file} --num-train-epochs 1", packs=4).training.train_iters == 2
    file.write_text(json.dumps({"train_iters": 4, "num_train_epochs": 2}))
    with refused("--train-iters 4 and --num-train-epochs 2 both say"):
        parse(f"--yaml-cfg {file}")
