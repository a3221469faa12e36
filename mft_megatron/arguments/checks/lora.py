"""Whether adapters can be trained as the options say."""

from mft_megatron.arguments.table import Arguments
from mft_megatron.lora import MLP

# elements that have a magnitude together in 4 bits
BLOCK = 64


def check_adapters(a: Arguments) -> str | None:
    lora = a.adapters
    if lora is None:
        return None
    if a.network.num_experts is not None and (mlp := next((m for m in MLP if lora.target(m)), None)):
        return (
            f"--lora-target-modules: {mlp} of experts cannot have adapters; name those of attention alone, e.g. "
            "linear_qkv linear_proj"
        )
    if a.transformer_engine.transformer_impl != "local":
        return (
            f"--peft-type {a.lora.peft_type} goes with --transformer-impl local: Transformer Engine has the norm "
            "inside the linear layer, whose input an adapter needs; leave --transformer-impl out"
        )
    if a.learning_rate.decoupled_lr is not None:
        return "--decoupled-lr is of embedding and output layer, which adapters leave as they are; leave it out"
    return _check_quantized(a) if a.lora.peft_type == "qlora" else _check_base(a)


def _check_base(a: Arguments) -> str | None:
    if a.base is None and a.resume is None and a.lora.save_adapters_only:
        return "--save-adapters-only: the model is drawn from the seed, and would be in no checkpoint; leave it out"
    if a.base is None and a.resume is not None and not a.saves_base:
        return (
            f"--load {a.checkpoint.load}: it holds model and adapters, and checkpoints of adapters alone belong to a "
            "model in a folder of its own; leave --save-adapters-only out"
        )
    return None


def _check_quantized(a: Arguments) -> str | None:
    if a.base is None:
        return (
            "--peft-type qlora needs a model to start from: give --hf-checkpoint DIR or --pretrained-checkpoint CKPT, "
            "a checkpoint without adapters"
        )
    n, ranks = a.network, a.distributed.tensor_model_parallel_size
    rows = {
        "linear_qkv": n.hidden_size,
        "linear_proj": n.num_attention_heads * n.kv_channels // ranks,
        "linear_fc2": BLOCK if all(n.expert_layers) else n.ffn_hidden_size // ranks,
    }
    for module, columns in rows.items():
        if columns % BLOCK:
            return (
                f"--peft-type qlora: rows of {module} have {columns} elements on a rank, which are no whole blocks of "
                f"{BLOCK}; take a smaller --tensor-model-parallel-size, or --peft-type lora"
            )
    return None
