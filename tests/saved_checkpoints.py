"""The content of a saved checkpoint, read by torch alone."""

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
