"""Adapters: small matrices that are trained beside the frozen matrices of a model."""

import dataclasses

from mft_megatron.options import option


@dataclasses.dataclass(frozen=True)
class LoraArguments:
    """Low-rank adapters on the linear layers. None of these options is Megatron's."""

    peft_type: str = option(
        "none",
        "Train the whole model (none), adapters of the frozen model (lora), or adapters of a frozen model whose "
        "matrices are stored in 4 bits, NF4 (qlora).",
        choices=("none", "lora", "qlora"),
        aliases=("--peft_type",),
    )
    lora_rank: int = option(32, "Rank of the adapters.", at_least=1, aliases=("--lora_rank",))
    lora_alpha: float = option(
        32.0,
        "Adapters are scaled by alpha / rank, with --use-rslora by alpha / √rank.",
        above=0,
        aliases=("--lora_alpha",),
    )
    lora_dropout: float = option(
        0.0,
        "Dropout of an adapter's input in training. MFTCoder has 0.05.",
        at_least=0,
        below=1,
        aliases=("--lora_dropout",),
    )
    lora_target_modules: tuple[str, ...] = option(
        ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"),
        "Matrices with an adapter: Megatron's names, with one A for a matrix that Megatron fuses; Hugging Face's "
        "names (q_proj v_proj …), with an A for each; or all-linear, all of the latter.",
        aliases=("--target-modules", "--target_modules"),
        metavar="NAME",
    )
    use_rslora: bool = option(False, "Scale adapters by alpha / √rank (rsLoRA).", aliases=("--use_rslora",))
    loraplus_lr_ratio: float | None = option(None, "Learning rate of the matrices B, times this (LoRA+).", above=0)
    save_adapters_only: bool = option(
        False,
        "Checkpoints hold only the adapters; resuming then needs the model again: --hf-checkpoint or "
        "--pretrained-checkpoint. Always on with --peft-type qlora.",
    )
    hf_adapter: str | None = option(
        None,
        "Start from this PEFT adapter (adapter_config.json and adapter_model.safetensors), if --load has no "
        "checkpoint with adapters; it determines rank, alpha and matrices.",
        metavar="DIR",
    )
