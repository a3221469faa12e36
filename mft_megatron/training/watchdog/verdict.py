"""The one line about a stalled run: which ranks did not arrive, and where the others wait."""

from collections import defaultdict
from collections.abc import Mapping

from .notice import LEFT, STALLED, Notice, ranks_text

# more ranks, or more places, than these are counted instead of listed
LISTED = 4


def verdict(notices: Mapping[int, Notice], world_size: int, now: float, states: Mapping[int, str]) -> str:
    """Say in a line which ranks did not arrive where the others wait.

    Args:
        notices: the newest notice of each rank; none of a rank that was never heard of.
        world_size: number of ranks.
        now: seconds since the epoch.
        states: state in words of processes of this machine that can make no progress.

    Returns:
        the line, which follows "no progress for N s: ".
    """
    stalled = {rank: notice for rank, notice in notices.items() if notice.state == STALLED}
    silent = [rank for rank in range(world_size) if rank not in stalled]
    places: dict[tuple[str, str, bool], list[int]] = defaultdict(list)
    for rank, notice in stalled.items():
        places[notice.place, notice.also, notice.waits].append(rank)
    groups = sorted(places.values(), key=lambda ranks: _order(stalled, ranks))
    if silent:
        absent = "; ".join(_absent(rank, notices.get(rank), now, states.get(rank)) for rank in silent[:LISTED])
        more = f"; {len(silent) - LISTED} more" if len(silent) > LISTED else ""
        text = f"{ranks_text(silent)} did not report ({absent}{more})"
    elif len(groups) > 1:
        first = groups.pop(0)
        text = f"{ranks_text(first)} did not arrive, {_present(stalled[first[0]])}"
    else:
        text = ("" if world_size == 1 else "all ranks are at the same place: ") + _present(stalled[groups.pop(0)[0]])
    waiting = [f"{ranks_text(ranks)} at {_present(stalled[ranks[0]])}" for ranks in groups[:LISTED]]
    if len(groups) > LISTED:
        waiting.append(f"others at {len(groups) - LISTED} more places")
    return f"{text}; waiting: {'; '.join(waiting)}" if waiting else text


def _order(stalled: Mapping[int, Notice], ranks: list[int]) -> tuple[bool, int, float]:
    """The key by which ranks at one place come first that others probably wait for.

    A rank that itself waits for others is waited for by none, unless all wait: then the first that did so is.
    """
    waits, idle = stalled[ranks[0]].waits, max(stalled[rank].idle for rank in ranks)
    return waits, 0 if waits else len(ranks), -idle


def _absent(rank: int, notice: Notice | None, now: float, state: str | None) -> str:
    if notice is None:
        return f"{rank}: never heard of"
    words = [f"{notice.host}, process {notice.pid}"]
    if notice.state == LEFT:
        words.append(f"left with {notice.also}")
    elif state is not None:
        words.append(state)
    words.append(f"{now - notice.time:.0f} s ago it was at {notice.place}")
    return f"{rank}: {', '.join(words)}"


def _present(notice: Notice) -> str:
    line = f" ({notice.also})" if notice.also else ""
    return f"{notice.place} for {notice.idle:.0f} s{line}"
