"""Number formats."""

import dataclasses

from mft_megatron.options import option


@dataclasses.dataclass(frozen=True)
class MixedPrecisionArguments:
    """fp32 where nothing is given."""

    bf16: bool = option(False, "bfloat16 weights and activations, with fp32 main weights.")
    accumulate_allreduce_grads_in_fp32: bool = option(
        False, "Accumulate and reduce gradients in fp32; always on with --bf16, as in Megatron."
    )

    @property
    def name(self) -> str:
        """fp32 or bf16."""
        return "bf16" if self.bf16 else "fp32"
