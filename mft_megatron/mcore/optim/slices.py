"""This rank's slices of weights in a distributed optimizer, and their states as fp32 vectors whatever it keeps.

Transformer Engine's fused Adam may keep them in bf16, fp16 or fp8 with a scale of each slice, and main weights as
:mod:`.remainders` of the weights.
"""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

import torch
from megatron.core.optimizer.cpu_offloading.hybrid_optimizer import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor
from torch.nn import Parameter

from .remainders import join_remainders, split_remainders

MAIN = "fp32_param"
# AdamW is a subclass of Adam only in newer releases of torch
ADAM = (torch.optim.Adam, torch.optim.AdamW)


def kinds_of(weight: Parameter) -> tuple[str, ...]:
    """Kinds of state of the distributed optimizer, which is Adam; an fp32 weight is its own main weight."""
    return ("exp_avg", "exp_avg_sq") + ((MAIN,) if weight.dtype != torch.float32 else ())


def slice_of_rank(part: DistributedOptimizer, weight: Parameter) -> tuple[int, int]:
    """Start and end of the elements of the flattened weight of which this rank has the states; maybe there are none."""
    buffer, dtype, bucket = part.model_param_gbuf_map.get(weight, (None, None, None))
    if buffer is None:
        return 0, 0
    elements = part.gbuf_ranges[buffer][dtype][bucket]["param_map"][weight]["param"]
    return elements.start, elements.end


def keeps_other_dtypes(part: DistributedOptimizer) -> bool:
    """Whether the states are Transformer Engine's, in the dtypes of ``--use-precision-aware-optimizer``."""
    return part.config.use_precision_aware_optimizer and not isinstance(part.optimizer, HybridDeviceOptimizer)


def read_state(part: DistributedOptimizer, weight: Parameter, kind: str) -> Tensor:
    """A state of this rank's slice of a weight, fp32 [elements]; a copy if the optimizer keeps another dtype."""
    if not keeps_other_dtypes(part):
        return part._get_main_param_and_optimizer_states(weight)["param" if kind == MAIN else kind].detach()
    key = _key(part, weight)
    state = part.optimizer.get_unscaled_state(key, "master_param" if kind == MAIN else kind).detach()
    return join_remainders(key.detach(), state) if state.dtype == torch.int16 else state.float()


def write_states(part: DistributedOptimizer, weight: Parameter, states: dict[str, Tensor], steps: int) -> None:
    """Set the states of this rank's slice of a weight.

    Where main weights are kept as remainders, the slice of the weight itself is set, too: it is not always as torch
    rounds the main weight. Other ranks then have to gather it.

    Args:
        part: its states are allocated.
        weight: this rank has a slice of it.
        states: fp32 [elements] by kind; may be overwritten.
        steps: that Adam has taken.
    """
    if MAIN not in states:
        start, end = slice_of_rank(part, weight)
        states = {**states, MAIN: weight.detach().flatten()[start:end]}
    if holds_remainders(part, weight):
        key = _key(part, weight)
        rounded, remainders = split_remainders(states[MAIN].to(key.device))
        key.data.copy_(rounded)
        part.optimizer.state[key]["master_param"].copy_(remainders)
        for kind in ("exp_avg", "exp_avg_sq"):
            part.optimizer.set_scaled_state(key, kind, states[kind])
        return
    by_name = {"param" if kind == MAIN else kind: state for kind, state in states.items()}
    if isinstance(part.optimizer, (HybridDeviceOptimizer, *ADAM)):
        by_name["step"] = torch.tensor(float(steps))
    part._set_main_param_and_optimizer_states(weight, by_name)


def holds_remainders(part: DistributedOptimizer, weight: Parameter) -> bool:
    """Whether the main weight of this rank's slice is kept as remainders; its states are allocated."""
    if not keeps_other_dtypes(part):
        return False
    main = part.optimizer.state[_key(part, weight)].get("master_param")
    return main is not None and main.dtype == torch.int16


def _key(part: DistributedOptimizer, weight: Parameter) -> Tensor:
    """The tensor by which the inner optimizer knows this rank's slice of a weight."""
    group, index = part.model_param_group_index_map[weight]
    return part.optimizer.param_groups[group]["params"][index]
