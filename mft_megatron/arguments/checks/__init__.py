"""Everything that can be refused without a device: each check is given the whole of the arguments.

A check returns ``None``, or the one line that refuses the run: what, with the numbers, and the remedy.
"""

from .batches import check_batch_schedule, check_batches
from .checkpointing import check_checkpointing
from .layout import check_layout, check_virtual_stages
from .multi_task import check_objective, check_stopping
from .network import check_heads, check_positions
from .ranges import check_ranges
from .schedules import check_schedule, check_weight_decay

CHECKS = (
    check_ranges,
    check_heads,
    check_positions,
    check_layout,
    check_virtual_stages,
    check_batch_schedule,
    check_batches,
    check_schedule,
    check_weight_decay,
    check_checkpointing,
    check_objective,
    check_stopping,
)
