"""Ranks that have ended already, so that no step can end any more: whether it is worth waiting for one."""

import os
from collections.abc import Mapping
from pathlib import Path

import psutil

from mft_megatron.exit_codes import FINISHED, LEFT
from mft_megatron.run_folder.outcome import LOST_RANK, outcome_of_this_start


def lost(folder: Path | str | None, environment: Mapping[str, str]) -> str | None:
    """Say which rank of this start has ended; ``None`` if none is known to have.

    torchrun sends the same SIGTERM to all ranks when one has failed and when the job is to leave. In the first case
    they would wait for the lost rank until they are killed.

    Args:
        folder: the run folder, where a rank that fails records why.
        environment: of this process.
    """
    outcome = None if folder is None else outcome_of_this_start(folder)
    if outcome is not None and outcome.code not in (FINISHED, LEFT):
        return f"{LOST_RANK}: {outcome.reason}"
    siblings = _siblings() if "TORCHELASTIC_RUN_ID" in environment else None
    if siblings is not None and siblings < int(environment.get("LOCAL_WORLD_SIZE", "1")):
        return f"{LOST_RANK}, of this machine"
    return None


def _siblings() -> int | None:
    """Ranks of this machine that still run, with this one; ``None`` where a script is between them and torchrun."""
    try:
        parent = psutil.Process(os.getppid())
        if "TORCHELASTIC_RUN_ID" in parent.environ():
            return None
        return sum(child.status() != psutil.STATUS_ZOMBIE for child in parent.children())
    except psutil.Error:
        return None
