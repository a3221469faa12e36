"""Adapters: a frozen model and small trained matrices beside its own."""

import dataclasses

from mft_megatron.options import option


@dataclasses.dataclass(frozen=True)
class LoraArguments:
    """Low-rank adapters on the linear layers. None of these options is Megatron's."""

    peft_type: str = option(
        "none",
        "Train the whole model, adapters beside the frozen model, or adapters beside a frozen model whose matrices are "
        "kept in 4 bits (NF4).",
        choices=("none", "lora", "qlora"),
        aliases=("--peft_type",),
    )
    lora_rank: int = option(32, "Rank of the adapters.", at_least=1, aliases=("--lora_rank",))
    lora_alpha: float = option(
        32.0, "Adapters count alpha / rank, with --use-rslora alpha / √rank.", above=0, aliases=("--lora_alpha",)
    )
    lora_dropout: float = option(
        0.0,
        "Dropout of what an adapter is given, while training. MFTCoder has 0.05.",
        at_least=0,
        below=1,
        aliases=("--lora_dropout",),
    )
    lora_target_modules: tuple[str, ...] = option(
        ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"),
        "Matrices with an adapter: by Megatron's names, where what Megatron joins shares one A; by Hugging Face's "
        "(q_proj v_proj …), where each has its own; or all-linear, all of the latter.",
        aliases=("--target-modules", "--target_modules"),
        metavar="NAME",
    )
    use_rslora: bool = option(False, "Scale adapters by alpha / √rank (rsLoRA).", aliases=("--use_rslora",))
    loraplus_lr_ratio: float | None = option(None, "Learning rate of the matrices B, times this (LoRA+).", above=0)
    save_adapters_only: bool = option(
        False,
        "Checkpoints hold the adapters alone; going on then needs the model again: --hf-checkpoint or "
        "--pretrained-checkpoint. Always so with --peft-type qlora.",
    )
    hf_adapter: str | None = option(
        None,
        "Start from this PEFT adapter (adapter_config.json and adapter_model.safetensors), where --load has no "
        "checkpoint with adapters; rank, alpha and matrices are its own.",
        metavar="DIR",
    )
