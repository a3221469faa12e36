"""The checkpoint, model or adapter that a run starts from, and the options that follow from it."""

import dataclasses
import os
from pathlib import Path

from mft_megatron.arguments.groups.checkpointing import CheckpointArguments
from mft_megatron.arguments.groups.lora import LoraArguments
from mft_megatron.arguments.groups.network import NetworkArguments, stored_network
from mft_megatron.errors import InputError
from mft_megatron.lora import Lora
from mft_megatron.options import Given, spelling
from mft_megatron.run_folder.content import content_digest
from mft_megatron.run_folder.description import CheckpointInfo, CheckpointRef
from mft_megatron.run_folder.found import checkpoint_of, latest_checkpoint, newest_or_earlier
from mft_megatron.run_folder.names import is_checkpoint


@dataclasses.dataclass(frozen=True)
class Start:
    """The checkpoint, model and adapter that a run starts from, read before its options are complete.

    Attributes:
        checkpoint: what :func:`find_checkpoint` found.
        hf_model: description of the model of ``--hf-checkpoint``, if :func:`reads_hf_model`.
        adapter: description of the adapter of ``--hf-adapter``, if :func:`reads_adapter`.
    """

    checkpoint: CheckpointRef | None = None
    hf_model: CheckpointInfo | None = None
    adapter: Lora | None = None

    def resume(self, options: CheckpointArguments) -> CheckpointRef | None:
        """The checkpoint, else the model of ``--hf-checkpoint``; ``None`` for a run that starts from random weights."""
        return self.checkpoint if self.checkpoint is not None or options.hf_checkpoint is None else self.hf_ref(options)

    def hf_ref(self, options: CheckpointArguments) -> CheckpointRef:
        """The model of ``--hf-checkpoint``.

        Raises:
            ValueError: its description is missing.
        """
        if options.hf_checkpoint is None or self.hf_model is None:
            raise ValueError(f"--hf-checkpoint {options.hf_checkpoint}: open the folder first")
        return CheckpointRef(Path(os.path.abspath(options.hf_checkpoint)), self.hf_model)


def find_checkpoint(options: CheckpointArguments) -> CheckpointRef | None:
    """Find the checkpoint of ``--load``, else of ``--pretrained-checkpoint``.

    A damaged newest checkpoint of ``--load`` is passed over, and named in the result.

    Returns:
        ``None`` if neither is given, or if ``--load`` is the ``--save`` folder and has no checkpoint yet.

    Raises:
        InputError: the checkpoint does not exist, is unfinished or unreadable, or two options name the start.
    """
    load, pretrained = options.load, options.pretrained_checkpoint
    if options.hf_checkpoint is not None and pretrained is not None:
        raise InputError("--hf-checkpoint and --pretrained-checkpoint both say what to start from; leave one out")
    if load is not None and (is_checkpoint(load) or options.exit_on_missing_checkpoint or not _is_save_folder(options)):
        return newest_or_earlier(load) if options.ckpt_step is None else checkpoint_of(load, options.ckpt_step)
    return _pretrained_checkpoint(pretrained) if pretrained is not None else None


def _is_save_folder(options: CheckpointArguments) -> bool:
    """Whether ``--load`` is the ``--save`` folder: jobs that are restarted with the same command line give both."""
    load, save = options.load, options.save
    return load is not None and save is not None and os.path.abspath(load) == os.path.abspath(save)


def _pretrained_checkpoint(folder: str) -> CheckpointRef:
    return latest_checkpoint(os.path.abspath(folder), "--pretrained-checkpoint")


def reads_hf_model(options: CheckpointArguments, checkpoint: CheckpointRef | None) -> bool:
    """Whether a run reads weights from the folder of ``--hf-checkpoint``."""
    return options.hf_checkpoint is not None and (checkpoint is None or not checkpoint.info.has_base)


def reads_adapter(options: LoraArguments, checkpoint: CheckpointRef | None) -> bool:
    """Whether a run reads the adapter of ``--hf-adapter``."""
    return options.hf_adapter is not None and (checkpoint is None or checkpoint.info.lora is None)


def find_base(options: CheckpointArguments, peft_type: str, start: Start) -> CheckpointRef | None:
    """Find the model whose weights are read one by one, by name: ``base`` of :class:`.table.Arguments`.

    Raises:
        InputError: a checkpoint holds only adapters, and their model is not given or is a different one.
    """
    resume = start.resume(options)
    if resume is None:
        return None
    info = resume.info
    hf, pretrained = options.hf_checkpoint, options.pretrained_checkpoint
    if info.has_base:
        of_hf = hf is not None and Path(os.path.abspath(hf)) == resume.path
        return resume if of_hf or (info.lora is None and peft_type != "none") else None
    if hf is not None:
        base = start.hf_ref(options)
    elif pretrained is not None:
        base = _pretrained_checkpoint(pretrained)
    else:
        raise InputError(
            f"--load {resume.path}: it holds only adapters; give the model that they were trained with as "
            f"--hf-checkpoint or --pretrained-checkpoint (it was {info.base})"
        )
    if not base.info.has_base:
        raise InputError(
            f"--pretrained-checkpoint {base.path}: it holds only adapters; give it as --load with --finetune, and the "
            "model that they were trained with as --hf-checkpoint or --pretrained-checkpoint (it was "
            f"{base.info.base})"
        )
    if content_digest(base.path) != info.base_digest:
        raise InputError(
            f"{base.path}: its weight files are not those that the adapters of {resume.path} were trained with; give "
            f"these or a copy (they were in {info.base}): the same model in other files counts as a different one"
        )
    return base


def architecture_from(resume: CheckpointRef, given: Given) -> Given:
    """Return the network's options, which the checkpoint decides.

    Raises:
        InputError: the command line contradicts the checkpoint, or a later version wrote it with fields that this one
            does not know.
    """
    stored_network(resume.info.architecture, str(resume.path))  # refuses fields that only a later version knows
    known = {field.name: field for field in dataclasses.fields(NetworkArguments)}
    # A description that an earlier version wrote lacks newer fields: they had their defaults.
    defaults = {name: field.default for name, field in known.items() if field.default is not None}
    architecture = {**defaults, **resume.info.architecture}
    # These fields change no weight. Without learned positions the maximum length follows --seq-length.
    free = {"make_vocab_size_divisible_by"}
    if architecture.get("position_embedding_type") != "learned_absolute":
        free.add("max_position_embeddings")
        longest = max(architecture.pop("max_position_embeddings", 0), given.get("seq_length", 0))
        architecture["max_position_embeddings"] = longest or None
    for name, value in architecture.items():
        if name not in free and name in given and given[name] != value:
            raise InputError(
                f"{spelling(known[name])} gives {name} = {given[name]}, but the checkpoint {resume.path} has {value}; "
                "leave the option out, the architecture comes from the checkpoint"
            )
    return architecture


def seed_from(resume: CheckpointRef, given: Given) -> int:
    """Return the seed of the checkpoint: it determines the data order, which a resumed run follows.

    Raises:
        InputError: the command line contradicts the checkpoint.
    """
    seed = resume.info.seed
    if given.get("seed", seed) != seed:
        raise InputError(
            f"--seed {given['seed']}: the checkpoint {resume.path} follows the data order of seed {seed}; leave the "
            "option out, or start a new pass with --finetune"
        )
    return seed
