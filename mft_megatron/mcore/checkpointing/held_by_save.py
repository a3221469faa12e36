"""Memory that a save of a checkpoint takes, without writing it: for dry runs."""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from torch import Tensor

from mft_megatron.arguments.table import Arguments
from mft_megatron.mcore.trainer import Trainer

from .checkpoint import state_to_save


def build_state(arguments: Arguments, trainer: Trainer) -> list[Tensor]:
    """Build what this rank would save; a collective of all ranks.

    Returns:
        tensors of weights and states, as long as they are kept in memory by the list.
    """
    with trainer.weights.whole():
        state = state_to_save(trainer, arguments.checkpoint, None, arguments.saves_base)
    sharded, _ = extract_sharded_tensors_and_factories(state)
    return [tensor for entry in nested_values(sharded) if isinstance(tensor := entry.data, Tensor)]


def share_that_is_written(arguments: Arguments) -> float:
    """Part of the weights, and of states that each data-parallel rank has, that this rank copies to the host."""
    if arguments.checkpoint.ckpt_fully_parallel_save:
        return 1 / parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    return float(parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0)
