"""Parts of a stacked tensor are found by layer and expert, not by comparing each with every chunk."""

import itertools

import pytest
import torch


def whole(layers, experts):
    return torch.arange(layers * experts * 6.0).view(layers, experts, 3, 2)


@pytest.mark.parametrize("chunk_shape", [(1, 1, 3, 2), (1, 1, 2, 2), (1, 4, 3, 2), (6, 4, 3, 2)])
def test_parts_are_filled_from_chunks_of_any_shape(chunk_shape):
    from mft_megatron.mcore.checkpointing.shared_load import Parts

    tensor = whole(6, 4)
    kept = [((layer, expert, 1, 0), torch.zeros(1, 1, 2, 2)) for layer in (1, 4) for expert in (0, 3)]
    parts = Parts(kept, [chunk_shape])
    steps = [range(0, size, part) for size, part in zip(tensor.shape, chunk_shape, strict=True)]
    for offset in itertools.product(*steps):
        chunk = tensor[tuple(slice(start, start + size) for start, size in zip(offset, chunk_shape, strict=True))]
        for of_chunk, of_part, content in parts.within(offset, chunk.shape):
            content[of_part] = chunk[of_chunk]
    for (layer, expert, row, _), content in kept:
        assert content[0, 0].equal(tensor[layer, expert, row:])


def test_a_chunk_is_compared_with_the_parts_of_its_expert_alone(monkeypatch):
    from mft_megatron.mcore.checkpointing import shared_load

    compared, overlap = [], shared_load.overlap
    monkeypatch.setattr(shared_load, "overlap", lambda *blocks: compared.append(blocks) or overlap(*blocks))
    kept = [((layer, expert, 0, 0), torch.zeros(1, 1, 3, 2)) for layer in range(8) for expert in range(4)]
    parts = shared_load.Parts(kept, [(1, 1, 3, 2)])
    found = [
        part for layer in range(8) for expert in range(16) for part in parts.within((layer, expert, 0, 0), (1, 1, 3, 2))
    ]
    assert len(found) == len(compared) == 32
