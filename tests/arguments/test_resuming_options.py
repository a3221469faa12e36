"""Options that a resumed run takes from its checkpoint, and those that it may change."""

import dataclasses
import json
import shutil

import pytest

from mft_megatron.arguments.auto_resume import advice_of_own_run
from mft_megatron.arguments.command import parse_arguments, read_command_line
from mft_megatron.arguments.groups.checkpointing import CheckpointArguments
from mft_megatron.arguments.start import Start
from mft_megatron.errors import InputError
from mft_megatron.run_folder.description import CheckpointInfo
from mft_megatron.run_folder.names import INFO, TRACKER
from tests.arguments.command_line import WITHOUT_SHAPE, checkpoint, parse, resumed
from tests.refusals import refused


def test_architecture_and_seed_come_from_the_checkpoint(tmp_path):
    a = resumed(f"--load {checkpoint(tmp_path)}")
    assert (a.network.num_layers, a.network.swiglu, a.network.position_embedding_type) == (4, True, "rope")
    assert a.initialization.seed == 7
    assert a.resume.info.iteration == 5
    assert resumed(f"--load {tmp_path}/iter_0000005").resume.info.iteration == 5
    assert resumed(f"--load {tmp_path} --finetune").initialization.seed == 1234


def test_an_architecture_of_a_newer_version_is_refused(tmp_path):
    shape = dataclasses.asdict(parse("--swiglu").network)
    folder = checkpoint(tmp_path, architecture={**shape, "a_new_field": 1})
    with refused(f"{folder}/iter_0000005: its architecture has a_new_field, which this version does not know"):
        resumed(f"--load {folder}")


def test_contradicting_the_checkpoint_is_refused(tmp_path):
    folder = checkpoint(tmp_path)
    for extra, text in {
        "--num-layers 8": "iter_0000005 has 4; leave the option out",
        "--normalization RMSNorm": "iter_0000005 has LayerNorm; leave the option out",
        "--seed 3": "data order of seed 7",
        "--train-iters 5": "already at iteration 5",
    }.items():
        with refused(text):
            resumed(f"--load {folder} {extra}")


def test_a_restarted_job_starts_from_iteration_0_only_without_a_checkpoint(tmp_path):
    assert parse(f"--save {tmp_path}/run --load {tmp_path}/run").resume is None
    folder = checkpoint(tmp_path / "other")
    assert resumed(f"--save {folder} --load {folder}").resume is not None
    with refused("does not exist"):
        parse(f"--save {tmp_path}/run --load {tmp_path}/mistyped")


def test_damaged_checkpoints_are_refused(tmp_path):
    folder = checkpoint(tmp_path)
    info = folder / "iter_0000005" / INFO
    content = json.loads(info.read_text())
    cases = {
        "damaged": "{",
        "format version 99": json.dumps({**content, "format_version": 99, "a_new_field": 1}),
        "not a checkpoint description": json.dumps({**content, "surprise": 1}),
    }
    for text, written in cases.items():
        info.write_text(written)
        with refused(text):
            resumed(f"--load {folder}")
    info.unlink()
    with refused("never finished"):
        resumed(f"--load {folder}")
    (folder / TRACKER).write_text("seven")
    with refused("not an iteration number"):
        resumed(f"--load {folder}")
    (folder / TRACKER).write_text("7")
    with refused("names iteration 7"):
        resumed(f"--load {folder}")


def test_without_an_optimizer_resuming_is_refused(tmp_path):
    folder = checkpoint(tmp_path, has_optimizer=False)
    with refused("--no-load-optim or --finetune"):
        resumed(f"--load {folder}")
    assert resumed(f"--load {folder} --no-load-optim").resume is not None


def test_optimizers_of_an_earlier_format_are_refused(tmp_path):
    """Optimizer states were stored in a different way; weights were not."""
    folder = checkpoint(tmp_path, format_version=1)
    with refused("earlier version", "--no-load-optim or --finetune"):
        resumed(f"--load {folder}")
    for option in ("--no-load-optim", "--finetune"):
        assert resumed(f"--load {folder} {option}").resume is not None


def test_the_length_of_a_model_without_learned_positions_may_change(tmp_path):
    folder = checkpoint(tmp_path)
    words = f"--load {folder} --seq-length 256"
    assert resumed(f"{words} --finetune").network.max_position_embeddings == 256
    assert resumed(f"{words} --max-position-embeddings 512").network.max_position_embeddings == 512
    without_length = WITHOUT_SHAPE.replace("--seq-length 128", "")
    packed = parse(f"--load {folder}", base=without_length, lengths=lambda prefix: [256])
    assert packed.network.max_position_embeddings == 256


def test_learned_positions_keep_their_length(tmp_path):
    network = dataclasses.asdict(parse().network)
    folder = checkpoint(tmp_path, architecture=network)
    with refused("iter_0000005 has 128; leave the option out"):
        resumed(f"--load {folder} --max-position-embeddings 256")


@pytest.mark.parametrize(
    "growth", ["--step-batch-size-schedule 0:4,1K:8", "--rampup-batch-size 4 4 10 --global-batch-size 8"]
)
def test_batch_sizes_of_earlier_steps_need_not_fit_the_parallel_layout(tmp_path, growth):
    words = f"--load {checkpoint(tmp_path, consumed_samples=12)} {growth} --micro-batch-size 1"
    assert resumed(words, 8).batch_sizes.after(12) == 8
    with refused("the size 4 is not a multiple"):
        resumed(f"{words} --finetune", 8)
    with refused("the size 4 is not a multiple"):
        resumed(f"--load {checkpoint(tmp_path / 'young', consumed_samples=4)} {growth} --micro-batch-size 4", 2)


def test_a_decoupled_learning_rate_needs_an_optimizer_that_has_it(tmp_path):
    folder = checkpoint(tmp_path)
    with refused("saved without --decoupled-lr; leave it out, or continue"):
        resumed(f"--load {folder} --decoupled-lr 1")
    assert resumed(f"--load {folder} --decoupled-lr 1 --finetune").learning_rate.decoupled_lr == 1
    folder = checkpoint(tmp_path / "with", decoupled_lr=True)
    with refused("saved with --decoupled-lr; give it, or continue with --no-load-optim"):
        resumed(f"--load {folder}")
    assert resumed(f"--load {folder} --decoupled-lr 1").learning_rate.decoupled_lr == 1
    assert resumed(f"--load {folder} --no-load-optim").resume is not None


def test_another_precision_needs_another_optimizer(tmp_path):
    folder = checkpoint(tmp_path)
    with refused("its optimizer is of a fp32 run, this one is bf16"):
        resumed(f"--load {folder} --bf16")
    assert resumed(f"--load {folder} --bf16 --no-load-optim").precision.bf16


def test_the_folder_of_another_run_is_not_overwritten(tmp_path):
    folder = checkpoint(tmp_path)
    with refused(" or --auto-resume to continue it, or name another folder"):
        parse(f"--save {folder}")
    assert resumed(f"--save {folder}/ --load {folder}").resume is not None


def test_a_folder_whose_tracker_is_lost_is_not_overwritten(tmp_path):
    folder = checkpoint(tmp_path)
    (folder / TRACKER).unlink()
    with refused("holds the checkpoints of another run: add --load"):
        parse(f"--save {folder}")
    assert resumed(f"--save {folder} --load {folder}").resume.info.iteration == 5
    shutil.copytree(folder / "iter_0000005", folder / "iter_0000007")
    for words in (f"--save {folder} --load {folder}", f"--load {folder}"):
        with refused(f"its file {TRACKER}, which names the newest checkpoint, is lost", "iter_0000005, iter_0000007"):
            resumed(words)
    assert resumed(f"--save {folder} --load {folder} --ckpt-step 5").resume.info.iteration == 5


@pytest.mark.parametrize("words", ["", "--finetune"])
def test_a_run_that_begins_elsewhere_does_not_replace_checkpoints(tmp_path, words):
    """A job of a chain would start again at each restart, and lose what the job before it did."""
    start, own = checkpoint(tmp_path / "start"), tmp_path / "own"
    command = f"--load {start} --save {own} {words}"
    assert resumed(command).resume is not None
    checkpoint(own)
    with refused(f"--save {own} holds the checkpoints of a run already, and --load {start} would begin again"):
        resumed(command)
    assert resumed(f"--load {own} --save {own} {words}").in_own_folder
    assert resumed(f"{command} --skip-train").validation.skip_train


@pytest.mark.parametrize(
    "first",
    [
        "",
        "--load THEIRS",
        "--load THEIRS --finetune",
        "--load THEIRS --ckpt-step 5 --no-load-optim --no-load-rng",
        "--pretrained-checkpoint THEIRS",
        "--load OWN",
    ],
)
def test_one_command_line_starts_a_run_and_continues_it(tmp_path, first):
    theirs, own = checkpoint(tmp_path / "theirs", seed=3), tmp_path / "own"
    words = first.replace("THEIRS", str(theirs)).replace("OWN", str(own))
    before = (resumed if "THEIRS" in first else parse)(f"--auto-resume --save {own} {words}")
    assert before.checkpoint.finetune == ("--finetune" in words)
    assert before.checkpoint.load_optim == ("--no-load-optim" not in words)
    assert (before.resume is None) == ("THEIRS" not in first)
    checkpoint(own)
    a = resumed(f"--auto-resume --save {own} {words}")
    assert (a.resume.path, a.weights_alone, a.initialization.seed) == (own / "iter_0000005", False, 7)
    assert (a.checkpoint.load, a.checkpoint.load_optim, a.checkpoint.load_rng) == (str(own), True, True)
    if "THEIRS" in first and "--pretrained" not in words:
        with refused(f"--save {own} holds the checkpoints of a run already"):
            resumed(f"--save {own} {words}")


def test_states_that_a_run_does_not_save_are_not_loaded_either(tmp_path):
    folder = checkpoint(tmp_path, has_optimizer=False)
    a = resumed(f"--auto-resume --save {folder} --no-save-optim --no-load-optim --no-load-rng")
    assert (a.checkpoint.load_optim, a.checkpoint.load_rng) == (False, True)


def test_a_run_without_a_folder_cannot_continue():
    with refused("--auto-resume continues the run of the --save folder: give --save DIR"):
        parse("--auto-resume")


def test_a_run_that_was_left_before_its_last_evaluation_is_not_finished(tmp_path):
    words = f"--load {checkpoint(tmp_path, evaluation_due=True)} --save {tmp_path} --train-iters 5"
    assert not resumed(words).finished
    assert not resumed(f"{words} --finetune").evaluation_due


def test_a_restarted_job_recognises_its_folder_by_another_spelling(tmp_path):
    assert parse(f"--save {tmp_path}/run --load {tmp_path}/run/").resume is None


def test_one_iteration_of_a_folder(tmp_path):
    folder = checkpoint(tmp_path)
    assert resumed(f"--load {folder} --ckpt-step 5").resume.info.iteration == 5
    with refused("--ckpt-step 6: ", "iter_0000006 does not exist; there is iter_0000005"):
        resumed(f"--load {folder} --ckpt-step 6")
    with refused("--ckpt-step 6: ", "there is no checkpoint"):
        resumed(f"--load {tmp_path}/nowhere --ckpt-step 6")


def test_a_missing_checkpoint_may_be_an_error_for_restarts_too(tmp_path):
    words = f"--save {tmp_path}/run --load {tmp_path}/run"
    assert parse(words).resume is None
    with refused("does not exist"):
        parse(f"{words} --exit-on-missing-checkpoint")


def test_a_pretrained_checkpoint_gives_weights_alone_and_not_the_seed(tmp_path):
    pretrained, own = checkpoint(tmp_path / "theirs"), tmp_path / "own"
    for folder in (pretrained, pretrained / "iter_0000005"):
        a = resumed(f"--pretrained-checkpoint {folder} --load {own} --save {own}")
        assert (a.weights_alone, a.network.swiglu, a.initialization.seed) == (True, True, 1234)
        assert not a.checkpoint.finetune  # else a run restarted from its config.yaml would never resume
    checkpoint(own)
    a = resumed(f"--pretrained-checkpoint {pretrained} --load {own} --save {own}")
    assert (a.weights_alone, a.initialization.seed, a.resume.path) == (False, 7, own / "iter_0000005")
    with refused("--pretrained-checkpoint ", "nowhere: does not exist"):
        resumed(f"--pretrained-checkpoint {tmp_path}/nowhere")


@pytest.mark.parametrize(
    ("words", "finished"),
    [
        ("--train-iters 5 --save HERE", True),
        ("--train-iters 5 --save HERE --ckpt-step 5", True),
        ("--train-iters 5 --save HERE/ --load HERE/iter_0000005", True),
        ("--train-iters 6 --save HERE", False),
        ("--train-iters 5 --save HERE --finetune", False),
        ("--train-iters 5 --save HERE --skip-train", False),
        ("--train-iters 5 --save HERE/other", None),
        ("--train-iters 5", None),
        ("--train-iters 4 --save HERE", None),
    ],
)
def test_only_a_run_in_its_own_folder_is_finished(tmp_path, words, finished):
    words = f"--load {checkpoint(tmp_path)} {words.replace('HERE', str(tmp_path))}"
    if finished is None:
        with refused("the checkpoint is already at iteration 5; raise it"):
            resumed(words)
    else:
        assert resumed(words).finished is finished


def test_a_run_of_epochs_is_finished_when_they_are_used(tmp_path):
    words = f"{WITHOUT_SHAPE.replace('--train-iters 10', '')} --load {checkpoint(tmp_path)} --save {tmp_path}"

    def of(epochs):
        words_of = f"{words} --num-train-epochs {epochs}".split()
        return parse_arguments(words_of, training_packs=lambda prefix, seq_length: 5)

    assert (of(2).finished, of(2).training.train_iters) == (True, 5)
    assert (of(2.2).finished, of(2.2).training.train_iters) == (False, 6)
    with refused("--num-train-epochs 1.8: the checkpoint has used 2 epochs already; raise it, or"):
        of(1.8)


def test_a_finished_run_is_evaluated(tmp_path):
    folder = checkpoint(tmp_path)
    assert resumed(f"--load {folder} --skip-train --train-iters 5").validation.skip_train


def test_a_model_in_the_current_folder_is_a_model():
    """``--hf-checkpoint ''`` names it, as any other folder does."""
    info = CheckpointInfo(0, 0, {}, 100, {}, "", 0, 0, source="LlamaForCausalLM")
    ref = Start(hf_model=info).resume(CheckpointArguments(hf_checkpoint=""))
    assert ref is not None
    assert ref.info is info


def test_advice_that_auto_resume_would_set_aside_says_so(tmp_path):
    folder = checkpoint(tmp_path, precision="fp32", optimizer="adam")
    for words, text in {
        f"--auto-resume --save {folder} --bf16": f"(--auto-resume sets that aside: give --load {folder} in its place",
        f"--load {folder} --save {folder} --bf16": "continue with --no-load-optim or --finetune",
    }.items():
        given = read_command_line(f"{WITHOUT_SHAPE} {words}".split()).given
        with pytest.raises(InputError) as caught, advice_of_own_run(given):
            resumed(words)
        assert text in str(caught.value)
        assert str(caught.value).endswith(")") == ("--auto-resume" in words)
