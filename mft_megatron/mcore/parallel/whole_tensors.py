"""Whole weights and gradients of a model on the main process, gathered from the shards of all ranks.

For small models: everything that is chosen is in the memory of one process.
"""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn import Parameter

from .sharded_weights import shards_of


@dataclasses.dataclass(frozen=True)
class WholeTensor:
    """A weight, or its gradient, as all ranks have it.

    Attributes:
        value: the whole tensor, on the CPU, of the ranks' dtype.
        disagreement: the largest ‖a - b‖ / ‖a‖ of two ranks' copies of the same shard; 0 where all are equal.
    """

    value: Tensor
    disagreement: float


@dataclasses.dataclass(frozen=True)
class Piece:
    """A copy of a shard of a tensor, on the CPU.

    Attributes:
        name: of the weight.
        shape: of the whole tensor.
        offset: of the shard's first element along each axis.
        data: the shard.
    """

    name: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    data: Tensor

    @property
    def region(self) -> tuple[slice, ...]:
        """The part of the whole tensor that the shard is."""
        return tuple(slice(at, at + size) for at, size in zip(self.offset, self.data.shape, strict=True))


def named_shards(model: MegatronModule) -> Iterator[tuple[str, ShardedTensor, Parameter]]:
    """Yield this rank's shards of a module's parameters: name, shard, and the parameter that it is a view of.

    The name is that of checkpoints with the number of the layer in the whole model, from 0 on:
    ``decoder.layers.3.self_attention.linear_qkv.weight``. A weight that is no parameter (one in 4 bits) is left out.
    """
    parameters = list(model.parameters())
    for shard in shards_of(model):
        owner = next((one for one in parameters if _offset_in(one, shard.data) is not None), None)
        if owner is not None:
            yield _numbered(shard.key, shard.global_offset[: shard.prepend_axis_num]), shard, owner


def _numbered(key: str, indices: Sequence[int]) -> str:
    """A checkpoint's key with the numbers of the layer and of the expert, if it holds the weights of several."""
    numbers = list(indices)
    for several in ("decoder.layers.", "experts.experts."):
        place = key.find(several)
        if place >= 0 and numbers and not key[place + len(several) :][:1].isdigit():
            key = key.replace(several, f"{several.removesuffix('experts.')}{numbers.pop(0)}.", 1)
    return key


def view_like(shard: ShardedTensor, parameter: Parameter, tensor: Tensor) -> Tensor:
    """The part of a tensor that lies in it as ``shard`` lies in ``parameter``.

    Args:
        shard: of the parameter.
        parameter: contiguous.
        tensor: contiguous, of the parameter's shape and any dtype, such as its gradient.
    """
    offset = _offset_in(parameter, shard.data)
    if offset is None:
        raise ValueError(f"{shard.key}: not a view of the parameter")
    return tensor.as_strided(shard.data.shape, shard.data.stride(), tensor.storage_offset() + offset)


def _offset_in(parameter: Parameter, view: Tensor) -> int | None:
    """Elements before a view in its parameter's memory; ``None`` for a view of something else."""
    offset = view.data_ptr() - parameter.data_ptr()
    return offset // parameter.element_size() if 0 <= offset < parameter.numel() * parameter.element_size() else None


def gather_weights(chunks: Sequence[DistributedDataParallel]) -> dict[str, WholeTensor]:
    """Gather all weights on the main process; a collective of all ranks.

    Call it where every rank has all weights of its chunks (:class:`.data_parallel.WeightGathering`).

    Returns:
        the weights by name, as :func:`named_shards` names them; empty on other processes.
    """
    return _gather(chunks, lambda name: True, lambda parameter: parameter.detach())


def gather_gradients(
    chunks: Sequence[DistributedDataParallel], chosen: Callable[[str], bool]
) -> dict[str, WholeTensor]:
    """Gather the gradients of some weights on the main process, after a step's reductions; a collective of all ranks.

    With the distributed optimizer each data-parallel rank has the sums of its shard alone, and the others' are gathered
    into its buffers first.

    Args:
        chunks: this rank's chunks of the model.
        chosen: whether the gradient of the weight of this name is gathered.

    Returns:
        the gradients of trained weights by name; empty on other processes.
    """
    for chunk in chunks:
        for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
            if group.ddp_config.use_distributed_optimizer:
                for bucket in group.buckets:
                    _gather_bucket(bucket.grad_data, group.intra_distributed_optimizer_instance_group)
    return _gather(chunks, chosen, _gradient)


def _gradient(parameter: Parameter) -> Tensor | None:
    # Megatron-Core sets this attribute of trained parameters
    return parameter.main_grad if parameter.requires_grad else None  # type: ignore[attr-defined]


def _gather_bucket(gradients: Tensor, group: dist.ProcessGroup) -> None:
    """Give every rank of a group the whole bucket, of which each has one part of equal length, in place."""
    flat, size = gradients.view(-1), dist.get_world_size(group)
    own = flat.view(size, -1)[dist.get_rank(group)].clone()
    dist.all_gather_into_tensor(flat, own, group=group)


def _gather(
    chunks: Sequence[DistributedDataParallel],
    chosen: Callable[[str], bool],
    tensor_of: Callable[[Parameter], Tensor | None],
) -> dict[str, WholeTensor]:
    pieces = [piece for chunk in chunks for piece in pieces_of(chunk.module, chosen, tensor_of)]
    is_main = dist.get_rank() == 0
    of_ranks: list[list[Piece]] | None = [[] for _ in range(dist.get_world_size())] if is_main else None
    dist.gather_object(pieces, of_ranks, dst=0)
    return assembled(itertools.chain.from_iterable(of_ranks)) if of_ranks is not None else {}


def pieces_of(
    model: MegatronModule, chosen: Callable[[str], bool], tensor_of: Callable[[Parameter], Tensor | None]
) -> Iterator[Piece]:
    """Copy this rank's shards of a tensor of each parameter.

    Args:
        model: a stage of the model, or the whole one.
        chosen: whether the weight of this name takes part.
        tensor_of: a contiguous tensor of the parameter's shape; ``None`` where the parameter has none.
    """
    for name, shard, parameter in named_shards(model):
        tensor = tensor_of(parameter) if chosen(name) else None
        if tensor is not None:
            stacked = shard.prepend_axis_num
            data = view_like(shard, parameter, tensor).to("cpu", copy=True)
            yield Piece(name, tuple(shard.global_shape[stacked:]), tuple(shard.global_offset[stacked:]), data)


def assembled(pieces: Iterable[Piece]) -> dict[str, WholeTensor]:
    """Put shards together, by name.

    Raises:
        ValueError: a part of a tensor is missing.
    """
    by_name: dict[str, dict[tuple[int, ...], list[Piece]]] = {}
    for piece in pieces:
        by_name.setdefault(piece.name, {}).setdefault(piece.offset, []).append(piece)
    whole = {}
    for name, by_offset in by_name.items():
        firsts = [copies[0] for copies in by_offset.values()]
        value, filled = firsts[0].data.new_empty(firsts[0].shape), 0
        for first in firsts:
            value[first.region] = first.data
            filled += first.data.numel()
        if filled != value.numel():
            raise ValueError(f"{name}: the ranks have {filled} of {value.numel()} elements")
        whole[name] = WholeTensor(value, max(map(_disagreement, by_offset.values())))
    return whole


def _disagreement(copies: Sequence[Piece]) -> float:
    first, *others = [piece.data.double() for piece in copies]
    largest = max([(other - first).norm().item() for other in others], default=0.0)
    return largest / max(first.norm().item(), torch.finfo(torch.float64).tiny) if largest else largest
