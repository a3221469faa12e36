"""The progress of a run: all that resuming needs besides weights and states."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes:
        step: optimizer steps planned so far, including skipped ones.
        consumed_samples: packs consumed so far, the unit of ``--global-batch-size``.
        skipped_steps: steps that updated nothing.
    """

    step: int = 0
    consumed_samples: int = 0
    skipped_steps: int = 0

    def after_step(self, global_batch_size: int, skipped: bool) -> "Progress":
        """The progress after one more step of ``global_batch_size`` packs."""
        return Progress(self.step + 1, self.consumed_samples + global_batch_size, self.skipped_steps + skipped)
