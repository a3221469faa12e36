"""Check that context-parallel and sequence-parallel ranks can split the tokens of a micro-batch."""

import math

from mft_megatron.arguments.table import Arguments


def check_context(a: Arguments) -> str | None:
    """Check that the tokens of a micro-batch are a multiple of what its ranks need."""
    d = a.distributed
    cp = d.context_parallel_size
    if d.cp_comm_type is not None and set(d.cp_comm_type) != {"all_gather"}:
        return (
            f"--cp-comm-type {' '.join(d.cp_comm_type)}: only all_gather; the others split each sample separately, so "
            "that samples would have to be padded, and need Transformer Engine; leave it out"
        )
    length = a.training.micro_batch_size * a.data.seq_length
    if length % d.stream_multiple == 0:
        return None
    tokens = f"--micro-batch-size {a.training.micro_batch_size} × --seq-length {a.data.seq_length} = {length} tokens"
    if cp == 1:
        return f"--sequence-parallel: --tensor-model-parallel-size {d.tensor_model_parallel_size} does not divide " + (
            f"{tokens}; pack the data for a --seq-length that it divides"
        )
    parts = f"2 × {cp} equal blocks"
    if d.sequence_parallel:
        parts += f", and those of a rank over --tensor-model-parallel-size {d.tensor_model_parallel_size}"
    step = d.stream_multiple // math.gcd(d.stream_multiple, a.training.micro_batch_size)
    return (
        f"--context-parallel-size {cp}: {tokens} cannot be cut into {parts}; pack the data for a --seq-length that is "
        f"a multiple of {step}"
    )
