"""Logits of a model that is only looked at: one process, no optimizer, no gradients, the memory of its weights."""

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from mft_megatron.arguments.table import Arguments
from mft_megatron.batch import Batch
from mft_megatron.mcore.checkpointing.load_weights import fill_model
from mft_megatron.mcore.checkpointing.weight_source import WeightSource
from mft_megatron.mcore.model.config import dtype_of
from mft_megatron.mcore.model.gpt import PackedGPTModel

from .parallel import process_groups
from .parallel.device_batch import to_device
from .platform import devices


@contextlib.contextmanager
def model_of(arguments: Arguments, vocab_size: int, source: WeightSource) -> Iterator[PackedGPTModel]:
    """The model of these arguments on this process alone, with weights from anywhere, ready for :func:`logits_of`.

    Args:
        arguments: of one process.
        vocab_size: real size of the vocabulary.
        source: where weights are read from.

    Raises:
        InputError: a weight is missing or damaged.
    """
    with process_groups.process_groups(arguments.distributed, seed=0), torch.no_grad():
        model = PackedGPTModel(arguments, vocab_size).to(devices.device(), dtype_of(arguments)).eval()
        fill_model(model, source)
        yield model


def logits_of(model: PackedGPTModel, tokens: Sequence[int]) -> Tensor:
    """Logits after each token of one text: fp32 [S, vocabulary], on the CPU, without padded rows."""
    tokens_BS = np.asarray(tokens, np.int64)[None]
    nothing = np.zeros_like(tokens_BS)
    ends = np.array([0, tokens_BS.size], np.int32)
    # what is not looked at for logits: labels, mask, task
    batch = Batch(
        tokens_BS,
        nothing,
        nothing.astype(np.uint8),
        np.arange(tokens_BS.size)[None],
        nothing,
        nothing,
        ends,
        len(tokens),
    )
    logits = model.run(to_device(batch), with_loss=False)
    return logits[0, :, : model.real_vocab_size].float().cpu()
