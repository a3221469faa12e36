"""The layout: which ranks share what."""

import dataclasses

from mft_megatron.options import option


@dataclasses.dataclass(frozen=True)
class DistributedArguments:
    """Data-parallel size is what is left: world size / (tensor × pipeline)."""

    tensor_model_parallel_size: int = option(1, "Ranks that share each layer.", at_least=1)
    pipeline_model_parallel_size: int = option(1, "Ranks that share the stack of layers.", at_least=1)
    num_layers_per_virtual_pipeline_stage: int | None = option(
        None, "Interleave the pipeline in virtual stages of this many layers.", type=int, at_least=1
    )
    num_virtual_stages_per_pipeline_rank: int | None = option(
        None, "Interleave the pipeline in this many virtual stages on each rank.", type=int, at_least=1
    )
    sequence_parallel: bool = option(False, "Split norms and dropout over the tensor-parallel ranks, too.")
    distributed_backend: str = option(
        "auto",
        "Process-group backend. Unlike in Megatron the default is nccl with CUDA and gloo without.",
        choices=("auto", "nccl", "gloo"),
    )
    distributed_timeout_minutes: int = option(10, "How long a collective may take.", at_least=1)

    @property
    def interleaved(self) -> bool:
        """Whether each rank has several stages, which take turns with those of the other ranks."""
        return self.num_virtual_stages_per_pipeline_rank is not None
