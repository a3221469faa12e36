"""The command line of pretrain_mft.py, without a device: what is accepted, filled in and refused."""

import dataclasses
import json

import pytest

from mft_megatron.arguments import GROUPS, parse_arguments
from mft_megatron.errors import InputError
from mft_megatron.loss_names import LOSSES
from mft_megatron.run_folder import INFO, TRACKER, CheckpointInfo, write_info

BASE = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --data-path data --seq-length 128 --micro-batch-size 2 "
    "--train-iters 10 --lr 1e-3"
)


def parse(extra="", world_size=1, base=BASE, lengths=lambda prefix: [128]):
    return parse_arguments(f"{base} {extra}".split(), world_size, lengths)


def test_defaults_are_megatrons():
    a = parse()
    assert (a.regularization.attention_dropout, a.regularization.hidden_dropout) == (0.1, 0.1)
    assert (a.network.position_embedding_type, a.network.normalization) == ("learned_absolute", "LayerNorm")
    assert a.network.add_bias_linear
    assert a.network.tie_embeddings
    assert (a.initialization.seed, a.learning_rate.lr_decay_style, a.regularization.clip_grad) == (1234, "linear", 1.0)
    assert (a.logging.log_interval, a.validation.eval_interval) == (100, 1000)


def test_what_follows_is_filled_in():
    a = parse("--swiglu --group-query-attention --num-query-groups 2", world_size=4)
    assert a.network.ffn_hidden_size == 128  # 2/3 of 256, in steps of 64
    assert (a.network.kv_channels, a.network.num_query_groups) == (16, 2)
    assert (a.data_parallel_size, a.training.global_batch_size) == (4, 8)
    assert parse().network.num_query_groups == 4
    assert parse("--bf16").precision.accumulate_allreduce_grads_in_fp32
    assert parse().learning_rate.lr_decay_iters == 10


PP2 = "--global-batch-size 8 --pipeline-model-parallel-size 2"


@pytest.mark.parametrize(
    ("option", "stages"),
    [
        ("", None),
        ("--num-layers-per-virtual-pipeline-stage 1", 2),
        ("--num-layers-per-virtual-pipeline-stage 2", None),
        ("--num-virtual-stages-per-pipeline-rank 2", 2),
        ("--num-virtual-stages-per-pipeline-rank 1", None),
    ],
)
def test_either_option_interleaves(option, stages):
    a = parse(f"{PP2} {option}", world_size=2)
    assert a.distributed.num_virtual_stages_per_pipeline_rank == stages
    assert a.distributed.num_layers_per_virtual_pipeline_stage is None
    assert a.distributed.interleaved == (stages is not None)
    assert a.batch_multiple == (2 if stages is None else 4)


def test_batch_sizes():
    assert parse("--global-batch-size 6").batch_sizes.after(1000) == 6
    ramp = parse("--global-batch-size 12 --rampup-batch-size 4 4 24")
    assert (ramp.training.rampup_batch_size, ramp.training.global_batch_size) == ((4, 4, 24), 12)
    assert [ramp.batch_sizes.after(packs) for packs in (0, 11, 12, 23, 24)] == [4, 4, 8, 8, 12]
    steps = parse("--step-batch-size-schedule 0:4,1K:8")
    assert steps.training.global_batch_size == 8
    assert [steps.batch_sizes.after(packs) for packs in (0, 6, 7)] == [4, 4, 8]  # 1000 tokens are 7.8 packs of 128
    assert parse("--step-batch-size-schedule 0:4,1K:8 --global-batch-size 8").batch_sizes == steps.batch_sizes


@pytest.mark.parametrize(("alias", "loss"), list(zip(("case1", "case2", "case3", "case4"), LOSSES[:4], strict=True)))
def test_mftcoder_names(alias, loss):
    assert parse(f"--weighted_loss_mode {alias}").multi_task.mft_loss == loss
    assert parse(f"--mft-loss {loss}").multi_task.mft_loss == loss


def test_mftcoder_names_of_the_balancers():
    names = (
        "--coba_warmup_steps 7 --coba_history_length 9 --coba_tau 3 --coba_update_interval 2 --coba_sample_valid_num 4"
    )
    m = parse(f"--weighted_loss_mode coba {names}").multi_task
    assert (m.mft_loss, m.task_balance, m.coba_variant) == ("task-token", "coba", "paper")
    assert (m.coba_warmup_steps, m.coba_history_length, m.coba_tau) == (7, 9, 3.0)
    assert (m.coba_update_interval, m.coba_sample_valid_num) == (2, 4)
    names = "--selfpaced_history_length 9 --selfpaced_interval 2 --selfpaced_sample_valid_num 4"
    m = parse(f"--weighted_loss_mode selfpaced {names} --selfpaced_scale_factor 10").multi_task
    assert (m.mft_loss, m.task_balance) == ("task-token", "self-paced")
    assert (m.self_paced_history_length, m.self_paced_update_interval) == (9, 2)
    assert (m.self_paced_sample_valid_num, m.self_paced_scale_factor) == (4, 10.0)
    assert parse("--weighted_loss_mode coba --task-balance coba").multi_task.task_balance == "coba"
    assert parse("--early_stopping_stall_num 3").validation.early_stopping_patience == 3


def test_defaults_of_the_balancers_are_the_releases():
    m = parse().multi_task
    assert (m.coba_warmup_steps, m.coba_history_length, m.coba_tau) == (100, 200, 5)
    assert (m.self_paced_history_length, m.self_paced_scale_factor) == (100, 50)
    assert (m.famo_lr, m.famo_weight_decay, m.famo_beta1, m.famo_beta2) == (0.025, 0.01, 0.9, 0.999)
    assert (m.task_balance, m.mft_normalization, m.focal_gamma, m.focal_detach) == ("static", "global", 2, False)


def test_the_packed_length_is_the_default():
    base = BASE.replace("--seq-length 128 ", "")
    assert parse(base=base, lengths=lambda prefix: [256]).data.seq_length == 256
    with pytest.raises(InputError, match="give --seq-length; data is packed for 128, 256"):
        parse(base=base, lengths=lambda prefix: [128, 256])


GROWTH = "--weight-decay-incr-style linear --start-weight-decay 0.2"

REFUSED = {
    "--tensor-model-paralel-size 2": "did you mean --tensor-model-parallel-size",
    "--mft_los token": "did you mean --mft-loss",
    "--xyzzy": "unknown option --xyzzy; see --help",
    "stray": "unexpected argument 'stray'",
    "--lr fast": "invalid float value: 'fast'",
    "--lr": "expected one argument",
    "--mft-loss focal": "invalid choice: 'focal'",
    "--tensor-model-parallel-size 8": "does not divide --num-attention-heads 4",
    "--group-query-attention --num-query-groups 2 --tensor-model-parallel-size 4": "not divide --num-query-groups 2",
    "--group-query-attention --num-query-groups 3": "does not divide --num-attention-heads 4",
    "--ffn-hidden-size 99 --tensor-model-parallel-size 2": "does not divide --ffn-hidden-size 99",
    "--num-attention-heads 5": "is not divisible by --num-attention-heads 5",
    "--kv-channels 7 --position-embedding-type rope": "even head size",
    "--pipeline-model-parallel-size 3": "8 ranks cannot be divided",
    "--pipeline-model-parallel-size 8": "does not divide --num-layers 4",
    "--num-virtual-stages-per-pipeline-rank 2": "rank 2 needs --pipeline-model-parallel-size of at least 2",
    "--num-layers-per-virtual-pipeline-stage 2": "stage 2 needs --pipeline-model-parallel-size of at least 2",
    f"{PP2} --num-virtual-stages-per-pipeline-rank 3": "rank 3 × --pipeline-model-parallel-size 2 = 6 does not",
    f"{PP2} --num-layers-per-virtual-pipeline-stage 4": "stage 4 × --pipeline-model-parallel-size 2 = 8 does not",
    f"{PP2} --num-virtual-stages-per-pipeline-rank 0": "at least 1",
    f"{PP2} --num-layers-per-virtual-pipeline-stage 0": "at least 1",
    f"{PP2} --num-layers-per-virtual-pipeline-stage 1 --num-virtual-stages-per-pipeline-rank 2": "give one of them",
    f"{PP2} --num-virtual-stages-per-pipeline-rank 2": (
        "--micro-batch-size 2 × data-parallel size 4 × --pipeline-model-parallel-size 2 (interleaved) = 16"
    ),
    "--sequence-parallel": "needs --tensor-model-parallel-size of at least 2",
    "--global-batch-size 24": "is not a multiple of --micro-batch-size 2 × data-parallel size 8 = 16",
    "--global-batch-size 0": "at least 1",
    "--tensor-model-parallel-size 0": "at least 1",
    "--num-query-groups 2": "no effect without --group-query-attention",
    "--exit-interval 0 --save x": "at least 1",
    "--lr-decay-iters 0": "at least 1",
    "--eval-iters -1": "at least 0",
    "--lr-warmup-iters -3": "at least 0",
    "--adam-beta1 1.5": "below 1",
    "--lr nan": "finite",
    "--kv-channels 0": "at least 1",
    "--rotary-percent 2": "at most 1",
    "--rotary-base 0": "at least 2",
    "--norm-epsilon 0": "above 0",
    "--seed 99999999999999999999": "below",
    "--max-position-embeddings 64": "longer than --max-position-embeddings 64",
    "--micro-batch-size 0": "must be at least 1",
    "--hidden-dropout 1": "below 1",
    "--min-lr -1": "at least 0",
    "--min-lr 1": "is above --lr",
    "--lr-warmup-iters 10": "leaves nothing of the 10 decay steps",
    "--lr-warmup-iters 2 --lr-warmup-fraction 0.1": "both set the warm-up",
    "--lr-warmup-fraction 1.5": "below 1",
    "--lr-warmup-init 1e-4": "no effect without a warm-up",
    "--lr-warmup-init 1 --lr-warmup-iters 2": "--lr-warmup-init 1.0 is above --lr 0.001; lower it",
    "--lr-decay-style exponential": "invalid choice: 'exponential'",
    "--lr-decay-style WSD": "needs --lr-wsd-decay-iters N",
    "--lr-decay-style WSD --lr-wsd-decay-iters 0": "at least 1",
    "--lr-decay-style WSD --lr-wsd-decay-iters 11": "more than the 10 decay steps; shorten one",
    "--lr-decay-style WSD --lr-wsd-decay-iters 6 --lr-warmup-iters 5": "a warm-up of 5 steps are more than the 10",
    "--lr-decay-style WSD --lr-wsd-decay-iters 6 --lr-warmup-fraction 0.5": "a warm-up of 5 steps are more than the 10",
    "--lr-wsd-decay-iters 5": "--lr-wsd-decay-iters has no effect without --lr-decay-style WSD",
    "--lr-wsd-decay-style linear": "--lr-wsd-decay-style has no effect without --lr-decay-style WSD",
    "--lr-decay-style constant --min-lr 1e-4": "--min-lr has no effect without a decay",
    "--lr-decay-style constant --decoupled-lr 1 --decoupled-min-lr 1e-4": "--decoupled-min-lr has no effect without a",
    "--decoupled-min-lr 1e-4": "--decoupled-min-lr has no effect without --decoupled-lr",
    "--decoupled-lr -1": "at least 0",
    "--decoupled-lr 1e-4 --decoupled-min-lr 1e-3": "--decoupled-min-lr (not given: --min-lr) 0.001 is above",
    "--decoupled-lr 1e-4 --min-lr 5e-4": "(not given: --min-lr) 0.0005 is above --decoupled-lr 0.0001; lower it",
    "--decoupled-lr 1e-4 --lr-warmup-iters 2 --lr-warmup-init 5e-4": "--lr-warmup-init 0.0005 is above --decoupled-lr",
    "--start-weight-decay 0.1": "--start-weight-decay has no effect without --weight-decay-incr-style linear or cosine",
    "--end-weight-decay 0.1": "--end-weight-decay has no effect without --weight-decay-incr-style linear or cosine",
    "--weight-decay-incr-style linear": "needs both --start-weight-decay and --end-weight-decay",
    "--weight-decay-incr-style cosine --start-weight-decay 0": "needs both --start-weight-decay and --end-weight-decay",
    f"{GROWTH} --end-weight-decay 0.1": "--start-weight-decay 0.2 is above --end-weight-decay 0.1",
    f"{GROWTH} --end-weight-decay 0.3 --weight-decay 0.3": "--weight-decay has no effect without",
    "--start-weight-decay -1": "no effect",
    f"{GROWTH} --end-weight-decay -1": "at least 0",
    "--apply-wd-to-qk-layernorm": "without --qk-layernorm",
    "--rampup-batch-size 16 16": "expected 3 arguments",
    "--rampup-batch-size 16 16 x": "invalid int value",
    "--rampup-batch-size 16 16 64": "grows to --global-batch-size; give that, too",
    "--rampup-batch-size 16 0 64 --global-batch-size 64": "must be at least 1",
    "--rampup-batch-size 16 16 0 --global-batch-size 64": "must be at least 1",
    "--rampup-batch-size 64 16 64 --global-batch-size 64": "does not start below --global-batch-size 64",
    "--rampup-batch-size 16 32 64 --global-batch-size 64": "INCREMENT 32 does not divide the difference of 48",
    "--rampup-batch-size 16 24 64 --global-batch-size 64": "the size 40 is not a multiple of --micro-batch-size 2 ×",
    "--rampup-batch-size 8 8 64 --global-batch-size 64": "the size 8 is not a multiple of --micro-batch-size 2 ×",
    f"{PP2} --num-virtual-stages-per-pipeline-rank 2 --rampup-batch-size 8 8 64 --global-batch-size 32": (
        "the size 8 is not a multiple of --micro-batch-size 2 × data-parallel size 4 × --pipeline-model-parallel-size 2"
    ),
    "--rampup-batch-size 16 16 64 --step-batch-size-schedule 0:16": "both set the batch sizes; give one of them",
    "--step-batch-size-schedule 0:16,4K:32 --global-batch-size 16": "it is the last size there, 32; leave it out",
    "--step-batch-size-schedule 0:16,4K:24": "the size 24 is not a multiple of --micro-batch-size 2 × data-parallel",
    "--step-batch-size-schedule 128:16": "the first threshold must be 0",
    "--step-batch-size-schedule 16": "'16' is not THRESHOLD:SIZE",
    "--save-interval 5": "without --save",
    "--exit-interval 5": "without --save",
    "--finetune": "without --load",
    "--load nowhere": "does not exist",
    "--load nowhere/iter_0000003": "does not exist",
    "--mft-loss token --task-weights a=1": "no meaning with --mft-loss token",
    "--mft-loss focal-task --task-weights a=1": "its weights are --focal-alpha",
    "--mft-loss token --task-balance coba": "gives weights to tasks, which --mft-loss token does not take",
    "--mft-loss focal-sample --task-balance famo": "use task-token or task-sample",
    "--weighted_loss_mode coba --task-balance famo": "the loss coba means --task-balance coba, not famo",
    "--task-balance coba --task-weights a=1": "both set the weights",
    "--mft-loss focal-sample --mft-normalization micro-batch": "have no focal-sample",
    "--focal-gamma 1": "--focal-gamma has no effect without --mft-loss focal-sample or focal-task",
    "--focal-detach": "--focal-detach has no effect",
    "--mft-loss focal-sample --focal-gamma -1": "at least 0",
    "--coba-tau 3": "--coba-tau has no effect without --task-balance coba",
    "--task-balance coba --famo-lr 1": "--famo-lr has no effect without --task-balance famo",
    "--task-balance famo --selfpaced_interval 2": "--self-paced-update-interval has no effect",
    "--task-balance coba --coba-history-length 1": "at least 2",
    "--task-balance coba --coba-update-interval 0": "at least 1",
    "--task-balance self-paced --self-paced-scale-factor 0": "above 0",
    "--early-stopping-min-delta 0.1": "no effect without --early-stopping-patience, --task-early-stopping-patience or",
    "--task-early-stopping-patience 2 --early-stopping-metric macro": "no effect without --early-stopping-patience or",
    "--early-stopping-patience 0": "at least 1",
    "--early-stopping-patience 2 --early-stopping-min-delta -1": "at least 0",
    "--early-stopping-patience 2 --eval-iters 0": "needs evaluations",
    "--task-early-stopping-patience 2 --eval-iters 0": "needs evaluations",
    "--task-early-stopping-patience 2 --mft-loss sample": "which --mft-loss sample does not have",
    "--save-best": "without --save",
    "--task-balance famo --early-stopping-patience 2 --early-stopping-metric objective": "use macro or a task",
    "--task-early-stopping-patience 2 --save-best --save x --early-stopping-metric objective": "use macro or a task",
}


@pytest.mark.parametrize("extra", REFUSED)
def test_refused_in_one_line(extra):
    with pytest.raises(InputError) as refusal:
        parse(extra, world_size=8)
    assert REFUSED[extra] in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_too_few_ranks_are_named_whatever_follows_from_them():
    with pytest.raises(InputError, match="1 ranks cannot be divided into"):
        parse("--pipeline-model-parallel-size 2", world_size=1)


@pytest.mark.parametrize(
    "option",
    ["--num-layers 4", "--hidden-size 64", "--data-path data", "--micro-batch-size 2", "--train-iters 10", "--lr 1e-3"],
)
def test_missing_option_is_named(option):
    with pytest.raises(InputError, match=option.split()[0]):
        parse(base=BASE.replace(option, ""))


def checkpoint(folder, **changes):
    network = dataclasses.asdict(parse("--swiglu --position-embedding-type rope").network)
    info = CheckpointInfo(
        iteration=5,
        consumed_samples=10,
        architecture=network,
        vocab_size=100,
        tokenizer={},
        dataset_hash="abc",
        seed=7,
        global_batch_size=2,
    )
    path = folder / "iter_0000005"
    path.mkdir(parents=True)
    write_info(path, dataclasses.replace(info, **changes))
    (folder / TRACKER).write_text("5\n")
    return folder


WITHOUT_SHAPE = "--data-path data --seq-length 128 --micro-batch-size 2 --train-iters 10 --lr 1e-3"


def test_architecture_and_seed_come_from_the_checkpoint(tmp_path):
    a = parse(f"--load {checkpoint(tmp_path)}", base=WITHOUT_SHAPE)
    assert (a.network.num_layers, a.network.swiglu, a.network.position_embedding_type) == (4, True, "rope")
    assert a.initialization.seed == 7
    assert a.resume[1].iteration == 5
    assert parse(f"--load {tmp_path}/iter_0000005", base=WITHOUT_SHAPE).resume[1].iteration == 5
    assert parse(f"--load {tmp_path} --finetune", base=WITHOUT_SHAPE).initialization.seed == 1234


def test_contradicting_the_checkpoint_is_refused(tmp_path):
    folder = checkpoint(tmp_path)
    for extra, text in {
        "--num-layers 8": "the checkpoint .* has 4",
        "--normalization RMSNorm": "the checkpoint .* has LayerNorm",
        "--seed 3": "data order of seed 7",
        "--train-iters 5": "at iteration 5 already",
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


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for _, group in GROUPS:
        for field in dataclasses.fields(group):
            assert (field.metadata["flag"] or "--" + field.name.replace("_", "-")) in text
            assert field.metadata["text"].rstrip().endswith(".")


def test_effective_options_round_trip():
    a = parse("--mft-loss case4 --task-weights x=2 --hidden-dropout 0")
    options = a.as_options()
    assert (options["mft_loss"], options["task_weights"], options["hidden_dropout"]) == ("task-sample", ("x=2",), 0.0)
    assert len(options) == sum(len(dataclasses.fields(group)) for _, group in GROUPS)


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
