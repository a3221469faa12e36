"""Options of number formats, the optimizer and data parallelism, as far as no device is needed."""

import pytest

from mft_megatron.mcore.parallel.data_parallel import data_parallel_config
from mft_megatron.run_folder.description import CheckpointInfo, write_info
from mft_megatron.run_folder.names import TRACKER
from tests.arguments.command_line import parse
from tests.refusals import refused

SHARDED = "--use-distributed-optimizer"
OVERLAP = f"{SHARDED} --overlap-grad-reduce --overlap-param-gather"
PRECISE = f"{SHARDED} --use-precision-aware-optimizer"
VPP = "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 --global-batch-size 8"


def test_defaults_are_megatrons():
    a = parse("--fp16")
    p, d, t = a.precision, a.distributed, a.training
    assert (p.name, p.initial_loss_scale, p.min_loss_scale, p.loss_scale_window, p.hysteresis) == (
        "fp16", 2.0**32, 1.0, 1000.0, 2,
    )  # fmt: skip
    assert (p.loss_scale, p.dynamic_loss_scale, p.accumulate_allreduce_grads_in_fp32) == (None, True, False)
    assert {d.use_distributed_optimizer, d.overlap_grad_reduce, d.overlap_param_gather} == {False}
    assert (d.align_grad_reduce, d.align_param_gather, d.num_distributed_optimizer_instances) == (True, True, 1)
    assert (t.optimizer, a.regularization.sgd_momentum, t.optimizer_offload_fraction) == ("adam", 0.9, 1.0)
    assert a.checkpoint.ckpt_fully_parallel_save
    assert {a.checkpoint.ckpt_fully_parallel_load, a.checkpoint.async_save} == {False}
    # Megatron's default is off.
    assert a.checkpoint.dist_ckpt_optim_fully_reshardable


@pytest.mark.parametrize(
    ("extra", "wide"),
    [("", False), ("--bf16", True), ("--bf16 --grad-reduce-in-bf16", False), ("--fp16", False),
     (f"--bf16 {PRECISE} --main-grads-dtype bf16", False), ("--fp16 --accumulate-allreduce-grads-in-fp32", True)],
)  # fmt: skip
def test_gradients_are_fp32_where_megatrons_are(extra, wide):
    a = parse(extra)
    assert a.precision.accumulate_allreduce_grads_in_fp32 == wide
    assert data_parallel_config(a).grad_reduce_in_fp32 == wide


def test_the_configuration_of_data_parallelism():
    config = data_parallel_config(parse(OVERLAP))
    assert {config.use_distributed_optimizer, config.overlap_grad_reduce, config.overlap_param_gather} == {True}
    # Megatron-Core aligns the gathers of interleaved stages only.
    assert not config.align_param_gather
    assert data_parallel_config(parse(f"{OVERLAP} {VPP}", 2)).align_param_gather
    assert not data_parallel_config(parse(f"{OVERLAP} {VPP} --no-align-param-gather", 2)).align_param_gather
    assert not config.average_in_collective
    assert data_parallel_config(parse("--overlap-grad-reduce --ddp-bucket-size 7")).bucket_size == 7
    assert data_parallel_config(parse("--overlap-grad-reduce --ddp-num-buckets 3"), 100).bucket_size == 33
    assert data_parallel_config(parse("--overlap-grad-reduce --ddp-num-buckets 3"), 2).bucket_size == 1
    padded = data_parallel_config(parse(f"{SHARDED} --ddp-pad-buckets-for-high-nccl-busbw"))
    assert padded.pad_buckets_for_high_nccl_busbw


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ("--fp16 --bf16", "one of them"),
        ("--fp16 --num-experts 4 --disable-bias-linear --expert-model-parallel-size 2", "--expert-model-parallel-size"),
        ("--fp32-residual-connection", "--fp16 or --bf16"),
        ("--bf16 --fp32-residual-connection --transformer-impl transformer_engine", "--transformer-impl local"),
        ("--bf16 --grad-reduce-in-bf16 --accumulate-allreduce-grads-in-fp32", "exclude each other"),
        ("--grad-reduce-in-bf16", "without --bf16"),
        (f"--bf16 {PRECISE} --main-grads-dtype bf16 --accumulate-allreduce-grads-in-fp32", "--main-grads-dtype"),
        ("--loss-scale 4", "without --fp16 or --bf16"),
        ("--fp16 --loss-scale 0", "above 0"),
        ("--fp16 --loss-scale 4 --hysteresis 2", "--hysteresis has no effect"),
        ("--bf16 --initial-loss-scale 4", "--initial-loss-scale has no effect"),
        ("--fp16 --initial-loss-scale 4 --min-loss-scale 8", "--min-loss-scale 8 is above --initial-loss-scale 4"),
        ("--fp16 --loss-scale-window 1.5", "whole number"),
        ("--fp16 --loss-scale-window 0", "at least 1"),
        ("--optimizer sgd --use-distributed-optimizer", "Adam only"),
        ("--sgd-momentum 0.5", "--optimizer sgd"),
        ("--optimizer sgd --adam-beta1 0.5", "--optimizer adam"),
        ("--use-precision-aware-optimizer", "--use-distributed-optimizer"),
        (f"{SHARDED} --optimizer-cpu-offload", "--use-precision-aware-optimizer"),
        (f"{PRECISE} --optimizer-cpu-offload", "add --bf16"),
        (f"{SHARDED} --exp-avg-dtype bf16", "--use-precision-aware-optimizer"),
        ("--optimizer-offload-fraction 0.5", "--optimizer-cpu-offload"),
        ("--overlap-cpu-optimizer-d2h-h2d", "--optimizer-cpu-offload"),
        ("--use-torch-optimizer-for-cpu-offload", "--optimizer-cpu-offload"),
        ("--no-check-for-nan-in-loss-and-grad", "leave it out"),
        ("--ddp-average-in-collective", "summed"),
        ("--overlap-param-gather", "--use-distributed-optimizer"),
        (f"{SHARDED} --overlap-param-gather", "--overlap-grad-reduce"),
        ("--ddp-bucket-size 5", "--overlap-grad-reduce"),
        ("--overlap-grad-reduce --ddp-bucket-size 5 --ddp-num-buckets 5", "give one of them"),
        ("--overlap-grad-reduce --ddp-bucket-size 0", "at least 1"),
        ("--ddp-pad-buckets-for-high-nccl-busbw", "--use-distributed-optimizer"),
        (f"{SHARDED} --num-distributed-optimizer-instances 2", "does not divide the data-parallel size 1"),
        ("--num-distributed-optimizer-instances 2", "--use-distributed-optimizer"),
        ("--no-align-grad-reduce", "--overlap-grad-reduce"),
        ("--no-align-param-gather", "--overlap-param-gather"),
        ("--async-save", "--save"),
    ],
)
def test_contradictions_are_refused(extra, named):
    with refused(named):
        parse(extra)


def _checkpoint(folder, **described):
    path = folder / "iter_0000003"
    path.mkdir()
    architecture = {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4}
    write_info(path, CheckpointInfo(3, 24, architecture, 500, {}, "", 1, 8, **described))
    (folder / TRACKER).write_text("3\n")


@pytest.mark.parametrize(
    ("described", "extra", "named"),
    [
        ({"precision": "fp16"}, "--bf16", "its optimizer is of a fp16 run, this one is bf16"),
        ({"precision": "bf16"}, "--fp16", "its optimizer is of a bf16 run, this one is fp16"),
        ({"optimizer": "sgd"}, "", "its optimizer is sgd, this run's is adam"),
        ({}, "--optimizer sgd", "its optimizer is adam, this run's is sgd"),
        ({"optimizer": "sgd without momentum"}, "--optimizer sgd", "this run's is sgd;"),
    ],
)
def test_optimizer_states_of_another_kind_are_not_loaded(tmp_path, described, extra, named):
    _checkpoint(tmp_path, **described)
    with refused(named):
        parse(f"--load {tmp_path} {extra}")
    parse(f"--load {tmp_path} {extra} --no-load-optim")
    parse(f"--load {tmp_path} {extra} --finetune")


def test_either_optimizer_loads_the_states_of_the_other(tmp_path):
    _checkpoint(tmp_path, distributed_optimizer=True)
    parse(f"--load {tmp_path}")
    parse(f"--load {tmp_path} {OVERLAP}")
