"""Check that the kernel of ``--attention-backend`` can compute this model's attention."""

from mft_megatron.arguments.table import Arguments
from mft_megatron.arguments.values.attention import AttentionShape, limit_of


def check_attention(a: Arguments) -> str | None:
    """Check the kernel against precision, head size, dropout, window and context parallelism."""
    backend = a.training.attention_backend
    shape = AttentionShape(
        a.precision.name,
        a.network.kv_channels,
        a.regularization.attention_dropout,
        a.network.window,
        a.distributed.context_parallel_size > 1,
    )
    reason = limit_of(backend, shape)
    return None if reason is None else f"--attention-backend {backend} {reason}"
