"""An optimizer's state in checkpoints, in one format for all kinds of optimizer, so that any kind loads any other's.

::

    optimizer.state.<kind>.<key of a weight>     a tensor of the weight's shape, sharded as the weight is
    steps, loss_scale                            scalars

Kinds: ``exp_avg`` and ``exp_avg_sq`` of Adam, ``momentum_buffer`` of SGD, and in bf16 and fp16 runs ``fp32_param``, the
main weight. Settings of parameter groups are not stored: they come from the command line. Megatron-Core's own state
dicts differ between its optimizers in keys and content, and torch's Adam cannot load the distributed optimizer's.

The distributed optimizer keeps its states as slices of flat buffers. To save, each weight's states are gathered into
the host's memory of one data-parallel rank (:mod:`.gathered_states`); to load, each rank reads the rows that hold its
slices. For both a rank needs host memory for about the states that it has, in fp32.
"""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.cpu_offloading.hybrid_optimizer import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.grad_scaler import MegatronGradScaler
from torch import Tensor
from torch.nn import Parameter

from mft_megatron.mcore.platform import devices

from .gathered_states import gathered_states, sliced_parts
from .slices import ADAM, MAIN, keeps_other_dtypes, kinds_of, slice_of_rank, write_states
from .stored_parts import Sharded, StoredPart, stored_parts
from .updated_weights import main_of, parts_of, weights_of

PREFIX = "optimizer.state"
# the entry of a slice's states that says where in the blocks its elements are
_PLACES = "places"


def stored_state(optimizer: MegatronOptimizer, model_state: dict[str, Any]) -> dict[str, Any]:
    """Build the sharded state to save; a collective of all ranks.

    Args:
        optimizer: this rank's optimizer.
        model_state: sharded state of this rank's weights, on which the keys and shards of the states are modelled.
    """
    steps = _steps_taken(optimizer)
    # an optimizer that has never stepped has no state, and its main weights equal the weights
    tensors = _stored_tensors(optimizer, model_state) if steps else {}
    # no empty entry: it would be a value that other ranks lack, which Megatron-Core logs as an error
    also = {"tensors": tensors} if tensors else {}
    return {"steps": steps, "loss_scale": _scale_state(optimizer), **also}


def wanted_state(optimizer: MegatronOptimizer, model_state: dict[str, Any], steps: int) -> dict[str, Any]:
    """Build the sharded state to load into, before weights are loaded.

    Args:
        optimizer: this rank's optimizer; its states are allocated.
        model_state: sharded state of this rank's weights.
        steps: optimizer steps after which the state was saved.
    """
    if not steps:
        return {"tensors": {}}
    for part in parts_of(optimizer):
        _allocate(part, steps)
    return {"tensors": _wanted_tensors(optimizer, model_state)}


@torch.no_grad()
def restore(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Copy the loaded state into the optimizer, after the weights were loaded."""
    _restore_scale(optimizer, state["loss_scale"])
    if not state["steps"]:
        for part in parts_of(optimizer):
            _forget(part)
        optimizer.reload_model_params()
        return
    for number, part in enumerate(parts_of(optimizer)):
        for index, weight in enumerate(weights_of(part)):
            tensors = state.get("tensors", {}).get(f"{number}.{index}")
            if tensors is None:
                continue  # other ranks have the whole weight's states
            if isinstance(part, DistributedOptimizer):
                write_states(part, weight, _states_in(tensors), state["steps"])
            else:
                _restore_whole(part, weight, tensors)
        if isinstance(part.optimizer, HybridDeviceOptimizer):
            part.optimizer._sync_hdo_state_to_sub_optimizers()
    _gather_weights(optimizer)


def _states_in(tensors: dict[str, Any]) -> dict[str, Tensor]:
    """States of a slice by kind, fp32 [elements], from the blocks that hold them."""
    places = tensors[_PLACES]
    states = {}
    for kind, blocks in tensors.items():
        if kind != _PLACES:
            contents = [blocks[str(number)].flatten()[slice(*place)] for number, place in enumerate(places)]
            states[kind] = contents[0] if len(contents) == 1 else torch.cat(contents)
    return states


def _gather_weights(optimizer: MegatronOptimizer) -> None:
    """Give all ranks the weights that were rounded to remainders, which each rank did for its slice."""
    chunks: list[DistributedDataParallel] = []
    for part in parts_of(optimizer):
        sliced = isinstance(part, DistributedOptimizer) and keeps_other_dtypes(part)
        if sliced and part.optimizer.store_param_remainders:
            chunks += [chunk for chunk in part.model_chunks if chunk not in chunks]
    for chunk in chunks:
        chunk.start_param_sync(force_sync=True)


def _steps_taken(optimizer: MegatronOptimizer) -> int:
    """Steps of Adam, or 1 if SGD has stepped; the same on all ranks, including those without parameters."""
    counts, on_device = [0], []
    for part in parts_of(optimizer):
        # Transformer Engine and apex count in the groups
        counts += [int(group.get("step") or 0) for group in part.optimizer.param_groups]
        for state in part.optimizer.state.values():
            counts.append(int(state.get("momentum_buffer") is not None))
            step = state.get("step", 0)
            if isinstance(step, Tensor) and step.device.type != "cpu":
                on_device.append(step)  # a fused Adam counts on the device; all are read at once
            else:
                counts.append(int(step))
    if on_device:
        counts.append(int(torch.stack(on_device).max()))
    largest = torch.tensor(max(counts), device=devices.device())
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def _stored_tensors(optimizer: MegatronOptimizer, model_state: dict[str, Any]) -> dict[str, dict[str, Sharded]]:
    """Sharded states that this rank stores, by names that matter to no reader; a collective of all ranks."""
    entries = _entries(model_state)
    states: dict[str, dict[str, Sharded]] = {}
    for number, part in enumerate(parts_of(optimizer)):
        if isinstance(part, DistributedOptimizer):
            stored = {id(weight): _main_parts(part, entries[id(weight)]) for weight in weights_of(part)}
            parts = sliced_parts(part, stored)
            for index, kind, content in gathered_states(part, parts):
                shard = parts[index].part.holding(content, f"{PREFIX}.{kind}", 0)
                states.setdefault(f"{number}.{index}", {})[kind] = shard
        else:
            states.update(_whole_tensors(number, part, entries))
    return states


def _main_parts(part: DistributedOptimizer, entry: Sharded) -> list[StoredPart]:
    """Stored parts of a weight that ranks of this data-parallel group store."""
    if part.distributed_optimizer_instance_id:
        return []
    return [one for one in stored_parts(entry) if one.is_main]


def _whole_tensors(
    number: int, part: MegatronOptimizer, entries: dict[int, Sharded]
) -> Iterator[tuple[str, dict[str, Sharded]]]:
    """Sharded states of an optimizer that has them whole on each data-parallel rank; their content is the states."""
    for index, weight in enumerate(weights_of(part)):
        main = main_of(weight)
        state = part.optimizer.state[main]
        tensors = {kind: value for kind, value in state.items() if kind != "step" and value is not None}
        if main is not weight:
            tensors[MAIN] = main.detach()
        entry = entries[id(weight)]
        yield (
            f"{number}.{index}",
            {kind: make_sharded_optimizer_tensor(entry, value, f"{PREFIX}.{kind}") for kind, value in tensors.items()},
        )


def _wanted_tensors(optimizer: MegatronOptimizer, model_state: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Sharded states that this rank needs, by optimizer and weight."""
    entries = _entries(model_state)
    states: dict[str, dict[str, Any]] = {}
    for number, part in enumerate(parts_of(optimizer)):
        if not isinstance(part, DistributedOptimizer):
            states.update(_whole_tensors(number, part, entries))
            continue
        for index, weight in enumerate(weights_of(part)):
            start, end = slice_of_rank(part, weight)
            if start < end:
                states[f"{number}.{index}"] = _wanted_blocks(weight, entries[id(weight)], start, end)
    return states


def _wanted_blocks(weight: Parameter, entry: Sharded, start: int, end: int) -> dict[str, Any]:
    """Blocks by kind that hold a slice of a weight, and where in each block its elements are."""
    blocks: dict[str, Any] = {kind: {} for kind in kinds_of(weight)}
    places: list[tuple[int, int]] = []
    for part in stored_parts(entry):
        first, last = max(start, part.start), min(end, part.end)
        if first >= last:
            continue
        for kind in kinds_of(weight):
            block, position = part.block(first - part.start, last - part.start, f"{PREFIX}.{kind}")
            blocks[kind][str(len(places))] = block
        places.append((position, position + last - first))
    return {**blocks, _PLACES: LocalNonpersistentObject(places)}


def _entries(model_state: dict[str, Any]) -> dict[int, Sharded]:
    """The entry of each weight in the sharded state of the model, by the weight's ``id``."""
    sharded_weights, _ = extract_sharded_tensors_and_factories(model_state)
    return {id(entry.data): entry for entry in nested_values(sharded_weights)}


def _allocate(part: MegatronOptimizer, steps: int) -> None:
    """Allocate the states that an optimizer has after ``steps`` steps, with undefined content."""
    inner = part.optimizer
    if isinstance(inner, HybridDeviceOptimizer):
        # it allocates states by a step, which changes weights; weights and main weights are loaded after it
        inner.dummy_step()
        for state in inner.state.values():
            state["step"] = torch.tensor(float(steps))
        return
    if isinstance(part, DistributedOptimizer) and keeps_other_dtypes(part):
        _allocate_other_dtypes(inner)
    elif part.init_state_fn is not None:
        part.init_state_fn(inner, part.config)
    for group in inner.param_groups:
        momentum = group.get("momentum", 0)
        for parameter in group["params"]:
            if isinstance(inner, ADAM):
                # a separate tensor for each, since torch increments it in place, a fused Adam on the device
                where = parameter.device if group.get("fused") else "cpu"
                inner.state[parameter]["step"] = torch.tensor(float(steps), device=where)
            elif momentum:
                inner.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        if not isinstance(inner, torch.optim.Optimizer) or type(inner).__module__.split(".")[0] != "torch":
            group["step"] = steps


def _forget(part: MegatronOptimizer) -> None:
    """Let an optimizer have no states, as before its first step; it may have stepped since the checkpoint was saved."""
    inner = part.optimizer
    if isinstance(inner, HybridDeviceOptimizer) and inner.state:
        for one in inner.sub_optimizers:
            one.state.clear()
        inner._sync_sub_optimizers_state_to_hdo()
    else:
        inner.state.clear()
    for group in inner.param_groups:
        group.pop("step", None)


def _allocate_other_dtypes(inner: Any) -> None:
    """Allocate the states of Transformer Engine's Adam; Megatron-Core's function leaves out an argument."""
    for group in inner.param_groups:
        for parameter in group["params"]:
            if not inner.state[parameter]:
                inner.initialize_state(parameter, inner.store_param_remainders and parameter.dtype == torch.bfloat16)


def _restore_whole(part: MegatronOptimizer, weight: Parameter, tensors: dict[str, Tensor]) -> None:
    main = main_of(weight)
    for kind, value in tensors.items():
        (main if kind == MAIN else part.optimizer.state[main][kind]).copy_(value)


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
    return getattr(parts_of(optimizer)[0], "grad_scaler", None) if parts_of(optimizer) else None
