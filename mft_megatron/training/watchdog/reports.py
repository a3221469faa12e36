"""Reports of a stalled run in its run folder: a text for each rank, and the line about all of them.

::

    DIR/stalls/2026-01-31T12-00-00Z/rank_00003.txt          place, packs and stacks of rank 3
    DIR/stalls/2026-01-31T12-00-00Z/nccl_trace_rank_3       its flight recorder, for torch's ``torchfrtrace``
    DIR/stalls/2026-01-31T12-00-00Z/summary.txt             which ranks did not arrive
"""

import time
from pathlib import Path

from mft_megatron.run_folder.names import STALLS
from mft_megatron.run_folder.replace_text import replace_text

SUMMARY = "summary.txt"
# begins the last line of a report
NOTICE = "notice: "
# a folder that was made less than this many seconds ago belongs to the same stall
SAME_STALL = 60.0


def folder_name(run_folder: Path) -> str:
    """Name of the folder of a stall: one that another rank has just made, or the present time in UTC."""
    folder = run_folder / STALLS
    now = time.time()
    recent = [path.name for path in folder.glob("*Z") if abs(now - path.stat().st_mtime) < SAME_STALL]
    return max(recent, default=time.strftime("%Y-%m-%dT%H-%M-%SZ", time.gmtime(now)))


def write_report(folder: Path, rank: int, text: str, notice: str) -> None:
    """Write what a rank reports.

    Args:
        folder: of the stall.
        rank: of this process.
        text: its report.
        notice: the same for programs, in a line.
    """
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / f"rank_{rank:05d}.txt", f"{text}\n{NOTICE}{notice}\n")


def write_trace(folder: Path, rank: int, trace: bytes) -> None:
    """Write what the flight recorder of a rank holds, as torch pickled it."""
    (folder / f"nccl_trace_rank_{rank}").write_bytes(trace)


def reported(folder: Path) -> dict[int, str]:
    """Notices of the ranks whose reports are there."""
    return {
        int(path.stem.removeprefix("rank_")): path.read_text().rpartition(NOTICE)[2].strip()
        for path in folder.glob("rank_*.txt")
    }


def claim_summary(folder: Path) -> bool:
    """Make the file of the summary; whether this process made it, and so is the one that writes it."""
    try:
        (folder / SUMMARY).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
