"""Adapters of a run: what the options say, a checkpoint that has some, or an adapter from elsewhere."""

from collections.abc import Mapping, Sequence
from typing import Any

from mft_megatron.arguments.groups.lora import LoraArguments
from mft_megatron.arguments.groups.network import NetworkArguments
from mft_megatron.errors import InputError
from mft_megatron.lora import Lora, Target, read_targets
from mft_megatron.run_folder import CheckpointRef


def adapters_of(options: LoraArguments, network: NetworkArguments) -> Lora | None:
    """What is trained beside the model, or ``None`` where it is trained itself.

    Raises:
        InputError: a target that this model has not.
    """
    if options.peft_type == "none":
        return None
    targets = _read_targets(options.lora_target_modules, network.gated)
    return Lora(options.lora_rank, options.lora_alpha, targets, options.lora_dropout, options.use_rslora)


def from_checkpoint(resume: CheckpointRef, given: Mapping[str, Any], weights_alone: bool) -> dict[str, Any]:
    """Options that follow from the adapters of a checkpoint; nothing where it has none.

    Args:
        resume: its folder and description.
        given: what the command line says.
        weights_alone: whether a new pass starts from it, which may keep the model in 4 bits or not.

    Raises:
        InputError: the command line says otherwise.
    """
    path, info = resume.path, resume.info
    if info.lora is None:
        return {}
    if given.get("peft_type") == "none":
        raise InputError(
            f"--peft-type none: the checkpoint {path} has adapters, and training goes on with them; leave the option "
            "out, or merge them first with tools/convert_checkpoint.py merge-lora"
        )
    peft_type = given.get("peft_type", info.peft_type)
    if peft_type != info.peft_type and not weights_alone:
        raise InputError(
            f"--peft-type {peft_type}: the checkpoint {path} was trained with {info.peft_type}; leave the "
            "option out, or start a new pass with --finetune"
        )
    known = _as_options(Lora.from_dict(info.lora))
    _refuse_contradiction(known, given, _gated(info.architecture), f"the checkpoint {path}")
    if not info.has_base:
        known["save_adapters_only"] = True  # as it has been
    return {"peft_type": peft_type, **known}


def from_adapter(folder: str, lora: Lora, given: Mapping[str, Any]) -> dict[str, Any]:
    """Options that follow from an adapter from elsewhere.

    Raises:
        InputError: the command line says otherwise.
    """
    if given.get("peft_type", "none") == "none":
        raise InputError(
            f"--hf-adapter {folder}: adapters are trained with --peft-type lora or qlora; give one of them"
        )
    known = _as_options(lora)
    _refuse_contradiction(known, given, _gated(given), f"the adapter {folder}")
    return known


def _read_targets(names: Sequence[str], gated: bool) -> tuple[Target, ...]:
    try:
        return read_targets(names, gated)
    except InputError as error:
        raise InputError(f"--lora-target-modules: {error}") from None


def _gated(network: Mapping[str, Any]) -> bool:
    """:attr:`.NetworkArguments.gated` of fields that may be missing."""
    return bool(network.get("swiglu") or network.get("gated_linear_unit"))


def _as_options(lora: Lora) -> dict[str, Any]:
    """What the matrices were made with. Dropout is the run's own business."""
    return {
        "lora_rank": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.rslora,
        "lora_target_modules": tuple(name for target in lora.targets for name in target.names),
    }


def _refuse_contradiction(known: Mapping[str, Any], given: Mapping[str, Any], gated: bool, what: str) -> None:
    for name, value in known.items():
        if name not in given or given[name] == value:
            continue
        if name == "lora_target_modules" and _read_targets(given[name], gated) == read_targets(value, gated):
            continue
        option = "--" + name.replace("_", "-")
        shown, said = (" ".join(v) if isinstance(v, tuple) else v for v in (value, given[name]))
        raise InputError(f"{option} {said}: {what} has {shown}; leave the option out")
