"""What a run reads from folders of Hugging Face; made where the command is read, since training knows no conversion."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Sources:
    """``model`` of ``--hf-checkpoint`` has ``load(trainer)`` and ``keep(folder)``; ``adapter`` of ``--hf-adapter`` has
    ``read``, which :func:`mft_megatron.mcore.checkpointing.load_weights.fill_weights` asks."""

    model: Any = None
    adapter: Any = None


NO_SOURCES = Sources()
