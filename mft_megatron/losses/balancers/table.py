"""Convergence balancing: task weights out of validation losses (docs/LOSSES.md §4).

::

    state, losses of a draw [K] ─► update ─► new state, weights [K], who took part [K]

Each balancer is a frozen dataclass of its options. ``begin(num_tasks, first_loss_K)`` makes a state; ``update(state,
loss_K, step)`` is a pure function and never modifies the state it is given. A state is a dict of CPU tensors, ready for
a checkpoint. All K tasks of a call have validation data: the caller leaves out those that have none.
"""

from .coba import Coba
from .famo import Famo
from .self_paced import SelfPaced

BALANCERS = {"self-paced": SelfPaced, "famo": Famo, "coba": Coba}
