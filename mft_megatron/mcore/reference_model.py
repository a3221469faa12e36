"""The model of a run in one process, without what makes runs fast: the reference of a run's certificate, in fp64.

In the run's own precision it shows what rounding alone does to losses and gradients.

It is Megatron-Core's model too, since that defines what a checkpoint means; but not split, not packed, not fused and
not recomputed, with PyTorch's own attention, and its losses are the log-softmax of its logits. What a model computes in
fp32 in every precision stays so, since it is part of its definition: rotary angles, and experts' probabilities.
"""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from mft_megatron.arguments.groups.distributed import DistributedArguments
from mft_megatron.arguments.groups.fusions import FusionArguments
from mft_megatron.arguments.groups.mixed_precision import MixedPrecisionArguments
from mft_megatron.arguments.groups.recompute import RecomputeArguments
from mft_megatron.arguments.groups.transformer_engine import TransformerEngineArguments
from mft_megatron.arguments.table import Arguments
from mft_megatron.batch import Batch
from mft_megatron.mcore.adapters.lora import add_adapters
from mft_megatron.mcore.model.gpt import PackedGPTModel

from .parallel import process_groups
from .parallel.device_batch import to_device
from .parallel.whole_tensors import assembled, named_shards, pieces_of
from .platform import devices

_DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SIXTEEN_BITS = (torch.bfloat16, torch.float16)


class ReferenceModel:
    """Token losses of one text after another, and the gradients that they add up to, in fp32 or fp64."""

    def __init__(self, model: PackedGPTModel):
        """Take the model in any precision, on its device."""
        self._model = model
        self._sums: dict[Parameter, Tensor] = {}
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dtype in _SIXTEEN_BITS:
                parameter.register_post_accumulate_grad_hook(self._add)

    def token_losses(self, tokens: np.ndarray) -> Tensor:
        """Compute ``-log p`` of every token but the first of a text that is alone in its row.

        Args:
            tokens: int64 [n], at least 2.

        Returns:
            [n - 1], of tokens 1 to n - 1, fp64 or, of a model in fewer bits, fp32; differentiable.
        """
        tokens_BS = np.asarray(tokens, np.int64)[None]
        zeros_BS = np.zeros_like(tokens_BS)
        length = tokens_BS.size
        batch: Batch[np.ndarray] = Batch(
            tokens_BS,
            zeros_BS,
            zeros_BS.astype(np.uint8),
            np.arange(length)[None],
            zeros_BS,
            zeros_BS,
            np.array([0, length], np.int32),
            length,
        )
        logits = self._model.run(to_device(batch), with_loss=False)[0, :-1, : self._model.real_vocab_size]
        if logits.dtype in _SIXTEEN_BITS:
            logits = logits.float()
        targets = torch.from_numpy(tokens_BS[0, 1:]).to(logits.device)
        return -logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]

    def clear_gradients(self) -> None:
        """Set all gradients to 0."""
        self._model.zero_grad(set_to_none=True)
        self._sums.clear()

    def gradients(self, chosen: Callable[[str], bool]) -> dict[str, Tensor]:
        """Copy the gradients of some trained weights, fp32 or fp64 on the CPU, by name; 0 where none was computed.

        Args:
            chosen: whether the gradient of the weight of this name is wanted.
        """
        pieces = pieces_of(self._model, chosen, self._gradient)
        return {name: whole.value for name, whole in assembled(pieces).items()}

    def _add(self, parameter: Parameter) -> None:
        """Sum gradients of 16 bits in fp32, as runs do."""
        if parameter.grad is not None:
            self._sums[parameter] = self._sums.get(parameter, 0) + parameter.grad.float()
            parameter.grad = None

    def _gradient(self, parameter: Parameter) -> Tensor | None:
        if not parameter.requires_grad:
            return None
        gradient = self._sums.get(parameter, parameter.grad)
        return torch.zeros_like(parameter) if gradient is None else gradient.contiguous()


@contextlib.contextmanager
def reference_model(
    arguments: Arguments, vocab_size: int, weights: Mapping[str, Tensor], precision: str = "fp64"
) -> Iterator[ReferenceModel]:
    """Build the reference in this process alone, after the process groups of the run itself have ended.

    Args:
        arguments: of the run, on any parallel layout and in any precision.
        vocab_size: tokens of the vocabulary, without padding.
        weights: whole weights by name (:mod:`.parallel.whole_tensors`), with any padding of the vocabulary.
        precision: fp64, fp32, bf16 or fp16.

    Raises:
        ValueError: a weight is missing.
    """
    plain = _plain(arguments)
    with _alone(), process_groups.process_groups(plain.distributed, plain.initialization.seed):
        model = PackedGPTModel(plain, vocab_size).to(devices.device())
        if plain.adapters is not None:
            add_adapters(model, plain.adapters)
        model = model.to(_DTYPES[precision])
        for name, shard, _ in named_shards(model):
            if name not in weights:
                raise ValueError(f"{name}: the run has no such weight")
            first = shard.global_offset[shard.prepend_axis_num :]
            _fill(shard.data, weights[name], first)
        yield ReferenceModel(model.train())


def _plain(arguments: Arguments) -> Arguments:
    """The same network without everything that changes how, and not what, it computes."""
    layout = DistributedArguments(distributed_backend=arguments.distributed.distributed_backend)
    training = dataclasses.replace(arguments.training, attention_backend="local", cross_entropy_impl="megatron")
    return dataclasses.replace(
        arguments,
        world_size=1,
        training=training,
        distributed=layout,
        precision=MixedPrecisionArguments(),
        recompute=RecomputeArguments(),
        transformer_engine=TransformerEngineArguments(),
        fusions=FusionArguments(
            bias_swiglu_fusion=False, bias_dropout_fusion=False, gradient_accumulation_fusion=False
        ),
    )


@torch.no_grad()
def _fill(weight: Tensor, whole: Tensor, first: Sequence[int]) -> None:
    """Copy a part of a whole weight, whose vocabulary may have other rows of padding; losses do not depend on these.

    Args:
        weight: any dtype, on any device.
        whole: the weight that it is a part of.
        first: index in it of the part's first element.
    """
    part = whole[tuple(slice(at, at + size) for at, size in zip(first, weight.shape, strict=True))]
    weight.zero_()
    weight[: len(part)].copy_(part)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Make this process a world of one, whatever torchrun's environment says; restored at the end."""
    before = dict(os.environ)
    # the agent's store still has the keys of the run's process groups
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
