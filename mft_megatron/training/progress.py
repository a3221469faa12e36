"""How far a run has come: all that resuming needs besides the weights."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Progress:
    """``step``: optimizer steps planned so far, skipped ones counted in. ``consumed_samples`` counts packs."""

    step: int = 0
    consumed_samples: int = 0
    skipped_steps: int = 0

    def after_step(self, global_batch_size: int, skipped: bool) -> "Progress":
        return Progress(self.step + 1, self.consumed_samples + global_batch_size, self.skipped_steps + skipped)
