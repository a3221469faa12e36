"""What of an optimizer is in a checkpoint: the same whatever kind of optimizer wrote it, so that any kind loads it.

::

    optimizer.state.<kind>.<key of a weight>     a tensor like the weight, in parts as the weight is
    steps, loss_scale                            numbers

Kinds: ``exp_avg`` and ``exp_avg_sq`` of Adam, ``momentum_buffer`` of SGD, and in bf16 and fp16 runs ``fp32_param``, the
main weight. Settings of parameter groups are not stored: the command line has them. Megatron-Core's own states differ
between its optimizers in keys and content, and those of the distributed one do not load with torch's Adam.

The distributed optimizer's states lie in pieces of flat buffers. For a save they are gathered over the data-parallel
ranks into the host's memory; a load reads whole tensors there, of which each rank keeps its piece. Either takes three
fp32 tensors of each weight on each rank for that time.
"""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.cpu_offloading.hybrid_optimizer import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import Tensor
from torch.nn import Parameter

from mft_megatron.mcore.platform import devices

PREFIX = "optimizer.state"
MAIN = "fp32_param"
Sharded = ShardedTensor | ShardedTensorFactory


def stored_state(optimizer: MegatronOptimizer, model_state: dict) -> dict[str, Any]:
    """What to save. Every rank calls it.

    Args:
        optimizer: of this rank.
        model_state: sharded state of this rank's weights.
    """
    steps = _steps_taken(optimizer)
    # an optimizer that has never stepped has no state, and main weights that are the weights
    tensors = _tensors(optimizer, model_state, False) if steps else {}
    return {"steps": steps, "loss_scale": _scale_state(optimizer), "tensors": tensors}


def wanted_state(optimizer: MegatronOptimizer, model_state: dict, steps: int) -> dict[str, Any]:
    """What to load, before weights are loaded: tensors like those that were saved after ``steps`` steps."""
    if not steps:
        return {"tensors": {}}
    for part in _parts(optimizer):
        _allocate(part, steps)
    return {"tensors": _tensors(optimizer, model_state, True)}


@torch.no_grad()
def restore(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Put what was loaded into the optimizer, after the weights were loaded."""
    _restore_scale(optimizer, state["loss_scale"])
    if not state["steps"]:
        optimizer.reload_model_params()
        return
    for number, part in enumerate(_parts(optimizer)):
        for index, weight in enumerate(_weights(part)):
            tensors = state["tensors"][f"{number}.{index}"]
            if isinstance(part, DistributedOptimizer):
                _restore_piece(part, weight, tensors, state["steps"])
            else:
                _restore_whole(part, weight, tensors)
        if isinstance(part.optimizer, HybridDeviceOptimizer):
            part.optimizer._sync_hdo_state_to_sub_optimizers()


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """Megatron chains an optimizer for experts to that for all else; one without parameters is left out."""
    return [part for part in optimizer.chained_optimizers if not part.is_stub_optimizer]


def _weights(part: MegatronOptimizer) -> Iterator[Parameter]:
    """All of this rank's weights that the optimizer is for, if only by its pieces of them."""
    if isinstance(part, DistributedOptimizer):
        for buffer in part.buffers:
            for bucket in buffer.buckets:
                yield from (weight for weight in buffer.param_index_map if weight in bucket.params)
    elif isinstance(part, Float16OptimizerWithFloat16Params):
        for halves, wholes in zip(part.float16_groups, part.fp32_from_fp32_groups, strict=True):
            yield from halves
            yield from wholes
    else:
        yield from part.get_parameters()


def _main(weight: Parameter) -> Tensor:
    """What the optimizer updates: its own copy, or the weight itself where that is fp32."""
    return getattr(weight, "main_param", weight)


def _steps_taken(optimizer: MegatronOptimizer) -> int:
    """Steps of Adam, or whether SGD has stepped; the same on all ranks, also those that have nothing to update."""
    steps = 0
    for part in _parts(optimizer):
        for group in part.optimizer.param_groups:
            steps = max(steps, int(group.get("step") or 0))  # where Transformer Engine and apex count
        for state in part.optimizer.state.values():
            steps = max(steps, int(state.get("step") or 0), int(state.get("momentum_buffer") is not None))
    agreed = torch.tensor(steps, device=devices.device())
    dist.all_reduce(agreed, dist.ReduceOp.MAX)
    return int(agreed)


def _tensors(optimizer: MegatronOptimizer, model_state: dict, loading: bool) -> dict[str, dict[str, Sharded]]:
    sharded_weights, _ = extract_sharded_tensors_and_factories(model_state)
    of_weight = {id(entry.data): entry for entry in nested_values(sharded_weights)}
    found = {}
    for number, part in enumerate(_parts(optimizer)):
        if isinstance(part, DistributedOptimizer):
            states = _room(part) if loading else _gathered(part)
            for index, (weight, tensors) in enumerate(states):
                found[f"{number}.{index}"] = _like(of_weight[id(weight)], tensors)
            continue
        for index, weight in enumerate(_weights(part)):
            main = _main(weight)
            state = part.optimizer.state[main]
            tensors = {kind: value for kind, value in state.items() if kind != "step" and value is not None}
            if main is not weight:
                tensors[MAIN] = main.detach()
            found[f"{number}.{index}"] = _like(of_weight[id(weight)], tensors)
    return found


def _room(part: DistributedOptimizer) -> Iterator[tuple[Parameter, dict[str, Tensor]]]:
    """For each weight tensors in the host's memory to load into."""
    for weight in _weights(part):
        yield weight, {kind: torch.empty(weight.shape, dtype=torch.float32) for kind in _kinds(weight)}


def _kinds(weight: Parameter) -> tuple[str, ...]:
    """The distributed optimizer is Adam; the main weight of an fp32 weight is that itself."""
    return ("exp_avg", "exp_avg_sq") + ((MAIN,) if weight.dtype != torch.float32 else ())


def _gathered(part: DistributedOptimizer) -> Iterator[tuple[Parameter, dict[str, Tensor]]]:
    """Each weight's states, whole and in the host's memory, bucket by bucket.

    Megatron-Core's own gathering takes places in the padded buffer for places in one without the padding between
    buckets: with several buckets states would be stored shifted.
    """
    for number, buffer in enumerate(part.buffers):
        (ranges_of_buckets,) = part.gbuf_ranges[number].values()
        for bucket, ranges in zip(buffer.buckets, ranges_of_buckets, strict=True):
            weights = [weight for weight in buffer.param_index_map if weight in bucket.params]
            whole = {kind: {} for kind in ("param", "exp_avg", "exp_avg_sq")}
            for kind, of_weight in whole.items():
                flat = _gather_bucket(part, bucket, ranges["param_map"], kind)
                for weight in weights:
                    start, end, _ = buffer.param_index_map[weight]
                    of_weight[weight] = flat[start - bucket.offset : end - bucket.offset].view(weight.shape)
            for weight in weights:
                names = {kind: "param" if kind == MAIN else kind for kind in _kinds(weight)}
                yield weight, {kind: whole[name][weight] for kind, name in names.items()}


def _gather_bucket(part: DistributedOptimizer, bucket, ranges: dict, kind: str) -> Tensor:
    """One kind of state of a whole bucket with its padding, in the host's memory; fp32 [elements of the bucket]."""
    group = part.data_parallel_group
    mine = torch.zeros(bucket.grad_data.numel() // group.size(), device=devices.device())
    for weight, places in ranges.items():
        piece = part._get_main_param_and_optimizer_states(weight)[kind]
        mine[places["gbuf_local"].start : places["gbuf_local"].end] = piece.detach().to(mine)
    flat = mine.new_empty(bucket.grad_data.numel())
    dist.all_gather_into_tensor(flat, mine, group=group)
    return flat.cpu()


def _like(weight: Sharded, tensors: dict[str, Tensor]) -> dict[str, Sharded]:
    return {kind: make_sharded_optimizer_tensor(weight, value, f"{PREFIX}.{kind}") for kind, value in tensors.items()}


def _allocate(part: MegatronOptimizer, steps: int) -> None:
    """States as after ``steps`` steps, but for their content."""
    inner = part.optimizer
    if isinstance(inner, HybridDeviceOptimizer):
        # has its optimizers make their states by a step; weights and main weights are loaded after it
        inner.dummy_step()
        for state in inner.state.values():
            state["step"] = torch.tensor(float(steps))
        return
    if part.init_state_fn is not None:
        part.init_state_fn(inner, part.config)
    for group in inner.param_groups:
        momentum = group.get("momentum", 0)
        for parameter in group["params"]:
            if isinstance(inner, torch.optim.Adam):
                # one for each: torch counts in place
                inner.state[parameter]["step"] = torch.tensor(float(steps))
            elif momentum:
                inner.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        if not isinstance(inner, torch.optim.Optimizer) or type(inner).__module__.split(".")[0] != "torch":
            group["step"] = steps


def _restore_whole(part: MegatronOptimizer, weight: Parameter, tensors: dict[str, Tensor]) -> None:
    main = _main(weight)
    for kind, value in tensors.items():
        (main if kind == MAIN else part.optimizer.state[main][kind]).copy_(value)


def _restore_piece(part: DistributedOptimizer, weight: Parameter, tensors: dict[str, Tensor], steps: int) -> None:
    """Of a weight that this rank has a piece of; nothing of others."""
    buffer, dtype, bucket = part.model_param_gbuf_map.get(weight, (None, None, None))
    if buffer is None:
        return
    piece = part.gbuf_ranges[buffer][dtype][bucket]["param_map"][weight]["param"]
    whole = {"param": weight.detach(), **tensors}
    whole["param"] = whole.pop(MAIN, whole["param"])
    pieces = {kind: value.flatten()[piece.start : piece.end] for kind, value in whole.items()}
    if isinstance(part.optimizer, HybridDeviceOptimizer | torch.optim.Adam):
        pieces["step"] = torch.tensor(float(steps))
    part._set_main_param_and_optimizer_states(weight, pieces)


def _scale_state(optimizer: MegatronOptimizer) -> dict[str, float]:
    scaler = _scaler(optimizer)
    state = {} if scaler is None else scaler.state_dict()
    return {name: float(value) for name, value in state.items()}


def _restore_scale(optimizer: MegatronOptimizer, state: dict[str, float]) -> None:
    """A dynamic loss scale goes on from where it was; a constant one is what the command line says."""
    scaler = _scaler(optimizer)
    if scaler is None or not state or not scaler.state_dict():
        return
    scale = torch.tensor([state["scale"]], dtype=torch.float32, device=devices.device())
    scaler.load_state_dict({name: int(value) for name, value in state.items()} | {"scale": scale})


def _scaler(optimizer: MegatronOptimizer):
    return getattr(_parts(optimizer)[0], "grad_scaler", None) if _parts(optimizer) else None
