"""Small checkpoints written without a run, and the content of a saved checkpoint, read by torch alone."""

import dataclasses
import types

import torch
from torch.distributed.checkpoint import FileSystemReader, TensorStorageMetadata, load


def tensors_of(path):
    """Read all tensors of the checkpoint ``path``, those of the optimizer too, by name."""
    entries = FileSystemReader(path).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load(state, checkpoint_id=str(path))
    return state


def optimizer_numbers(path):
    """Read what the checkpoint ``path`` has of the optimizer besides tensors, from ``common.pt``."""
    return torch.load(path / "common.pt", weights_only=False)["optimizer"]


def write_small(folder, iteration, **changes):
    """Write a whole checkpoint of random weights in five files into a run folder; it becomes the newest.

    Args:
        folder: the run folder.
        iteration: the seed of the weights, too.
        changes: fields of the description.
    """
    from mft_megatron.mcore.checkpointing.tensor_writer import Weight, write_weights
    from mft_megatron.mcore.checkpointing.weight_source import WeightSlice
    from mft_megatron.run_folder.description import CheckpointInfo, write_info
    from mft_megatron.run_folder.manifest import write_manifest
    from mft_megatron.run_folder.names import TRACKER, iteration_folder
    from mft_megatron.run_folder.verification import DESCRIPTION, copied_description

    path = iteration_folder(folder, iteration)
    path.mkdir(parents=True)
    generator = torch.Generator().manual_seed(iteration)
    weights = {f"weight{number}": torch.randn(20 + number, 30, generator=generator) for number in range(5)}
    planned = {name: Weight(name, tuple(weight.shape), weight.dtype) for name, weight in weights.items()}
    slices = [WeightSlice(name, (), (0, 0), weight.shape) for name, weight in planned.items()]
    info = CheckpointInfo(iteration, 8 * iteration, {}, 10, {}, "data", 1, 8, **changes)
    source = types.SimpleNamespace(read=lambda wanted: weights[wanted.name])
    files = write_weights(path, planned, slices, source, 2000, {DESCRIPTION: copied_description(info)})
    write_info(path, dataclasses.replace(info, manifest=write_manifest(path, files)))
    (folder / TRACKER).write_text(f"{iteration}\n")
    return path
