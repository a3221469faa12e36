"""Check the recomputation of activations."""

from mft_megatron.arguments.stages import layers_of_stages
from mft_megatron.arguments.table import Arguments


def check_recompute_granularity(a: Arguments) -> str | None:
    """Check, before completion, that two options do not ask for different granularities."""
    if a.recompute.recompute_activations and a.recompute.recompute_granularity == "full":
        return "--recompute-activations means --recompute-granularity selective, not full; leave one of them out"
    return None


def check_recompute(a: Arguments) -> str | None:
    """Check the layers or modules that are recomputed."""
    r = a.recompute
    if r.recompute_granularity == "full":
        return _check_full(a)
    only_with_full = {
        "--recompute-method": r.recompute_method,
        "--recompute-num-layers": r.recompute_num_layers,
        "--distribute-saved-activations": r.distribute_saved_activations or None,
    }
    for name, value in only_with_full.items():
        if value is not None:
            given = name if value is True else f"{name} {value}"
            return f"{given} goes with --recompute-granularity full; add that, or leave it out"
    return _check_modules(a) if r.recompute_granularity == "selective" else None


def _check_modules(a: Arguments) -> str | None:
    n, modules = a.network, a.recompute.recompute_modules or ()
    kinds = {
        "mlp": (not all(n.expert_layers), "a dense layer, and all have experts"),
        "moe": (n.num_experts is not None, "experts: give --num-experts"),
        "moe_act": (a.moe.moe_grouped_gemm, "--moe-grouped-gemm: add that"),
        "shared_experts": (n.moe_shared_expert_intermediate_size is not None, "--moe-shared-expert-intermediate-size"),
    }
    for module, (there, wanted) in kinds.items():
        if module in modules and not there:
            return f"--recompute-modules {module} wants {wanted}; or leave {module} out"
    if "mlp" in modules and n.mlp_bias:
        return (
            "--recompute-modules mlp with biases: in the backward pass Megatron-Core waits for ever for the bias, an "
            "output of the recomputed part; give --disable-bias-linear without --add-mlp-bias, or leave mlp "
            "out"
        )
    if "shared_experts" in modules and a.moe.moe_shared_expert_overlap:
        return "--recompute-modules shared_experts does not go with --moe-shared-expert-overlap; leave one of them out"
    for module in ("layernorm", "moe_act"):
        if module in modules and a.transformer_engine.fp8_format and a.transformer_engine.fp8_recipe == "delayed":
            return (
                f"--recompute-modules {module} does not go with --fp8-recipe delayed, whose scales the second pass "
                "would change; use another recipe, or leave it out"
            )
    return None


def _check_full(a: Arguments) -> str | None:
    r, d = a.recompute, a.distributed
    if r.recompute_method is None or r.recompute_num_layers is None:
        return (
            "--recompute-granularity full needs --recompute-method uniform or block and --recompute-num-layers N; "
            "uniform with 1 takes least memory"
        )
    stages, unit = layers_of_stages(a.network.num_layers, d), r.recompute_num_layers
    wrong = next((layers for layers in stages if layers % unit), None)
    if r.recompute_method == "uniform" and wrong is not None:
        return (
            f"--recompute-num-layers {unit} does not divide the {wrong} layers of a stage (--num-layers "
            f"{a.network.num_layers}, {len(stages)} stage(s)), as --recompute-method uniform wants; take a divisor, or "
            "--recompute-method block"
        )
    if unit > max(stages):
        return f"--recompute-num-layers {unit}: a stage has {max(stages)} layers; give no more"
    if r.distribute_saved_activations and d.tensor_model_parallel_size == 1:
        return (
            "--distribute-saved-activations splits them over tensor-parallel ranks: give --tensor-model-parallel-size "
            "of at least 2, or leave it out"
        )
    if r.distribute_saved_activations and d.sequence_parallel:
        return "--distribute-saved-activations: with --sequence-parallel they are already split; leave it out"
    size, tp = (
        a.training.micro_batch_size * a.data.seq_length * a.network.hidden_size,
        d.tensor_model_parallel_size,
    )
    if r.distribute_saved_activations and size % tp:
        return (
            f"--distribute-saved-activations: --tensor-model-parallel-size {tp} does not divide --micro-batch-size × "
            f"--seq-length × --hidden-size = {size}; leave it out"
        )
    return None
