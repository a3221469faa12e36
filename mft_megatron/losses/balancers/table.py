"""The balancers of ``--task-balance``, by name (docs/LOSSES.md §4)."""

from .balancer import Balancer
from .coba import Coba
from .famo import Famo
from .self_paced import SelfPaced

BALANCERS: dict[str, type[Balancer]] = {"self-paced": SelfPaced, "famo": Famo, "coba": Coba}
