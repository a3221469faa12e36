"""Adapters of a run, from the options, a checkpoint with adapters, or an adapter in PEFT's format."""

from collections.abc import Sequence

from mft_megatron.arguments.groups.lora import LoraArguments
from mft_megatron.arguments.groups.network import NetworkArguments
from mft_megatron.errors import InputError
from mft_megatron.lora import Lora, Target, read_targets
from mft_megatron.options import Given
from mft_megatron.run_folder.description import CheckpointRef


def adapters_of(options: LoraArguments, network: NetworkArguments) -> Lora | None:
    """The adapters that the options ask for; ``None`` if the model itself is trained.

    Raises:
        InputError: the model has no such target.
    """
    if options.peft_type == "none":
        return None
    targets = _read_targets(options.lora_target_modules, network.gated)
    return Lora(options.lora_rank, options.lora_alpha, targets, options.lora_dropout, options.use_rslora)


def from_checkpoint(resume: CheckpointRef, given: Given, weights_alone: bool) -> Given:
    """Options that follow from the adapters of a checkpoint; none if it has no adapters.

    Args:
        resume: the checkpoint.
        given: the options that are given.
        weights_alone: whether a new pass starts from it; that may change whether the model is in 4 bits.

    Raises:
        InputError: the options contradict the checkpoint.
    """
    path, info = resume.path, resume.info
    if info.lora is None:
        return {}
    if given.get("peft_type") == "none":
        raise InputError(
            f"--peft-type none: the checkpoint {path} has adapters, and training continues with them; leave the option "
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
        # The checkpoints of the run have held only adapters so far.
        known["save_adapters_only"] = True
    return {"peft_type": peft_type, **known}


def from_adapter(folder: str, lora: Lora, given: Given) -> Given:
    """Options that follow from the adapter of ``--hf-adapter``.

    Args:
        folder: the adapter's folder, for messages.
        lora: its description.
        given: the options that are given.

    Raises:
        InputError: the options contradict the adapter.
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


def _gated(network: Given) -> bool:
    """Return :attr:`.NetworkArguments.gated` for options that may be missing."""
    return bool(network.get("swiglu") or network.get("gated_linear_unit"))


def _as_options(lora: Lora) -> Given:
    """The options that the matrices of adapters depend on; dropout may differ."""
    return {
        "lora_rank": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.rslora,
        "lora_target_modules": tuple(name for target in lora.targets for name in target.names),
    }


def _refuse_contradiction(known: Given, given: Given, gated: bool, what: str) -> None:
    for name, value in known.items():
        if name not in given or given[name] == value:
            continue
        if name == "lora_target_modules" and _read_targets(given[name], gated) == read_targets(value, gated):
            continue
        option = "--" + name.replace("_", "-")
        has, wanted = (" ".join(v) if isinstance(v, tuple) else v for v in (value, given[name]))
        raise InputError(f"{option} {wanted}: {what} has {has}; leave the option out")
