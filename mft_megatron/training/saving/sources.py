"""Starts of a run: Hugging Face folders, and an earlier checkpoint where the newest is damaged."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from mft_megatron.arguments.table import Arguments
from mft_megatron.mcore.checkpointing.weight_source import WeightSource
from mft_megatron.run_folder.description import CheckpointRef


class ModelSource(WeightSource, Protocol):
    """The model of ``--hf-checkpoint``."""

    def keep(self, target: Path) -> None:
        """Copy into ``target`` what an export is to give back."""

    def close(self) -> None:
        """Close the files; reading opens them again."""


@dataclasses.dataclass(frozen=True)
class Sources:
    """Models and adapters that a run reads, opened where the command line is, since training imports no conversion.

    Attributes:
        model: the folder of ``--hf-checkpoint``; ``None`` where no weights are read from it.
        adapter: the folder of ``--hf-adapter``; ``None`` where there is none.
        arguments_from: gives the arguments with an earlier checkpoint, for a run whose newest one is damaged; ``None``:
            such a run is refused.
    """

    model: ModelSource | None = None
    adapter: WeightSource | None = None
    arguments_from: Callable[[CheckpointRef], Arguments] | None = None

    def check(self, arguments: Arguments) -> None:
        """Check that every folder that the run reads is open.

        Raises:
            ValueError: one is missing, and the run would train beside random weights.
        """
        for option, needed, source in (
            ("--hf-checkpoint", arguments.reads_hf, self.model),
            ("--hf-adapter", arguments.starts_from_adapter, self.adapter),
        ):
            if needed and source is None:
                raise ValueError(f"{option}: open the folder before the run starts")


NO_SOURCES = Sources()
