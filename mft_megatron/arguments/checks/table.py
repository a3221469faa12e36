"""All checks that need no device.

A check takes the complete arguments and returns ``None``, or the one line that refuses the run: what is wrong, with the
numbers, and the remedy. For a new check write a function in the file of its subject and add it to :data:`CHECKS`.
"""

from .attention import check_attention
from .batches import check_batch_schedule, check_batches
from .checkpointing import check_checkpointing
from .context import check_context
from .lora import check_adapters
from .moe import check_experts, check_routing
from .multi_task import check_objective, check_stopping
from .network import check_activation, check_heads, check_positions
from .parallel_layout import check_experts_layout, check_layout, check_stages, check_virtual_stages
from .precision import check_data_parallelism, check_optimizer, check_precision
from .ranges import check_ranges
from .recompute import check_recompute
from .schedules import check_schedule, check_weight_decay
from .transformer_engine import check_fp8
from .window import check_window

CHECKS = (
    check_ranges,
    check_heads,
    check_activation,
    check_positions,
    check_layout,
    check_virtual_stages,
    check_stages,
    check_experts,
    check_routing,
    check_experts_layout,
    check_context,
    check_window,
    check_recompute,
    check_batch_schedule,
    check_batches,
    check_schedule,
    check_weight_decay,
    check_precision,
    check_attention,
    check_fp8,
    check_optimizer,
    check_data_parallelism,
    check_adapters,
    check_checkpointing,
    check_objective,
    check_stopping,
)
