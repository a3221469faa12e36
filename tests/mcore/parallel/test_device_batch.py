"""A micro-batch goes to the device in one copy that holds what the rank's stages read."""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

import dataclasses

import numpy as np
import pytest
import torch
from megatron.core import parallel_state
from torch.utils._python_dispatch import TorchDispatchMode

from mft_megatron.mcore.parallel import device_batch
from mft_megatron.mcore.parallel.context_parallel import ContextParallelShard
from mft_megatron.mcore.parallel.host_copies import ALIGNMENT, copy_together
from mft_megatron.mcore.platform import devices
from tests.batches import one_segment

OUTPUT = {"labels_BS", "loss_mask_BS", "sample_ids_BS", "task_ids_BS", "token_weights_BS", "sample_weights_BS"}


class Copies(TorchDispatchMode):
    """Collects the copies from the host to the device."""

    def __init__(self):
        super().__init__()
        self.bytes, self.blocking = [], 0

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        result = operator(*arguments, **(keywords or {}))
        if operator is torch.ops.aten._to_copy.default and arguments[0].device != result.device:
            self.bytes.append(result.nbytes)
            self.blocking += not keywords.get("non_blocking")
        return result


def _batch():
    batch = one_segment(np.arange(24) + 7)
    weights = np.linspace(0, 1, 24, dtype=np.float32)[None]
    mask = (np.arange(24) % 5 == 0).astype(np.uint8)[None]
    lengths = np.array([21])
    every = {"loss_mask_BS": mask, "token_weights_BS": weights, "sample_weights_BS": 3 - weights, "lengths_B": lengths}
    return dataclasses.replace(batch, **every)


@pytest.fixture
def on(monkeypatch):
    """A function that copies a micro-batch to a stage's device."""

    def copy(device="cpu", first=True, last=True, rank=0, size=1):
        monkeypatch.setattr(parallel_state, "is_pipeline_first_stage", lambda *words, **others: first)
        monkeypatch.setattr(parallel_state, "is_pipeline_last_stage", lambda *words, **others: last)
        monkeypatch.setattr(devices, "device", lambda: torch.device(device))
        monkeypatch.setattr(
            device_batch, "shard_of", lambda batch, device: ContextParallelShard.of(batch, rank, size, device)
        )
        return device_batch.to_device(_batch())

    return copy


def _same(tensor, array):
    return tensor.shape == array.shape and np.array_equal(tensor.numpy(), array)


@pytest.mark.parametrize("size", [1, 2])
def test_all_values_arrive(on, size):
    batch, copied = _batch(), on(rank=size - 1, size=size)
    assert not any(value is None for value in vars(batch).values())
    names = {name for name, value in vars(batch).items() if isinstance(value, np.ndarray)}
    assert all(_same(getattr(copied, name), getattr(batch, name)) for name in names)
    assert {getattr(copied, name).dtype for name in names} == {torch.int32, torch.uint8, torch.float32}
    expected = ContextParallelShard.of(batch, size - 1, size, torch.device("cpu"))
    assert len(expected.tensors()) == (3 if size == 1 else 5)
    for ours, theirs in zip(copied.shard.tensors(), expected.tensors(), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.dtype == theirs.dtype
    assert (copied.shard.spans.lengths_q, copied.shard.spans.max_k) == (expected.spans.lengths_q, expected.spans.max_k)


@pytest.mark.parametrize("size", [1, 2])
def test_there_is_one_copy_and_nobody_waits_for_it(on, size):
    with Copies() as copies:
        on("meta", size=size)
    assert len(copies.bytes) == 1
    assert not copies.blocking


def test_a_stage_gets_what_it_reads(on):
    batch = _batch()
    names = {name for name, value in vars(batch).items() if isinstance(value, np.ndarray)} - {"cu_seqlens"}
    always = {"position_ids_BS", "lengths_B"}
    for first, last, read in (
        (True, False, always | {"tokens_BS"}),
        (False, False, always),
        (False, True, always | OUTPUT),
        (True, True, names),
    ):
        copied = on(first=first, last=last)
        assert {name for name in names if not getattr(copied, name).is_meta} == read
        assert all(getattr(copied, name).shape == getattr(batch, name).shape for name in names)


def test_what_a_stage_does_not_read_cannot_be_read(on):
    with pytest.raises((RuntimeError, NotImplementedError)):
        on(last=False).labels_BS + torch.zeros(24)


def test_tensors_of_a_buffer_are_aligned():
    arrays = [np.arange(3, dtype=np.uint8), np.arange(5), np.array([[2.5]], np.float32), np.arange(0)]
    dtypes = [torch.uint8, torch.int32, torch.float32, torch.int64]
    tensors = copy_together(arrays, dtypes, torch.device("cpu"))
    assert all(tensor.storage_offset() * tensor.itemsize % ALIGNMENT == 0 for tensor in tensors)
    assert [tensor.tolist() for tensor in tensors] == [array.tolist() for array in arrays]
    assert [tensor.dtype for tensor in tensors] == dtypes
