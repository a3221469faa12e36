"""Logits and token losses of a model in one process, without optimizer and gradients; memory is that of the weights."""

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from mft_megatron.arguments.table import Arguments
from mft_megatron.batch import Batch
from mft_megatron.mcore.adapters.lora import add_adapters
from mft_megatron.mcore.checkpointing.load_weights import fill_models
from mft_megatron.mcore.checkpointing.weight_source import WeightSource
from mft_megatron.mcore.model.config import dtype_of
from mft_megatron.mcore.model.gpt import PackedGPTModel

from .parallel import process_groups
from .parallel.device_batch import to_device
from .platform import devices


@contextlib.contextmanager
def model_of(
    arguments: Arguments, vocab_size: int, source: WeightSource, adapters: WeightSource | None = None
) -> Iterator[PackedGPTModel]:
    """Build the model of these arguments in this process alone, with weights from any source.

    Args:
        arguments: complete and checked, for one process.
        vocab_size: tokens of the vocabulary, without padding.
        source: where weights are read from.
        adapters: where those of adapters are read from, if the model of ``arguments`` has some.

    Raises:
        InputError: a weight is missing or damaged.
    """
    with process_groups.process_groups(arguments.distributed, seed=0), torch.no_grad():
        model = PackedGPTModel(arguments, vocab_size).to(devices.device(), dtype_of(arguments))
        if arguments.adapters is not None:
            add_adapters(model, arguments.adapters)
            if adapters is None:
                raise ValueError("the model has adapters, and no source of their weights is given")
            fill_models([model], adapters, adapters=True)
        fill_models([model.eval()], source)
        yield model


def logits_of(model: PackedGPTModel, tokens: Sequence[int]) -> Tensor:
    """Compute the logits after each token of one text: fp32 [S, vocab_size], on the CPU.

    Args:
        model: from :func:`model_of`.
        tokens: ids of the text, S of them.
    """
    tokens_BS = np.asarray(tokens, np.int64)[None]
    zeros_BS = np.zeros_like(tokens_BS)
    ends = np.array([0, tokens_BS.size], np.int32)
    # labels, mask and task do not change logits
    batch: Batch[np.ndarray] = Batch(
        tokens_BS,
        zeros_BS,
        zeros_BS.astype(np.uint8),
        np.arange(tokens_BS.size)[None],
        zeros_BS,
        zeros_BS,
        ends,
        len(tokens),
    )
    logits = model.run(to_device(batch), with_loss=False)
    return logits[0, :, : model.real_vocab_size].float().cpu()


def token_losses(model: PackedGPTModel, batch: Batch[np.ndarray]) -> np.ndarray:
    """Compute the loss of each supervised token of a micro-batch: fp32 [B, S] in nats, 0 where none is supervised.

    Args:
        model: from :func:`model_of`.
        batch: on the host.
    """
    loss_BS = model.run(to_device(batch)).view(batch.labels_BS.shape).float().cpu().numpy()
    return np.where(batch.loss_mask_BS > 0, loss_BS, np.float32(0))
