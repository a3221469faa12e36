"""What a run starts from: a checkpoint or a model, and what follows from that."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mft_megatron.arguments.groups.network import NetworkArguments
from mft_megatron.errors import InputError
from mft_megatron.options import spelling
from mft_megatron.run_folder import CheckpointRef, checkpoint_of, content_digest, is_checkpoint, latest_checkpoint


def find_checkpoint(given: Mapping[str, Any], describe_hf: Any) -> CheckpointRef | None:
    """The checkpoint of ``--load``, else of ``--pretrained-checkpoint`` or the model of ``--hf-checkpoint``; ``None``
    for a run that starts from nothing.

    Raises:
        InputError: what is named is not there, unfinished, or not to be understood.
    """
    hf = given.get("hf_checkpoint")
    if hf is not None and given.get("pretrained_checkpoint") is not None:
        raise InputError("--hf-checkpoint and --pretrained-checkpoint both say what to start from; leave one out")
    load, step, pretrained = (given.get(name) for name in ("load", "ckpt_step", "pretrained_checkpoint"))
    # The idiom of a job that is restarted with the same command line: nothing saved yet means "start".
    same = None not in (load, given.get("save")) and os.path.abspath(load) == os.path.abspath(given["save"])
    if load is not None and (is_checkpoint(load) or not same or given.get("exit_on_missing_checkpoint")):
        return latest_checkpoint(load) if step is None else checkpoint_of(load, step)
    if pretrained is not None:
        return latest_checkpoint(os.path.abspath(pretrained), "--pretrained-checkpoint")
    return CheckpointRef(Path(os.path.abspath(hf)), describe_hf(hf)) if hf is not None else None


def find_base(given: Mapping[str, Any], resume: CheckpointRef | None, describe_hf: Any) -> CheckpointRef | None:
    """The model whose weights are read name by name: see :class:`.table.Arguments`.

    Raises:
        InputError: a checkpoint that holds adapters alone, and no model for them, or another one than theirs.
    """
    if resume is None:
        return None
    path, info = resume.path, resume.info
    hf, pretrained = given.get("hf_checkpoint"), given.get("pretrained_checkpoint")
    if info.has_base:
        of_hf = hf is not None and Path(os.path.abspath(hf)) == path
        return resume if of_hf or (info.lora is None and given.get("peft_type", "none") != "none") else None
    if hf is None and pretrained is None:
        raise InputError(
            f"--load {path}: it holds adapters alone; give the model that they were trained beside with "
            f"--hf-checkpoint or --pretrained-checkpoint (it was {info.base})"
        )
    if hf is not None:
        base = CheckpointRef(Path(os.path.abspath(hf)), describe_hf(hf))
    else:
        base = latest_checkpoint(os.path.abspath(pretrained), "--pretrained-checkpoint")
        if not base.info.has_base:
            raise InputError(
                f"--pretrained-checkpoint {base.path}: it holds adapters alone; give it with --load and --finetune, "
                f"and the model that they were trained beside with --hf-checkpoint or --pretrained-checkpoint (it "
                f"was {base.info.base})"
            )
    if content_digest(base.path) != info.base_digest:
        raise InputError(
            f"{base.path}: its weight files are not those that the adapters of {path} were trained beside; give these "
            f"or a copy (they were in {info.base}): the same model in other files counts as another"
        )
    return base


def architecture_from(resume: CheckpointRef, given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the network, which are the checkpoint's.

    Raises:
        InputError: the command line says otherwise.
    """
    path, info = resume.path, resume.info
    known = {field.name: field for field in dataclasses.fields(NetworkArguments)}
    # what a description from an earlier version leaves out was as its default says
    younger = {name: field.default for name, field in known.items() if field.default is not None}
    architecture = {**younger, **{name: value for name, value in info.architecture.items() if name in known}}
    # these shape no weight: the length, where positions are not learned, follows --seq-length when it is not given
    free = {"make_vocab_size_divisible_by"}
    if architecture.get("position_embedding_type") != "learned_absolute":
        free.add("max_position_embeddings")
        longest = max(architecture.pop("max_position_embeddings", 0), given.get("seq_length", 0))
        architecture["max_position_embeddings"] = longest or None
    for name, value in architecture.items():
        if name not in free and name in given and given[name] != value:
            raise InputError(
                f"{spelling(known[name])} gives {name} = {given[name]}, but the checkpoint {path} has {value}; leave "
                "the option out, the architecture comes from the checkpoint"
            )
    return architecture


def seed_from(resume: CheckpointRef, given: Mapping[str, Any]) -> int:
    """The seed fixes the order of the data, which a resumed run goes on following.

    Raises:
        InputError: the command line says otherwise.
    """
    path, info = resume.path, resume.info
    if given.get("seed", info.seed) != info.seed:
        raise InputError(
            f"--seed {given['seed']}: the checkpoint {path} follows the data order of seed {info.seed}; leave "
            "the option out, or start a new pass with --finetune"
        )
    return info.seed
