"""Replacements inside Megatron-Core that any machine may need; layer files call them where they need them.

Each is entered in :data:`.patches.PATCHES` with the test that shows that it is still needed.
"""

import contextlib
import types
from collections.abc import Callable, Iterator

from torch import Tensor, nn


def become(module: nn.Module, kind: type[nn.Module]) -> None:
    """Exchange the class of a module that Megatron-Core has built for a subclass of it.

    ``GPTModel`` builds rotary embedding, word embeddings and output layer itself and takes no class for them, and a
    linear layer gets adapters after it was built with its weights. Building such a module a second time would mean
    repeating all that Megatron-Core has done to it: weights and their marks, hooks, names in a checkpoint. When only
    the class changes, all that stays. ``kind.__init__`` is not run.

    Args:
        module: changed in place.
        kind: subclass of the module's class.

    Raises:
        TypeError: ``kind`` is no subclass, so the module would lose what its class gave it.
    """
    if not issubclass(kind, type(module)):
        raise TypeError(f"a {type(module).__name__} cannot become a {kind.__name__}, which is no subclass of it")
    module.__class__ = kind


def define_te_general_gemm() -> None:
    """Define a name that ``moe_utils`` imports from Transformer Engine's extension and reads without it, too.

    A router's logits are computed by ``te_general_gemm`` unless that is ``None``; where Transformer Engine is not
    installed, the name is undefined there.
    """
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def reset_expert_loss_scale() -> None:
    """Forget the scale of experts' losses, which Megatron-Core keeps in a class, for the whole process.

    Its schedule copies each step's scale into the tensor that came first, of whatever shape, dtype and device; without
    one it takes the new tensor.
    """
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    MoEAuxLossAutoScaler.main_loss_backward_scale = None


def recompute_without_transformer_engine() -> None:
    """Let norms and experts' activation functions be recomputed where Transformer Engine is not installed.

    ``CheckpointWithoutOutput`` asks whether its argument ``fp8`` is ``None``, and its default is ``False``: so it would
    ask Transformer Engine about fp8.
    """
    from megatron.core.tensor_parallel import random

    if not random.HAVE_TE:
        random.CheckpointWithoutOutput.__init__.__defaults__ = (None,)


def sum_weight_gradients_without_apex(add: Callable[[Tensor, Tensor, Tensor], None]) -> None:
    """Give Megatron-Core's linear layers what they call apex for: adding a weight's gradient to ``main_grad``.

    With ``gradient_accumulation_fusion`` they refuse to be built without apex, and their backward pass calls one of two
    functions, by the dtype of ``main_grad``.

    Args:
        add: takes the layer's input [T, H], the gradient of its output [T, V] and ``main_grad`` [V, H] of any dtype.
    """
    from megatron.core.tensor_parallel import layers

    layers._grad_accum_fusion_available = True
    layers.fused_weight_gradient_mlp_cuda = types.SimpleNamespace(wgrad_gemm_accum_fp32=add, wgrad_gemm_accum_fp16=add)


@contextlib.contextmanager
def torch_adam_for_offloading() -> Iterator[None]:
    """Build optimizers with torch's Adam on the GPU, too, beside the one for states in the host's memory.

    ``use_torch_optimizer_for_cpu_offload`` asks for it; ``get_megatron_optimizer`` follows it and then sets the class
    again.
    """
    from megatron.core import optimizer

    found = optimizer.Adam
    optimizer.Adam = optimizer.CPUAdam
    try:
        yield
    finally:
        optimizer.Adam = found


def precise_states_without_transformer_engine() -> None:
    """Let Megatron-Core ask for the version of Transformer Engine where there is none; call before the config is made.

    States in the host's memory need none, and 0.16.1 compares ``None`` with the version that it wants.
    """
    from megatron.core.optimizer import optimizer_config

    try:
        optimizer_config.is_te_min_version("0")
    except TypeError:
        optimizer_config.is_te_min_version = lambda version: False


def write_without_results_process() -> None:
    """Let Megatron-Core's checkpoint writers start no process that hands over their results.

    The first save of each rank would start one, and a second that watches it: they import torch, which takes seconds,
    stay when the rank is killed, and hold its output. Results are handed over by
    :class:`mft_megatron.mcore.checkpointing.writers.background.Background` instead.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = "unused"
