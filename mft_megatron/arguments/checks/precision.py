"""Check that number formats, optimizer and data parallelism fit each other."""

from mft_megatron.arguments.table import Arguments


def check_precision(a: Arguments) -> str | None:
    """Check number formats and the loss scale."""
    p = a.precision
    if p.fp16 and p.bf16:
        return "--fp16 and --bf16 are two formats of the same weights; give one of them"
    if p.fp32_residual_connection and a.transformer_engine.transformer_impl == "transformer_engine":
        return (
            "--fp32-residual-connection with --transformer-impl transformer_engine: its norms are part of linear "
            "layers, whose input must have the dtype of their weights; use --transformer-impl local"
        )
    if p.grad_reduce_in_bf16 and p.accumulate_allreduce_grads_in_fp32:
        return (
            "--grad-reduce-in-bf16 and --accumulate-allreduce-grads-in-fp32 exclude each other; leave one of them out"
        )
    if p.accumulate_allreduce_grads_in_fp32 and p.main_grads_dtype != "fp32":
        return (
            f"--main-grads-dtype {p.main_grads_dtype} with --accumulate-allreduce-grads-in-fp32: gradients have one "
            "dtype; leave one of them out"
        )
    experts_apart = a.distributed.expert_model_parallel_size > 1 or a.distributed.splits_experts_otherwise
    if p.dynamic_loss_scale and experts_apart:
        return (
            "--fp16 with --expert-model-parallel-size or --expert-tensor-parallel-size: Megatron-Core 0.16.1 gives "
            "experts a separate loss scale, which differs from that of the loss after an overflow; train with --bf16, "
            "or give a constant --loss-scale"
        )
    if p.dynamic_loss_scale and p.min_loss_scale > p.initial_loss_scale:
        return f"--min-loss-scale {p.min_loss_scale:g} is above --initial-loss-scale {p.initial_loss_scale:g}; lower it"
    if p.loss_scale_window != int(p.loss_scale_window):
        return f"--loss-scale-window {p.loss_scale_window}: must be a whole number of steps"
    return None


def check_optimizer(a: Arguments) -> str | None:
    """Check what the distributed, precision-aware and offloaded optimizers need."""
    p, d, t = a.precision, a.distributed, a.training
    if d.use_distributed_optimizer and t.optimizer != "adam":
        return f"--use-distributed-optimizer knows Adam only, not --optimizer {t.optimizer}; leave one of them out"
    if p.use_precision_aware_optimizer and not d.use_distributed_optimizer:
        return (
            "--use-precision-aware-optimizer works with the distributed optimizer only: add --use-distributed-optimizer"
        )
    if t.optimizer_cpu_offload and not p.use_precision_aware_optimizer:
        return (
            "--optimizer-cpu-offload works with --use-precision-aware-optimizer and --use-distributed-optimizer only, "
            "as in Megatron: add them"
        )
    if t.optimizer_cpu_offload and p.name == "fp32":
        return "--optimizer-cpu-offload: Megatron-Core 0.16.1 loads no such states of fp32 weights; add --bf16"
    if not t.check_for_nan_in_loss_and_grad:
        return "--no-check-for-nan-in-loss-and-grad: the check is part of clipping and cannot be left out; leave it out"
    return None


def check_data_parallelism(a: Arguments) -> str | None:
    """Check the buckets of gradients and weights, and the instances of the distributed optimizer."""
    d = a.distributed
    if d.ddp_average_in_collective:
        return (
            "--ddp-average-in-collective: gradients are summed over ranks, because the objective contains the "
            "whole normalisation; leave it out"
        )
    if d.overlap_param_gather and not d.use_distributed_optimizer:
        return (
            "--overlap-param-gather gathers the weights of the distributed optimizer: add --use-distributed-optimizer, "
            "or leave it out"
        )
    if d.overlap_param_gather and not d.overlap_grad_reduce:
        return "--overlap-param-gather uses the buckets of --overlap-grad-reduce: add that, or leave it out"
    if d.ddp_bucket_size is not None and d.ddp_num_buckets is not None:
        return (
            f"--ddp-bucket-size {d.ddp_bucket_size} and --ddp-num-buckets {d.ddp_num_buckets} both set the size of "
            "buckets; give one of them"
        )
    instances = d.num_distributed_optimizer_instances
    if a.data_parallel_size % instances:
        return (
            f"--num-distributed-optimizer-instances {instances} does not divide the data-parallel size "
            f"{a.data_parallel_size}; change one of them"
        )
    return None
