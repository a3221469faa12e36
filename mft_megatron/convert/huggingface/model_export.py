"""Export of a model as a Hugging Face folder that ``transformers.AutoModelForCausalLM.from_pretrained`` loads.

Weights stream through memory one at a time into safetensors shards. The folder is written beside its final path and
renamed when it is complete.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor

from mft_megatron.arguments.groups.network import NetworkArguments
from mft_megatron.convert.atomic_folder import refuse_content, replacing
from mft_megatron.convert.huggingface.families.table import family_for
from mft_megatron.errors import InputError
from mft_megatron.run_folder.description import CheckpointRef
from mft_megatron.run_folder.found import refuse_adapters
from mft_megatron.run_folder.names import TOKENIZER
from mft_megatron.run_folder.tokenizer import copy_tokenizer

from .chat_files import chat_template_of, write_chat_template, write_stop_tokens
from .family import Family
from .model_folder import remove_tokenizer, same_tokenizer
from .safetensors_writer import write_shards
from .stored_model import CheckpointModel, StoredModel


def export(
    checkpoint: CheckpointRef, target: Path, tokenizer: Path | None, shard_bytes: int
) -> tuple[Family, list[str]]:
    """Write the model of a checkpoint into the new folder ``target``, in this process alone.

    A model that came from Hugging Face gets its configuration back byte by byte, and its tokenizer, unless it was
    trained with another one. Chat template and stop tokens are those that were trained.

    Args:
        checkpoint: the checkpoint.
        target: folder to create; must not exist, or be empty.
        tokenizer: folder of tokenizer files to copy; ``None``: those kept in the run folder.
        shard_bytes: size at which a new shard is begun.

    Returns:
        the family that the model was written as, and lines that the user should read.

    Raises:
        InputError: no family can express the architecture, a weight is missing or left over, the
            checkpoint has adapters, or ``target`` has content.
    """
    refuse_adapters(checkpoint)
    refuse_content(target, "--hf")
    model = CheckpointModel(checkpoint)
    return model.family, write_model(target, model, model.weights(), shard_bytes, checkpoint, tokenizer)


def write_model(
    target: Path,
    model: StoredModel,
    weights: Iterable[tuple[str, Tensor]],
    shard_bytes: int,
    trained: CheckpointRef | None,
    tokenizer: Path | None,
    stops: Sequence[int] = (),
) -> list[str]:
    """Write a Hugging Face folder.

    Args:
        target: folder to create; must not exist, or be empty.
        model: the model that gives names, dtypes, shapes and configuration.
        weights: name and content of each weight of ``model.planned()``, in any order.
        shard_bytes: size at which a new shard is begun.
        trained: checkpoint of the run whose tokenizer, chat template and stop tokens are written; ``None``: those of
            ``model``.
        tokenizer: folder of tokenizer files to copy instead.
        stops: more stop tokens.

    Returns:
        lines that the user should read.

    Raises:
        InputError: ``tokenizer`` has no tokenizer files, or a file is damaged.
    """
    info = model.info if trained is None else trained.info
    with replacing(target) as partial:
        model.write_config(partial)
        lines = write_stop_tokens(info, partial, stops)
        of_source = chat_template_of(partial)
        if trained is not None:
            write_tokenizer(trained.path.parent, tokenizer, partial)
        elif tokenizer is not None:
            same_template = chat_template_of(tokenizer) in (None, of_source)
            if not (same_template and same_tokenizer(tokenizer, partial)):
                write_tokenizer(partial, tokenizer, partial)
        if trained is not None or tokenizer is None:
            lines += write_chat_template(info, partial, of_source)
        elif of_source not in (None, present := chat_template_of(partial)):
            lines.append(
                f"note: {tokenizer} has no chat template, and that of the model is left out with its tokenizer; to "
                "serve the export with it, copy it there"
                if present is None
                else f"note: the chat template is that of {tokenizer}, not the one that came with the model"
            )
        write_shards(partial, model.planned(), weights, shard_bytes)
    return lines


def refuse_export(architecture: NetworkArguments, from_hugging_face: bool) -> None:
    """Check before a run that its checkpoints can be exported.

    Raises:
        InputError: no family can express the architecture.
    """
    if not from_hugging_face:
        try:
            family_for(architecture)
        except InputError as error:
            raise InputError(f"--save-hf: {error}") from None


def write_tokenizer(run: Path, tokenizer: Path | None, folder: Path) -> None:
    """Write the tokenizer into an export that may have the source model's tokenizer already.

    Args:
        run: run folder, whose tokenizer replaces that of the source.
        tokenizer: folder of tokenizer files that replace both.
        folder: folder of the export.

    Raises:
        InputError: ``tokenizer`` has no tokenizer files.
    """
    origin = tokenizer or run / TOKENIZER
    if tokenizer is None and same_tokenizer(origin, folder):
        return  # the source may have more files than the run's copy, and an export returns all of them
    if origin.exists():
        remove_tokenizer(folder)
    if not copy_tokenizer(origin, folder) and tokenizer is not None:
        raise InputError(f"--tokenizer-model {tokenizer}: no tokenizer files there; give the tokenizer's folder")
