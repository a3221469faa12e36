"""The interface of balancers: their options, a pure state machine on validation losses, and what they need of draws.

::

    state, losses of a draw [K] ─► update ─► new state, weights [K], who took part [K]

A new balancer is a file with a subclass of :class:`Balancer` and a line of :data:`.table.BALANCERS`. Each of its fields
is an option of the command line, ``--<balancer>-<field>``.
"""

import abc
import dataclasses
from typing import ClassVar

from torch import Tensor

State = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Balancer(abc.ABC):
    """Task weights from validation losses, as a frozen dataclass of the balancer's options.

    A state is a dict of CPU tensors, ready for a checkpoint. All K tasks of a call have validation data: the caller
    leaves out those that have none.

    Attributes:
        update_interval: steps from one draw to the next.
        sample_valid_num: validation packs of a draw.
        needs_first_losses: whether :meth:`begin` needs the losses over the whole validation split before the first
            step.
        fixed_draw: whether losses of two draws are compared, so that every draw must hold the same samples.
        task_options: fields with one number for each task, at least 0 and 0 where the user gives none.
    """

    update_interval: int = 1
    sample_valid_num: int = 1

    needs_first_losses: ClassVar[bool] = False
    fixed_draw: ClassVar[bool] = False
    task_options: ClassVar[tuple[str, ...]] = ()

    @abc.abstractmethod
    def begin(self, num_tasks: int, first_loss_K: Tensor | None = None) -> State:
        """Make the state before the first draw.

        Args:
            num_tasks: ``K``.
            first_loss_K: fp64, losses over the whole validation split before the first step, where
                :attr:`needs_first_losses`.
        """

    @abc.abstractmethod
    def update(self, state: State, loss_K: Tensor, step: int) -> tuple[State, Tensor, Tensor]:
        """Compute the weights after one more draw.

        Args:
            state: after the draw before, or of :meth:`begin`; it is not modified.
            loss_K: fp64, losses of the draw.
            step: optimizer steps since :meth:`begin`.

        Returns:
            the new state; the weights, fp64 [K], sum 1; and whether each task took part, bool [K]: the others have the
            mean weight.
        """
