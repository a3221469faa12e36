"""Check that adapters can be trained as the options say."""

import os

from mft_megatron.arguments.table import Arguments
from mft_megatron.lora import MLP

# Elements that share a scale in 4 bits.
BLOCK = 64


def check_adapters(a: Arguments) -> str | None:
    """Check the targets of adapters, the model that they belong to, and the folder of their checkpoints."""
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
    return (_check_quantized(a) if a.lora.peft_type == "qlora" else _check_base(a)) or _check_folder(a)


def check_trained_model(a: Arguments) -> str | None:
    """Check that adapters belong to a model that was trained; of the command alone.

    Tests and benchmarks that build a model themselves use random weights.
    """
    if a.adapters is None or a.resume is not None:
        return None
    return (
        f"--peft-type {a.lora.peft_type}: there is no model, and adapters beside random weights learn nothing of use; "
        "give --hf-checkpoint DIR, --pretrained-checkpoint CKPT or --load"
    )


def _check_base(a: Arguments) -> str | None:
    if a.base is None and a.resume is None and a.lora.save_adapters_only:
        return "--save-adapters-only: the model has random weights, and would be in no checkpoint; leave it out"
    if a.base is None and a.resume is not None and not a.saves_base:
        return (
            f"--save-adapters-only: {a.resume.path} holds model and adapters, and checkpoints that hold only adapters "
            "belong to a model in a separate folder; leave the option out"
        )
    return None


def _check_folder(a: Arguments) -> str | None:
    """Check that checkpoints of adapters neither overwrite the model that they need nor have it removed with them."""
    if a.base is None or a.saves_base or a.reads_hf or a.checkpoint.save is None:
        return None
    if os.path.dirname(os.path.realpath(a.base.path)) != os.path.realpath(a.checkpoint.save):
        return None
    return (
        f"--save {a.checkpoint.save}: the model {a.base.path} is in that folder, and checkpoints of its adapters would "
        "replace it; save to another folder"
    )


def _check_quantized(a: Arguments) -> str | None:
    if a.base is None and a.resume is not None and a.resume.info.lora is not None:
        return (
            f"--peft-type qlora: {a.resume.path} holds model and adapters; write the adapters with "
            "tools/convert_checkpoint.py lora-to-peft and start from the model itself with --hf-adapter"
        )
    if a.base is None:
        return (
            "--peft-type qlora needs a model to start from: give --hf-checkpoint DIR or --pretrained-checkpoint CKPT, "
            "a checkpoint without adapters"
        )
    n, ranks = a.network, a.distributed.tensor_model_parallel_size
    rows = {
        "linear_qkv": (n.hidden_size, 1),
        "linear_proj": (n.num_attention_heads * n.kv_channels, ranks),
        "linear_fc2": (BLOCK * ranks if all(n.expert_layers) else n.ffn_hidden_size, ranks),
    }
    for module, (columns, parts) in rows.items():
        if columns // parts % BLOCK:
            fewer = "a smaller --tensor-model-parallel-size, or " if columns % BLOCK == 0 else ""
            return (
                f"--peft-type qlora: rows of {module} have {columns // parts} elements on a rank, which are no whole "
                f"blocks of {BLOCK}; take {fewer}--peft-type lora"
            )
    return None
