"""The command line of pretrain_mft.py without a device: defaults and derived values."""

import pytest

from mft_megatron.loss_names import LOSSES
from tests.arguments.command_line import parse
from tests.command_lines import SHORT_RUN
from tests.refusals import refused


def test_defaults_are_megatrons():
    a = parse()
    assert (a.regularization.attention_dropout, a.regularization.hidden_dropout) == (0.1, 0.1)
    assert (a.network.position_embedding_type, a.network.normalization) == ("learned_absolute", "LayerNorm")
    assert a.network.add_bias_linear
    assert a.network.tie_embeddings
    assert (a.initialization.seed, a.learning_rate.lr_decay_style, a.regularization.clip_grad) == (1234, "linear", 1.0)
    assert (a.logging.log_interval, a.validation.eval_interval) == (100, 1000)


def test_derived_values():
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
def test_either_option_gives_virtual_stages(option, stages):
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
    base = SHORT_RUN.replace("--seq-length 128 ", "")
    assert parse(base=base, lengths=lambda prefix: [256]).data.seq_length == 256
    with refused("give --seq-length; data is packed for 128, 256"):
        parse(base=base, lengths=lambda prefix: [128, 256])


@pytest.mark.parametrize(
    "option",
    ["--num-layers 4", "--hidden-size 64", "--data-path data", "--micro-batch-size 2", "--train-iters 10", "--lr 1e-3"],
)
def test_missing_option_is_named(option):
    with refused(option.split()[0]):
        parse(base=SHORT_RUN.replace(option, ""))
