"""The parallel layout and data parallelism."""

import dataclasses
import math

from mft_megatron.options import option


@dataclasses.dataclass(frozen=True)
class DistributedArguments:
    """The data-parallel size is world size / (tensor × pipeline × context)."""

    tensor_model_parallel_size: int = option(1, "Ranks that each layer is split over.", at_least=1)
    pipeline_model_parallel_size: int = option(1, "Ranks that the stack of layers is split over.", at_least=1)
    num_layers_per_virtual_pipeline_stage: int | None = option(
        None, "Interleave the pipeline in virtual stages of this many layers.", at_least=1
    )
    num_virtual_stages_per_pipeline_rank: int | None = option(
        None, "Interleave the pipeline in this many virtual stages on each rank.", at_least=1
    )
    decoder_first_pipeline_num_layers: int | None = option(
        None, "Layers of the first pipeline rank; the rest is distributed evenly over the others.", at_least=1
    )
    decoder_last_pipeline_num_layers: int | None = option(
        None, "Layers of the last pipeline rank; the rest is distributed evenly over the others.", at_least=1
    )
    account_for_embedding_in_pipeline_split: bool = option(
        False, "Count the embedding as a layer when layers are distributed: the first stage has one less."
    )
    account_for_loss_in_pipeline_split: bool = option(
        False, "Count the output layer and loss as a layer when layers are distributed: the last stage has one less."
    )
    pipeline_model_parallel_layout: str | None = option(
        None,
        "Content of each stage: E the embedding, t a layer, L the loss, | between stages, with *N and (…)*N for "
        "repetition, e.g. 'Et*3|(tt|)*29t|L'. More stages than pipeline ranks are virtual stages, assigned to the "
        "ranks in turn.",
    )
    context_parallel_size: int = option(
        1,
        "Ranks that the tokens of each micro-batch are split over. The micro-batch is split as a whole, not by "
        "sample, so nothing is padded.",
        at_least=1,
    )
    cp_comm_type: tuple[str, ...] | None = option(
        None,
        "How --context-parallel-size brings keys and values to queries. Unlike in Megatron the default, and the only "
        "way, is all_gather.",
    )
    sequence_parallel: bool = option(False, "Also split norms and dropout over the tensor-parallel ranks.")
    expert_model_parallel_size: int = option(
        1,
        "Ranks that the experts of each layer are distributed over; elsewhere these ranks are data-parallel.",
        at_least=1,
    )
    expert_tensor_parallel_size: int | None = option(
        None, "Ranks that each expert is split over. Not given: --tensor-model-parallel-size.", at_least=1
    )
    distributed_backend: str = option(
        "auto",
        "Process-group backend. Unlike in Megatron the default is nccl with CUDA and gloo without.",
        choices=("auto", "nccl", "gloo"),
    )
    distributed_timeout_minutes: int | None = option(
        None,
        "Longest duration of a collective operation of a step. At the start, up to the end of the first step, and "
        "while a checkpoint is written it is an hour, or more where --start-timeout or this is. Unlike in Megatron the "
        "default is 10, or 2 more than --stall-timeout if that is longer: --stall-timeout says which rank hangs, this "
        "does not.",
        at_least=1,
    )
    stall_timeout: float = option(
        10.0,
        "End a run that makes no progress for this many minutes: each rank writes where it is, with its Python stacks, "
        "into the folder stalls of --save, one line says which ranks did not arrive, and the exit code is 12. A "
        "micro-batch or an update is progress; raise this where one takes longer. 0: off.",
        at_least=0,
        metavar="MINUTES",
    )
    start_timeout: float = option(
        60.0,
        "The same for the start, the first step, and wherever a checkpoint is loaded, saved or checked. 0: off.",
        at_least=0,
        metavar="MINUTES",
    )

    use_distributed_optimizer: bool = option(
        False, "Each data-parallel rank keeps main weights and optimizer states only of its shard of the weights."
    )
    num_distributed_optimizer_instances: int = option(
        1,
        "Groups of data-parallel ranks that each hold all optimizer states, with --use-distributed-optimizer.",
        at_least=1,
    )
    overlap_grad_reduce: bool = option(
        False, "Reduce gradients over data-parallel ranks bucket by bucket during the backward pass."
    )
    overlap_param_gather: bool = option(
        False,
        "Gather weights bucket by bucket during the forward pass, with --use-distributed-optimizer and "
        "--overlap-grad-reduce.",
    )
    align_grad_reduce: bool = option(
        True,
        "With --overlap-grad-reduce and a pipeline each stage starts to reduce when its gradients are ready, not "
        "when all stages can.",
        flag="--no-align-grad-reduce",
    )
    align_param_gather: bool = option(
        True,
        "With --overlap-param-gather and virtual stages each stage gathers when it needs weights, not when all stages "
        "do.",
        flag="--no-align-param-gather",
    )
    ddp_bucket_size: int | None = option(
        None,
        "Weights of a bucket of --overlap-grad-reduce. Not given: 40 million, or 1 million × data-parallel size if "
        "that is more.",
        at_least=1,
    )
    ddp_num_buckets: int | None = option(
        None, "Buckets of --overlap-grad-reduce, in place of --ddp-bucket-size.", at_least=1
    )
    ddp_pad_buckets_for_high_nccl_busbw: bool = option(
        False, "Make buckets of the distributed optimizer a multiple of 65,536 weights, for many ranks on NCCL."
    )
    ddp_average_in_collective: bool = option(
        False, "Refused: gradients are summed over ranks, because the objective contains the whole normalisation."
    )

    @property
    def collective_minutes(self) -> int:
        """Longest duration of a collective of a step: the one asked for, or one that a stall is reported before."""
        default = max(10, math.ceil(self.stall_timeout) + 2)
        return default if self.distributed_timeout_minutes is None else self.distributed_timeout_minutes

    @property
    def splits_experts_otherwise(self) -> bool:
        """Whether experts are split over a different number of ranks than the rest of each layer."""
        return self.expert_tensor_parallel_size not in (None, self.tensor_model_parallel_size)

    @property
    def interleaved(self) -> bool:
        """Whether each rank has several virtual stages, interleaved with those of the other ranks."""
        return self.num_virtual_stages_per_pipeline_rank is not None

    @property
    def stream_multiple(self) -> int:
        """The number that the tokens of a micro-batch must be a multiple of.

        Each context-parallel rank has two blocks of equal length; sequence parallelism splits a rank's tokens again.
        """
        blocks = 1 if self.context_parallel_size == 1 else 2
        parts = self.tensor_model_parallel_size if self.sequence_parallel else 1
        return self.context_parallel_size * math.lcm(blocks, parts)
