"""Limits of the kernels of ``--attention-backend``, as far as they are known without a device.

======== ================= ============ ======== ==================
name     number formats    size of head dropout  with dropout
======== ================= ============ ======== ==================
local    all               all          yes      all
varlen   bf16, fp16        8, 16 … 256  no
flash    bf16, fp16        1 … 256      yes      all
fused    bf16, fp16        8, 16 … 256  yes      no window, no context parallelism
======== ================= ============ ======== ==================
"""

import dataclasses

BACKENDS = ("auto", "local", "varlen", "flash", "fused")
LONGEST_HEAD = 256
# Kernels that do not pad heads, so that their size must be a multiple of HEAD_MULTIPLE.
WHOLE_HEADS = ("varlen", "fused")
HEAD_MULTIPLE = 8


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """The attention that a run needs.

    Attributes:
        precision: number format of queries, keys and values: fp32, bf16 or fp16.
        head_size: elements of a head.
        dropout: dropout of attention weights in training.
        window: tokens to its left that a token attends to in layers with a window, itself not counted; or ``None``.
        context_parallel: whether slices of a segment have fewer queries than keys.
        grouped_queries: whether several heads of queries share one of keys and values.
    """

    precision: str
    head_size: int
    dropout: float = 0.0
    window: int | None = None
    context_parallel: bool = False
    grouped_queries: bool = False


def limit_of(backend: str, shape: AttentionShape) -> str | None:
    """The reason why a backend cannot compute this on any device, and the remedy; ``None`` if it can.

    The text follows the backend's name: "flash computes in bf16 or fp16 …".
    """
    if backend in ("auto", "local"):
        return None
    if backend == "unfused":
        return "is for rows with a mask, and packs are streams without one; use local, which is plain PyTorch"
    if shape.precision not in ("bf16", "fp16"):
        return f"computes in bf16 or fp16, not in {shape.precision}; give --bf16, or use local"
    if shape.head_size > LONGEST_HEAD:
        return f"takes heads of up to {LONGEST_HEAD}, and --kv-channels is {shape.head_size}; use local"
    if backend in WHOLE_HEADS and shape.head_size % HEAD_MULTIPLE:
        return (
            f"takes heads of a multiple of {HEAD_MULTIPLE}, and --kv-channels is {shape.head_size}; use flash or local"
        )
    if shape.dropout and backend == "varlen":
        return f"has no dropout, and --attention-dropout is {shape.dropout}; give 0 there, or use flash or local"
    if shape.dropout and backend == "fused" and (shape.window is not None or shape.context_parallel):
        with_what = "--window-size" if shape.window is not None else "--context-parallel-size"
        return (
            f"has no dropout with {with_what}, and --attention-dropout is {shape.dropout}; give 0 there, or use flash "
            "or local"
        )
    return None
