"""Check that fp8 can be computed with these sizes; the device is checked when the model is built."""

from mft_megatron.arguments.groups.transformer_engine import FP8_MULTIPLES
from mft_megatron.arguments.table import Arguments


def check_fp8(a: Arguments) -> str | None:
    """Check number format, layers and sizes."""
    e = a.transformer_engine
    if e.fp8_param_gather:
        return (
            "--fp8-param-gather: weights are initialised, loaded and gathered in bf16 here, and converted where "
            "they are used; leave it out"
        )
    if e.fp8_format is None:
        return None
    fp8 = f"--fp8-format {e.fp8_format}"
    if a.precision.name != "bf16":
        return f"{fp8} has bf16 around it, and this run is {a.precision.name}; give --bf16"
    if e.transformer_impl != "transformer_engine":
        return f"{fp8} is computed by Transformer Engine; give --transformer-impl transformer_engine"
    if e.first_last_layers_bf16 and e.fp8_recipe == "delayed":
        return (
            "--first-last-layers-bf16 does not go with --fp8-recipe delayed, whose scales are reduced for all layers "
            "at once; use --fp8-recipe tensorwise"
        )
    if e.first_last_layers_bf16:
        stage = a.network.num_layers // a.distributed.pipeline_model_parallel_size
        for name, number in (
            ("--num-layers-at-start-in-bf16", e.num_layers_at_start_in_bf16),
            ("--num-layers-at-end-in-bf16", e.num_layers_at_end_in_bf16),
        ):
            if number > stage:
                return f"{name} {number} is more than the {stage} layers of a pipeline stage; lower it"
    return _check_sizes(a, f"{fp8} with --fp8-recipe {e.fp8_recipe}", FP8_MULTIPLES[e.fp8_recipe])


def _check_sizes(a: Arguments, fp8: str, multiple: int) -> str | None:
    n, d = a.network, a.distributed
    tp = d.tensor_model_parallel_size
    cp, head = d.context_parallel_size, n.kv_channels
    sizes = {
        f"--hidden-size {n.hidden_size}": n.hidden_size,
        f"--ffn-hidden-size {n.ffn_hidden_size} / --tensor-model-parallel-size {tp}": n.ffn_hidden_size // tp,
        f"--num-attention-heads {n.num_attention_heads} × --kv-channels {head} / --tensor-model-parallel-size {tp}": (
            n.num_attention_heads * head // tp
        ),
        f"--num-query-groups {n.num_query_groups} × --kv-channels {head} / --tensor-model-parallel-size {tp}": (
            n.num_query_groups * head // tp
        ),
        # With sequence parallelism each rank converts its part before the all-gather.
        f"--micro-batch-size {a.training.micro_batch_size} × --seq-length {a.data.seq_length} / "
        f"{cp * (tp if d.sequence_parallel else 1)} ranks that split it": (
            a.training.micro_batch_size * a.data.seq_length // (cp * (tp if d.sequence_parallel else 1))
        ),
    }
    if n.num_experts is not None:
        etp = d.expert_tensor_parallel_size or tp
        sizes[f"--moe-ffn-hidden-size {n.expert_size} / expert-tensor size {etp}"] = n.expert_size // etp
    for name, size in sizes.items():
        if size % multiple:
            return f"{fp8} needs multiples of {multiple}, and {name} = {size} is none; change it"
    return None
