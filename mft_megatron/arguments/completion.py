"""Values of options that were not given and follow from others: one function for each group that has any."""

import dataclasses

from mft_megatron.arguments.groups.checkpointing import CheckpointArguments
from mft_megatron.arguments.groups.distributed import DistributedArguments
from mft_megatron.arguments.groups.learning_rate import LearningRateArguments
from mft_megatron.arguments.groups.mixed_precision import MixedPrecisionArguments
from mft_megatron.arguments.groups.multi_task import MultiTaskArguments
from mft_megatron.arguments.groups.network import NetworkArguments
from mft_megatron.arguments.groups.recompute import RecomputeArguments
from mft_megatron.arguments.groups.training import TrainingArguments
from mft_megatron.arguments.stages import virtual_stages
from mft_megatron.loss_names import FINE_TUNING_NORMALIZATION, FOCAL, WEIGHTED
from mft_megatron.options import is_given

from .adapters import adapters_of
from .table import Arguments


def complete(a: Arguments) -> Arguments:
    """Return the arguments with all derived values; complete arguments stay as they are."""
    a = dataclasses.replace(a, network=_network(a))
    a = dataclasses.replace(a, adapters=adapters_of(a.lora, a.network))
    a = dataclasses.replace(a, training=_training(a))
    return dataclasses.replace(
        a,
        recompute=_recompute(a),
        distributed=_distributed(a),
        learning_rate=_learning_rate(a),
        checkpoint=_checkpoint(a),
        precision=_precision(a),
        multi_task=_multi_task(a),
    )


def _network(a: Arguments) -> NetworkArguments:
    network = a.network
    if not is_given(network, "ffn_hidden_size"):
        size = 4 * network.hidden_size
        size = int(size * 2 / 3) // 64 * 64 if network.swiglu else size
        network = dataclasses.replace(network, ffn_hidden_size=size)
    if network.num_experts is not None and network.moe_ffn_hidden_size is None:
        network = dataclasses.replace(network, moe_ffn_hidden_size=network.ffn_hidden_size)
    if not is_given(network, "kv_channels"):
        network = dataclasses.replace(network, kv_channels=network.hidden_size // network.num_attention_heads)
    if not network.group_query_attention:
        network = dataclasses.replace(network, num_query_groups=network.num_attention_heads)
    if not is_given(network, "max_position_embeddings"):
        network = dataclasses.replace(network, max_position_embeddings=a.data.seq_length)
    return network


def _training(a: Arguments) -> TrainingArguments:
    training = _batch_size(a)
    if a.total_packs is None:
        return training
    steps, consumed = a.progress
    sizes = dataclasses.replace(a, training=training).batch_sizes
    return dataclasses.replace(training, train_iters=steps + sizes.steps(consumed, a.total_packs))


def _batch_size(a: Arguments) -> TrainingArguments:
    training = a.training
    if training.step_batch_size_schedule is not None:
        return dataclasses.replace(training, global_batch_size=a.batch_sizes.sizes[-1])
    if not is_given(training, "global_batch_size"):
        # With fewer ranks than the parallel layout needs the data-parallel size is 0, which a check refuses later.
        size = training.micro_batch_size * max(a.data_parallel_size, 1)
        return dataclasses.replace(training, global_batch_size=size)
    return training


def _recompute(a: Arguments) -> RecomputeArguments:
    recompute = a.recompute
    if recompute.recompute_activations:  # another name for selective
        recompute = dataclasses.replace(recompute, recompute_activations=False, recompute_granularity="selective")
    if recompute.recompute_granularity == "selective" and recompute.recompute_modules is None:
        recompute = dataclasses.replace(recompute, recompute_modules=("core_attn",))
    return recompute


def _distributed(a: Arguments) -> DistributedArguments:
    layout = a.distributed
    return dataclasses.replace(
        layout,
        num_layers_per_virtual_pipeline_stage=None,  # the number of virtual stages replaces it
        num_virtual_stages_per_pipeline_rank=virtual_stages(a.network.num_layers, layout),
    )


def _learning_rate(a: Arguments) -> LearningRateArguments:
    if is_given(a.learning_rate, "lr_decay_iters"):
        return a.learning_rate
    return dataclasses.replace(a.learning_rate, lr_decay_iters=a.training.train_iters)


def _checkpoint(a: Arguments) -> CheckpointArguments:
    return dataclasses.replace(a.checkpoint, dist_ckpt_optim_fully_reshardable=True)


def _precision(a: Arguments) -> MixedPrecisionArguments:
    precision = a.precision
    if precision.bf16 and not precision.grad_reduce_in_bf16 and precision.main_grads_dtype == "fp32":
        precision = dataclasses.replace(precision, accumulate_allreduce_grads_in_fp32=True)
    return precision


def _multi_task(a: Arguments) -> MultiTaskArguments:
    if is_given(a.multi_task, "mft_normalization"):
        return a.multi_task
    return dataclasses.replace(a.multi_task, mft_normalization=default_normalization(a)[0])


def default_normalization(a: Arguments) -> tuple[str, str]:
    """``--mft-normalization`` where it is not given, and in words where that comes from."""
    loss = a.multi_task.mft_loss
    if loss in FOCAL:
        return "global", "the default"
    if a.resume is not None and not a.weights_alone:
        return a.resume.info.mft_normalization, "that of the checkpoint"
    if a.resume is not None and loss in WEIGHTED:
        return FINE_TUNING_NORMALIZATION, "the default of fine-tuning"
    return "global", "the default"
