"""An optimizer's state in checkpoints, in one format for all kinds of optimizer, so that any kind loads any other's.

::

    optimizer.state.<kind>.<key of a weight>     a tensor of the weight's shape, sharded as the weight is
    steps, loss_scale                            scalars

Kinds: ``exp_avg`` and ``exp_avg_sq`` of Adam, ``momentum_buffer`` of SGD, and in bf16 and fp16 runs ``fp32_param``, the
main weight. Settings of parameter groups are not stored: they come from the command line. Megatron-Core's own state
dicts differ between its optimizers in keys and content, and torch's Adam cannot load the distributed optimizer's.

The distributed optimizer keeps its states as slices of flat buffers. To save, they are gathered over the data-parallel
ranks into the host's memory; to load, whole tensors are read there, and each rank keeps its slice. Meanwhile each rank
needs host memory for three fp32 tensors of each weight.
"""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.cpu_offloading.hybrid_optimizer import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.grad_scaler import MegatronGradScaler
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import Tensor
from torch.nn import Parameter

from mft_megatron.mcore.platform import devices

PREFIX = "optimizer.state"
MAIN = "fp32_param"
# AdamW is a subclass of Adam only in newer releases of torch
ADAM = (torch.optim.Adam, torch.optim.AdamW)
Sharded: TypeAlias = "ShardedTensor | ShardedTensorFactory"


def stored_state(optimizer: MegatronOptimizer, model_state: dict[str, Any]) -> dict[str, Any]:
    """Build the sharded state to save; a collective of all ranks.

    Args:
        optimizer: this rank's optimizer.
        model_state: sharded state of this rank's weights, on which the keys and shards of the states are modelled.
    """
    steps = _steps_taken(optimizer)
    # an optimizer that has never stepped has no state, and its main weights equal the weights
    tensors = _tensors(optimizer, model_state, False) if steps else {}
    return {"steps": steps, "loss_scale": _scale_state(optimizer), "tensors": tensors}


def wanted_state(optimizer: MegatronOptimizer, model_state: dict[str, Any], steps: int) -> dict[str, Any]:
    """Build the sharded state to load into, before weights are loaded.

    Args:
        optimizer: this rank's optimizer; its states are allocated.
        model_state: sharded state of this rank's weights.
        steps: optimizer steps after which the state was saved.
    """
    if not steps:
        return {"tensors": {}}
    for part in _parts(optimizer):
        _allocate(part, steps)
    return {"tensors": _tensors(optimizer, model_state, True)}


@torch.no_grad()
def restore(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Copy the loaded state into the optimizer, after the weights were loaded."""
    _restore_scale(optimizer, state["loss_scale"])
    if not state["steps"]:
        optimizer.reload_model_params()
        return
    for number, part in enumerate(_parts(optimizer)):
        for index, weight in enumerate(_weights(part)):
            tensors = state["tensors"][f"{number}.{index}"]
            if isinstance(part, DistributedOptimizer):
                _restore_slice(part, weight, tensors, state["steps"])
            else:
                _restore_whole(part, weight, tensors)
        if isinstance(part.optimizer, HybridDeviceOptimizer):
            part.optimizer._sync_hdo_state_to_sub_optimizers()


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """Chained optimizers, without those that have no parameters; Megatron has a separate one for experts."""
    return [part for part in optimizer.chained_optimizers if not part.is_stub_optimizer]


def _weights(part: MegatronOptimizer) -> Iterator[Parameter]:
    """Weights of this rank that the optimizer updates, whole or the rank's slices of them."""
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
    """The tensor that the optimizer updates: an fp32 copy of the weight, or the weight itself where it is fp32."""
    return getattr(weight, "main_param", weight)


def _steps_taken(optimizer: MegatronOptimizer) -> int:
    """Steps of Adam, or 1 if SGD has stepped; the same on all ranks, including those without parameters."""
    steps = 0
    for part in _parts(optimizer):
        for group in part.optimizer.param_groups:
            steps = max(steps, int(group.get("step") or 0))  # Transformer Engine and apex count here
        for state in part.optimizer.state.values():
            steps = max(steps, int(state.get("step") or 0), int(state.get("momentum_buffer") is not None))
    largest = torch.tensor(steps, device=devices.device())
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def _tensors(optimizer: MegatronOptimizer, model_state: dict[str, Any], loading: bool) -> dict[str, dict[str, Sharded]]:
    """Sharded states by ``<optimizer>.<weight>``, both by index, and kind."""
    sharded_weights, _ = extract_sharded_tensors_and_factories(model_state)
    entry_of_weight = {id(entry.data): entry for entry in nested_values(sharded_weights)}
    states = {}
    for number, part in enumerate(_parts(optimizer)):
        if isinstance(part, DistributedOptimizer):
            of_weights = _empty(part) if loading else _gathered(part)
            for index, (weight, tensors) in enumerate(of_weights):
                states[f"{number}.{index}"] = _sharded_like(entry_of_weight[id(weight)], tensors)
            continue
        for index, weight in enumerate(_weights(part)):
            main = _main(weight)
            state = part.optimizer.state[main]
            tensors = {kind: value for kind, value in state.items() if kind != "step" and value is not None}
            if main is not weight:
                tensors[MAIN] = main.detach()
            states[f"{number}.{index}"] = _sharded_like(entry_of_weight[id(weight)], tensors)
    return states


def _empty(part: DistributedOptimizer) -> Iterator[tuple[Parameter, dict[str, Tensor]]]:
    """Uninitialised states of each weight by kind, whole, fp32 in the host's memory."""
    for weight in _weights(part):
        yield weight, {kind: torch.empty(weight.shape, dtype=torch.float32) for kind in _kinds(weight)}


def _kinds(weight: Parameter) -> tuple[str, ...]:
    """Kinds of state of the distributed optimizer, which is Adam; an fp32 weight is its own main weight."""
    return ("exp_avg", "exp_avg_sq") + ((MAIN,) if weight.dtype != torch.float32 else ())


def _gathered(part: DistributedOptimizer) -> Iterator[tuple[Parameter, dict[str, Tensor]]]:
    """States of each weight by kind, whole, fp32 in the host's memory; gathered bucket by bucket.

    Megatron-Core's own gathering confuses offsets in the padded buffer with offsets in a buffer without the padding
    between buckets: with several buckets, states would be stored at wrong offsets.
    """
    for number, buffer in enumerate(part.buffers):
        (ranges_of_buckets,) = part.gbuf_ranges[number].values()
        for bucket, ranges in zip(buffer.buckets, ranges_of_buckets, strict=True):
            weights = [weight for weight in buffer.param_index_map if weight in bucket.params]
            whole: dict[str, dict[Parameter, Tensor]] = {"param": {}, "exp_avg": {}, "exp_avg_sq": {}}
            for kind, states in whole.items():
                flat = _gather_bucket(part, bucket, ranges["param_map"], kind)
                for weight in weights:
                    start, end, _ = buffer.param_index_map[weight]
                    states[weight] = flat[start - bucket.offset : end - bucket.offset].view(weight.shape)
            for weight in weights:
                names = {kind: "param" if kind == MAIN else kind for kind in _kinds(weight)}
                yield weight, {kind: whole[name][weight] for kind, name in names.items()}


def _gather_bucket(part: DistributedOptimizer, bucket: Any, ranges: dict[Parameter, Any], kind: str) -> Tensor:
    """One kind of state of a whole bucket with its padding, fp32 [elements of the bucket] in the host's memory."""
    group = part.data_parallel_group
    shard = torch.zeros(bucket.grad_data.numel() // group.size(), device=devices.device())
    for weight, ranges_of_weight in ranges.items():
        state = part._get_main_param_and_optimizer_states(weight)[kind]
        in_shard = ranges_of_weight["gbuf_local"]
        shard[in_shard.start : in_shard.end] = state.detach().to(shard)
    flat = shard.new_empty(bucket.grad_data.numel())
    dist.all_gather_into_tensor(flat, shard, group=group)
    return flat.cpu()


def _sharded_like(weight: Sharded, tensors: dict[str, Tensor]) -> dict[str, Sharded]:
    return {kind: make_sharded_optimizer_tensor(weight, value, f"{PREFIX}.{kind}") for kind, value in tensors.items()}


def _allocate(part: MegatronOptimizer, steps: int) -> None:
    """Allocate the states that an optimizer has after ``steps`` steps, with undefined content."""
    inner = part.optimizer
    if isinstance(inner, HybridDeviceOptimizer):
        # it allocates states by a step, which changes weights; weights and main weights are loaded after it
        inner.dummy_step()
        for state in inner.state.values():
            state["step"] = torch.tensor(float(steps))
        return
    if part.init_state_fn is not None:
        part.init_state_fn(inner, part.config)
    for group in inner.param_groups:
        momentum = group.get("momentum", 0)
        for parameter in group["params"]:
            if isinstance(inner, ADAM):
                # a separate tensor for each, since torch increments it in place
                inner.state[parameter]["step"] = torch.tensor(float(steps))
            elif momentum:
                inner.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        if not isinstance(inner, torch.optim.Optimizer) or type(inner).__module__.split(".")[0] != "torch":
            group["step"] = steps


def _restore_whole(part: MegatronOptimizer, weight: Parameter, tensors: dict[str, Tensor]) -> None:
    main = _main(weight)
    for kind, value in tensors.items():
        (main if kind == MAIN else part.optimizer.state[main][kind]).copy_(value)


def _restore_slice(part: DistributedOptimizer, weight: Parameter, tensors: dict[str, Tensor], steps: int) -> None:
    """Copy this rank's slice of the whole tensors into the optimizer, for a weight of which the rank has a slice."""
    buffer, dtype, bucket = part.model_param_gbuf_map.get(weight, (None, None, None))
    if buffer is None:
        return
    elements = part.gbuf_ranges[buffer][dtype][bucket]["param_map"][weight]["param"]
    whole = {"param": weight.detach(), **tensors}
    whole["param"] = whole.pop(MAIN, whole["param"])
    states = {kind: value.flatten()[elements.start : elements.end] for kind, value in whole.items()}
    if isinstance(part.optimizer, (HybridDeviceOptimizer, *ADAM)):
        states["step"] = torch.tensor(float(steps))
    part._set_main_param_and_optimizer_states(weight, states)


def _scale_state(optimizer: MegatronOptimizer) -> dict[str, float]:
    scaler = _scaler(optimizer)
    state = {} if scaler is None else scaler.state_dict()
    return {name: float(value) for name, value in state.items()}


def _restore_scale(optimizer: MegatronOptimizer, state: dict[str, float]) -> None:
    """Continue with a dynamic loss scale; a constant one comes from the command line."""
    scaler = _scaler(optimizer)
    if scaler is None or not state or not scaler.state_dict():
        return
    scale = torch.tensor([state["scale"]], dtype=torch.float32, device=devices.device())
    scaler.load_state_dict({name: int(value) for name, value in state.items()} | {"scale": scale})


def _scaler(optimizer: MegatronOptimizer) -> MegatronGradScaler | None:
    return getattr(_parts(optimizer)[0], "grad_scaler", None) if _parts(optimizer) else None
