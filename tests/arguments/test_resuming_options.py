"""What a run takes from the checkpoint that it goes on from, and what it may change."""

import dataclasses
import json

import pytest

from mft_megatron.errors import InputError
from mft_megatron.run_folder import INFO, TRACKER
from tests.arguments.command_line import WITHOUT_SHAPE, checkpoint, parse


def test_architecture_and_seed_come_from_the_checkpoint(tmp_path):
    a = parse(f"--load {checkpoint(tmp_path)}", base=WITHOUT_SHAPE)
    assert (a.network.num_layers, a.network.swiglu, a.network.position_embedding_type) == (4, True, "rope")
    assert a.initialization.seed == 7
    assert a.resume.info.iteration == 5
    assert parse(f"--load {tmp_path}/iter_0000005", base=WITHOUT_SHAPE).resume.info.iteration == 5
    assert parse(f"--load {tmp_path} --finetune", base=WITHOUT_SHAPE).initialization.seed == 1234


def test_contradicting_the_checkpoint_is_refused(tmp_path):
    folder = checkpoint(tmp_path)
    for extra, text in {
        "--num-layers 8": "the checkpoint .* has 4",
        "--normalization RMSNorm": "the checkpoint .* has LayerNorm",
        "--seed 3": "data order of seed 7",
        "--train-iters 5": "already at iteration 5",
    }.items():
        with pytest.raises(InputError, match=text):
            parse(f"--load {folder} {extra}", base=WITHOUT_SHAPE)


def test_restart_idiom_starts_anew_only_where_nothing_was_saved(tmp_path):
    assert parse(f"--save {tmp_path}/run --load {tmp_path}/run").resume is None
    folder = checkpoint(tmp_path / "other")
    assert parse(f"--save {folder} --load {folder}", base=WITHOUT_SHAPE).resume is not None
    with pytest.raises(InputError, match="does not exist"):
        parse(f"--save {tmp_path}/run --load {tmp_path}/mistyped")


def test_damaged_checkpoints_are_refused(tmp_path):
    folder = checkpoint(tmp_path)
    info = folder / "iter_0000005" / INFO
    content = json.loads(info.read_text())
    cases = {
        "damaged": "{",
        "format version 99": json.dumps({**content, "format_version": 99}),
        "not a checkpoint description": json.dumps({**content, "surprise": 1}),
    }
    for text, written in cases.items():
        info.write_text(written)
        with pytest.raises(InputError, match=text):
            parse(f"--load {folder}", base=WITHOUT_SHAPE)
    info.unlink()
    with pytest.raises(InputError, match="never finished"):
        parse(f"--load {folder}", base=WITHOUT_SHAPE)
    (folder / TRACKER).write_text("seven")
    with pytest.raises(InputError, match="not an iteration number"):
        parse(f"--load {folder}", base=WITHOUT_SHAPE)
    (folder / TRACKER).write_text("7")
    with pytest.raises(InputError, match="names iteration 7"):
        parse(f"--load {folder}", base=WITHOUT_SHAPE)


def test_without_an_optimizer_resuming_is_refused(tmp_path):
    folder = checkpoint(tmp_path, has_optimizer=False)
    with pytest.raises(InputError, match="--no-load-optim or --finetune"):
        parse(f"--load {folder}", base=WITHOUT_SHAPE)
    assert parse(f"--load {folder} --no-load-optim", base=WITHOUT_SHAPE).resume is not None


def test_optimizers_of_an_earlier_format_are_refused(tmp_path):
    """Which stored them in another way; its weights are as they were."""
    folder = checkpoint(tmp_path, format_version=1)
    with pytest.raises(InputError, match=r"earlier version .* --no-load-optim or --finetune"):
        parse(f"--load {folder}", base=WITHOUT_SHAPE)
    for option in ("--no-load-optim", "--finetune"):
        assert parse(f"--load {folder} {option}", base=WITHOUT_SHAPE).resume is not None


def test_the_length_of_a_model_without_learned_positions_may_change(tmp_path):
    folder = checkpoint(tmp_path)
    longer = WITHOUT_SHAPE.replace("128", "256")
    assert parse(f"--load {folder} --finetune", base=longer).network.max_position_embeddings == 256
    assert parse(f"--load {folder} --max-position-embeddings 512", base=longer).network.max_position_embeddings == 512
    found = parse(f"--load {folder}", base=longer.replace("--seq-length 256", ""), lengths=lambda prefix: [256])
    assert found.network.max_position_embeddings == 256


def test_learned_positions_keep_their_length(tmp_path):
    network = dataclasses.asdict(parse().network)
    folder = checkpoint(tmp_path, architecture=network)
    with pytest.raises(InputError, match=r"the checkpoint .* has 128"):
        parse(f"--load {folder} --max-position-embeddings 256", base=WITHOUT_SHAPE)


@pytest.mark.parametrize(
    "growth", ["--step-batch-size-schedule 0:4,1K:8", "--rampup-batch-size 4 4 10 --global-batch-size 8"]
)
def test_sizes_that_a_run_has_behind_it_need_not_fit_a_new_layout(tmp_path, growth):
    words = f"--load {checkpoint(tmp_path, consumed_samples=12)} {growth} --micro-batch-size 1"
    assert parse(words, 8, WITHOUT_SHAPE).batch_sizes.after(12) == 8
    with pytest.raises(InputError, match="the size 4 is not a multiple"):
        parse(f"{words} --finetune", 8, WITHOUT_SHAPE)
    with pytest.raises(InputError, match="the size 4 is not a multiple"):
        parse(
            f"--load {checkpoint(tmp_path / 'young', consumed_samples=4)} {growth}",
            2,
            WITHOUT_SHAPE.replace("size 2", "size 4"),
        )


def test_a_rate_of_its_own_needs_an_optimizer_that_knows_it(tmp_path):
    folder = checkpoint(tmp_path)
    with pytest.raises(InputError, match="saved without --decoupled-lr; leave it out, or continue"):
        parse(f"--load {folder} --decoupled-lr 1", base=WITHOUT_SHAPE)
    assert parse(f"--load {folder} --decoupled-lr 1 --finetune", base=WITHOUT_SHAPE).learning_rate.decoupled_lr == 1
    folder = checkpoint(tmp_path / "with", decoupled_lr=True)
    with pytest.raises(InputError, match="saved with --decoupled-lr; give it, or continue with --no-load-optim"):
        parse(f"--load {folder}", base=WITHOUT_SHAPE)
    assert parse(f"--load {folder} --decoupled-lr 1", base=WITHOUT_SHAPE).learning_rate.decoupled_lr == 1
    assert parse(f"--load {folder} --no-load-optim", base=WITHOUT_SHAPE).resume is not None


def test_another_precision_needs_another_optimizer(tmp_path):
    folder = checkpoint(tmp_path)
    with pytest.raises(InputError, match="its optimizer is of a fp32 run, this one is bf16"):
        parse(f"--load {folder} --bf16", base=WITHOUT_SHAPE)
    assert parse(f"--load {folder} --bf16 --no-load-optim", base=WITHOUT_SHAPE).precision.bf16


def test_a_used_folder_is_not_written_over(tmp_path):
    folder = checkpoint(tmp_path)
    with pytest.raises(InputError, match="holds the checkpoints of another run: add --load"):
        parse(f"--save {folder}")
    assert parse(f"--save {folder}/ --load {folder}", base=WITHOUT_SHAPE).resume is not None


def test_restart_knows_its_folder_by_any_name(tmp_path):
    assert parse(f"--save {tmp_path}/run --load {tmp_path}/run/").resume is None


def test_a_step_of_a_folder(tmp_path):
    folder = checkpoint(tmp_path)
    assert parse(f"--load {folder} --ckpt-step 5", base=WITHOUT_SHAPE).resume.info.iteration == 5
    with pytest.raises(InputError, match=r"--ckpt-step 6: .*iter_0000006 does not exist; there is iter_0000005"):
        parse(f"--load {folder} --ckpt-step 6", base=WITHOUT_SHAPE)
    with pytest.raises(InputError, match=r"--ckpt-step 6: .* there is no checkpoint"):
        parse(f"--load {tmp_path}/nowhere --ckpt-step 6", base=WITHOUT_SHAPE)


def test_a_missing_checkpoint_may_be_an_error_for_restarts_too(tmp_path):
    words = f"--save {tmp_path}/run --load {tmp_path}/run"
    assert parse(words).resume is None
    with pytest.raises(InputError, match="does not exist"):
        parse(f"{words} --exit-on-missing-checkpoint")


def test_a_pretrained_checkpoint_gives_weights_alone_and_not_the_seed(tmp_path):
    pretrained, own = checkpoint(tmp_path / "theirs"), tmp_path / "own"
    for folder in (pretrained, pretrained / "iter_0000005"):
        a = parse(f"--pretrained-checkpoint {folder} --load {own} --save {own}", base=WITHOUT_SHAPE)
        assert (a.weights_alone, a.network.swiglu, a.initialization.seed) == (True, True, 1234)
        assert not a.checkpoint.finetune  # or a run that its config.yaml starts again would never go on
    checkpoint(own)
    a = parse(f"--pretrained-checkpoint {pretrained} --load {own} --save {own}", base=WITHOUT_SHAPE)
    assert (a.weights_alone, a.initialization.seed, a.resume.path) == (False, 7, own / "iter_0000005")
    with pytest.raises(InputError, match=r"--pretrained-checkpoint .*nowhere: does not exist"):
        parse(f"--pretrained-checkpoint {tmp_path}/nowhere", base=WITHOUT_SHAPE)


def test_a_finished_run_is_evaluated(tmp_path):
    folder = checkpoint(tmp_path)
    short = WITHOUT_SHAPE.replace("--train-iters 10", "--train-iters 5")
    assert parse(f"--load {folder} --skip-train", base=short).validation.skip_train
