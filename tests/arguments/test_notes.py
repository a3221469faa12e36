"""Notes about settings that are probably not meant: each appears for its settings, and none for those of a good run."""

import pytest

from mft_megatron.arguments.command import parse_arguments
from mft_megatron.arguments.notes import notes
from tests.arguments.command_line import WITHOUT_SHAPE, checkpoint, parse, resumed
from tests.command_lines import SHORT_RUN

GOOD = "--save run --save-interval 5"
# options, and the beginning of the only note
NOTED = {
    "": "no --save: what is trained is lost",
    "--save run --train-iters 5000": "no --save-interval: nothing is saved before the last of 5000 steps",
    "--save run --save-interval 11": "--save-interval 11 is more than the 10 steps: only the last one is saved",
    f"{GOOD} --lr 0": "--lr 0: no weight changes",
    f"{GOOD} --lr-warmup-iters 10 --lr-decay-iters 11 --lr-decay-style constant": "the warm-up takes 10 steps, the run",
    f"{GOOD} --lr-decay-iters 12": "--lr-decay-iters 12: the run ends after 10 steps, before the learning rate is",
    f"{GOOD} --lr-decay-iters 8 --min-lr 1e-5": "--lr-decay-iters 8: the last 2 of 10 steps have --min-lr 1e-05",
    f"{GOOD} --lr-decay-iters 8": "--lr-decay-iters 8 and --min-lr 0: the last 2 of 10 steps change nothing; leave",
    f"{GOOD} --early-stopping-patience 2 --eval-interval 6": "--early-stopping-patience 2: the run has only 2 evalua",
    f"{GOOD} --task-early-stopping-patience 9": "--task-early-stopping-patience 9: the run has only 1 evaluations",
    f"{GOOD} --global-batch-size 22": "a batch of 22 packs holds some of the 20 training packs more than once",
    f"{GOOD} --rampup-batch-size 2 2 8 --global-batch-size 30": "a batch of 30 packs",
}
SILENT = (
    GOOD,
    "--save run",
    "--save run --train-iters 5000 --exit-interval 100",
    f"{GOOD} --lr-decay-style constant --lr-decay-iters 5",
    f"{GOOD} --lr-warmup-fraction 0.9",
    f"{GOOD} --early-stopping-patience 2 --eval-interval 4",
    f"{GOOD} --global-batch-size 20",
)


@pytest.mark.parametrize("words", NOTED)
def test_what_is_probably_not_meant_is_said(words):
    (note,) = notes(parse(words), 20, has_validation=True)
    assert note.startswith(NOTED[words])
    assert "\n" not in note


@pytest.mark.parametrize("words", SILENT)
def test_a_good_run_has_no_notes(words):
    assert notes(parse(words), 20, has_validation=True) == []


@pytest.mark.parametrize(
    ("words", "noted"),
    [("", 0), ("--eval-interval 5", 1), ("--eval-iters 2", 1), ("--full-validation", 1), ("--eval-iters 0", 0)],
)
def test_evaluations_that_were_asked_for_need_a_split(words, noted):
    found = notes(parse(f"{GOOD} {words}"), 20, has_validation=False)
    assert len(found) == noted
    assert all(note.startswith("the data set has no validation split: nothing is evaluated") for note in found)


def test_fine_tuning_in_the_folder_of_the_checkpoint(tmp_path):
    folder = checkpoint(tmp_path)
    words = f"--load {folder} --save-interval 5 --finetune"
    (note,) = notes(resumed(f"{words} --save {folder}"), 20, has_validation=True)
    assert note.startswith(f"--finetune from the --save folder {folder}: started again, the run begins at iteration 0")
    assert notes(resumed(f"{words} --save {tmp_path}/other"), 20, has_validation=True) == []


def test_dropout_of_a_model_from_hugging_face(tmp_path):
    folder = checkpoint(tmp_path, source="LlamaForCausalLM")
    words = f"{WITHOUT_SHAPE} --save {tmp_path}/new --load {folder} --save-interval 5"
    (note,) = notes(parse("--finetune", base=words), 20, has_validation=True)
    assert note.startswith("--hidden-dropout 0.1 and --attention-dropout 0.1 (0.1 is Megatron's default): models from")
    assert notes(parse("--finetune --attention-dropout 0 --hidden-dropout 0", base=words), 20, True) == []
    assert notes(parse("", base=words), 20, True) == []


def test_the_only_batch_of_an_epoch_holds_no_pack_twice():
    words = f"{SHORT_RUN.replace('--train-iters 10', '')} {GOOD} --global-batch-size 22 --num-train-epochs"

    def found(epochs):
        return notes(parse_arguments(f"{words} {epochs}".split(), training_packs=lambda *data: 20), 20, True)

    assert [note for note in found(1) if "a batch of" in note] == []
    assert [note for note in found(1.05) if note.startswith("a batch of 21 packs holds some of the 20 training packs")]


def test_single_precision_on_a_gpu():
    (note,) = notes(parse(GOOD), 20, has_validation=True, on_gpu=True)
    assert note.startswith("neither --bf16 nor --fp16: fp32 takes twice the memory on a GPU")
    assert notes(parse(f"{GOOD} --bf16"), 20, has_validation=True, on_gpu=True) == []
