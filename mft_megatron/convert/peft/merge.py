"""Adapters merged into their model: a Hugging Face folder that needs no PEFT.

::

    weight of the base ─► + scale · B A of each adapter, in fp64 ─► rounded to the base's dtype ─► safetensors shards

Weights stream through memory one at a time. The folder is written beside its final path and renamed when it is
complete.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor

from mft_megatron.arguments.groups.network import stored_network
from mft_megatron.convert.atomic_folder import refuse_content
from mft_megatron.convert.huggingface.family import first_difference
from mft_megatron.convert.huggingface.model_export import write_model
from mft_megatron.convert.huggingface.model_folder import CONFIG
from mft_megatron.convert.huggingface.stored_model import CheckpointModel, FolderModel, StoredModel
from mft_megatron.errors import InputError
from mft_megatron.lora import Lora
from mft_megatron.run_folder.description import CheckpointInfo, CheckpointRef
from mft_megatron.run_folder.found import latest_checkpoint
from mft_megatron.run_folder.names import is_checkpoint
from mft_megatron.run_folder.verification import AUTO, require_whole

from .adapted_weights import Factors

# part of a weight that is in memory in fp64 at a time
BLOCK_BYTES = 64 * 2**20


class Adapter(Protocol):
    """Adapters on Hugging Face weights.

    Attributes:
        lora: their description.
    """

    lora: Lora

    def factors(self, hf_name: str) -> Factors | None:
        """Read A [rank, in] and B [out, rank] of a Hugging Face weight; ``None`` if it has no adapter."""


def open_base(path: Path, verify_checkpoint: str = AUTO) -> StoredModel:
    """Open the model of ``--base``: a Hugging Face folder, a run folder (its newest checkpoint) or one iter_NNNNNNN.

    Args:
        path: the folder.
        verify_checkpoint: how a checkpoint is compared with its hashes.

    Raises:
        InputError: it is none of these, incomplete, or has adapters itself.
    """
    if (path / CONFIG).is_file():
        if not any(path.glob("*.safetensors")):
            raise InputError(f"--base {path}: no safetensors files there; give the folder of a whole model")
        return FolderModel(path)
    if not is_checkpoint(path):
        problem = "is neither a Hugging Face folder nor a checkpoint" if path.is_dir() else "is no folder"
        raise InputError(f"--base {path}: {problem}; give the model that the adapters were trained on")
    newest = latest_checkpoint(path, "--base")
    if newest.info.lora is not None:
        raise InputError(f"--base {newest.path}: has adapters itself; merge them first, with merge-lora --load")
    print(require_whole(newest, verify_checkpoint), flush=True)
    return CheckpointModel(newest)


def refuse_other_model(base: StoredModel, info: CheckpointInfo, what: str) -> None:
    """Check that a model has the architecture that adapters were trained on.

    Args:
        base: the model.
        info: description of the checkpoint with the adapters.
        what: the model in messages.

    Raises:
        InputError: it has another one.
    """
    difference = first_difference(
        stored_network(info.architecture, "the checkpoint with the adapters"), base.architecture
    )
    if difference is None and base.info.vocab_size != info.vocab_size:
        difference = "vocab_size", info.vocab_size, base.info.vocab_size
    if difference is not None:
        name, trained, has = difference
        raise InputError(f"{what}: {name} is {has}, the adapters were trained with {trained}")


def merge(
    base: StoredModel,
    adapters: Sequence[Adapter],
    target: Path,
    shard_bytes: int,
    trained: CheckpointRef | None = None,
    tokenizer: Path | None = None,
    stops: Sequence[int] = (),
) -> list[str]:
    """Write the model with its adapters merged into the new folder ``target``, in this process alone.

    Args:
        base: the model; weights keep its dtype.
        adapters: their products are added to the weight, in fp64.
        target: folder to create; must not exist, or be empty.
        shard_bytes: size at which a new shard is begun.
        trained: the checkpoint with the adapters; the tokenizer of its run is written, and the chat template and stop
            tokens that were trained. ``None``: they are PEFT folders, and those of ``base`` are written.
        tokenizer: folder of tokenizer files to copy instead.
        stops: more stop tokens.

    Returns:
        lines that the user should read.

    Raises:
        InputError: ``target`` has content, or a file is damaged.
    """
    refuse_content(target, "--hf")
    weights = ((name, merged(weight, name, adapters)) for name, weight in base.weights())
    return write_model(target, base, weights, shard_bytes, trained, tokenizer, stops)


def merged(weight: Tensor, hf_name: str, adapters: Sequence[Adapter]) -> Tensor:
    """Add Σ scale · B A to a Hugging Face weight [out, in] in place; the sum is in fp64, and rounded to its dtype.

    Returns:
        the same tensor.
    """
    products = [
        (adapter.lora.scale, factors) for adapter in adapters if (factors := adapter.factors(hf_name)) is not None
    ]
    if not products:
        return weight
    step = max(1, BLOCK_BYTES // (8 * weight.shape[1]))
    for first in range(0, len(weight), step):
        rows = weight[first : first + step]
        total = rows.double()
        for scale, (a, b) in products:
            total.addmm_(b[first : first + step].double(), a.double(), alpha=scale)
        rows.copy_(total)
    return weight
