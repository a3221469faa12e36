"""Every replacement inside Megatron-Core and torch, in one table.

::

    WITHOUT_CUDA    applied by ``devices.prepare`` before Megatron-Core is imported, where there is no CUDA
    WITH_CUDA       the same, where there is
    SIMULATED       the same, where a GPU is simulated
    WHERE_NEEDED    called by the layer files that need them, on any machine

When a release of Megatron-Core is added to :data:`.versions.MEGATRON_CORE`, run the tests named here under it: each
fails when its patch is no longer needed. A patch can be deleted when no supported release needs it.
"""

import dataclasses
import functools
from collections.abc import Callable

from . import checkpoint_pickles, gradient_norm, jit_fuser, megatron_fixes, pipeline_messages, without_cuda
from .simulated_gpu import SimulatedGPU
from .simulation import cuda_functions, process_group


@dataclasses.dataclass(frozen=True)
class Patch:
    """One replacement.

    Attributes:
        apply: the function that replaces; its docstring says why.
        needed: ``file::name`` of the test that shows that it is still needed.
        seen_in: the last version of Megatron-Core that needed it.
    """

    apply: Callable[..., object]
    needed: str
    seen_in: str = "0.19.2"


_EACH = "tests/mcore/platform/test_without_cuda.py::test_each_is_still_needed"
_FIXES = "tests/mcore/platform/test_megatron_fixes.py"
_DRY_RUN = "tests/dry_run/test_simulated_gpu.py::test_each_is_still_needed"

WITHOUT_CUDA = {
    "jit": Patch(without_cuda.stub_jit, "tests/mcore/platform/test_without_cuda.py::test_megatron_compiles_by_default"),
    "functions of torch.cuda": Patch(without_cuda.replace_cuda_functions, _EACH),
    "tensor methods": Patch(without_cuda.replace_tensor_methods, _EACH),
    "random-number state": Patch(without_cuda.replace_rng_state, _EACH),
    "tensor factories": Patch(without_cuda.replace_factories, _EACH),
    "token counts of experts": Patch(
        without_cuda.convert_token_counts, "tests/parallel/test_experts.py::test_the_replacement_is_still_needed"
    ),
}
WITH_CUDA = {
    "jit": Patch(
        jit_fuser.choose_at_each_call, "tests/mcore/platform/test_jit_fuser.py::test_megatron_chooses_when_imported"
    )
}
SIMULATED = {
    "jit": Patch(cuda_functions.replace_jit, _DRY_RUN),
    "tensor methods": Patch(cuda_functions.replace_tensor_methods, _DRY_RUN),
    "tensors of values": Patch(cuda_functions.replace_tensors_from_values, _DRY_RUN),
    "sizes of storages": Patch(cuda_functions.replace_storage_resizing, _DRY_RUN),
    "choices of kernels": Patch(cuda_functions.replace_kernel_choices, _DRY_RUN),
    "objects of other ranks": Patch(process_group.replace_object_collectives, _DRY_RUN),
    "messages sent together": Patch(process_group.replace_coalescing, _DRY_RUN),
}
WHERE_NEEDED = {
    "pickles of checkpoints": Patch(
        checkpoint_pickles.load_without_code,
        "tests/mcore/checkpointing/test_untrusted_checkpoints.py::test_torch_executes_what_a_checkpoint_names",
    ),
    "class of a built module": Patch(megatron_fixes.become, f"{_FIXES}::test_megatron_takes_no_class_for_these"),
    "te_general_gemm": Patch(megatron_fixes.define_te_general_gemm, f"{_FIXES}::test_routers_need_te_general_gemm"),
    "scale of experts' losses": Patch(
        megatron_fixes.reset_expert_loss_scale, f"{_FIXES}::test_megatron_keeps_the_shape_of_the_first_scale"
    ),
    "known shapes of messages": Patch(
        pipeline_messages.take_known_shapes,
        "tests/parallel/test_data_modes.py::test_megatron_sends_every_shape",
    ),
    "norm of gradients": Patch(
        gradient_norm.compute_at_once, "tests/mcore/platform/test_gradient_norm.py::test_megatron_reads_every_norm"
    ),
    "recompute without Transformer Engine": Patch(
        megatron_fixes.recompute_without_transformer_engine, f"{_FIXES}::test_recompute_asks_transformer_engine"
    ),
    "torch's Adam beside offloaded states": Patch(
        megatron_fixes.torch_adam_for_offloading,
        "tests/parallel/test_offloaded_optimizer.py::test_megatron_forgets_the_option",
    ),
    "precise states without Transformer Engine": Patch(
        megatron_fixes.precise_states_without_transformer_engine,
        f"{_FIXES}::test_offloading_asks_transformer_engine",
        seen_in="0.16.1",
    ),
    "weight gradients without apex": Patch(
        megatron_fixes.sum_weight_gradients_without_apex, f"{_FIXES}::test_linear_layers_ask_apex"
    ),
    "results of checkpoint writers": Patch(
        megatron_fixes.write_without_results_process, f"{_FIXES}::test_writers_start_a_process_for_their_results"
    ),
}
PATCHES = (
    WITHOUT_CUDA
    | {f"{name} on CUDA": patch for name, patch in WITH_CUDA.items()}
    | {f"{name} of a simulated GPU": patch for name, patch in SIMULATED.items()}
    | WHERE_NEEDED
)


@functools.cache
def apply_without_cuda() -> None:
    """Apply every patch for a machine without CUDA, in the order of the table, once per process."""
    for patch in WITHOUT_CUDA.values():
        patch.apply()


@functools.cache
def apply_with_cuda() -> None:
    """Apply every patch for a machine with CUDA, once per process."""
    for patch in WITH_CUDA.values():
        patch.apply()


@functools.cache
def apply_simulated(gpu: SimulatedGPU) -> None:
    """Apply every patch for a simulated GPU, in the order of the table, once per process."""
    cuda_functions.replace_cuda_functions(gpu)
    for patch in SIMULATED.values():
        patch.apply()
