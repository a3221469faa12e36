"""Reports of dry runs made by hand."""

from mft_megatron.dry_run.rank_report import (
    CATEGORIES,
    Copies,
    HostWaits,
    LiveTensors,
    Memory,
    Messages,
    RankReport,
    Step,
)

GIB = 2**30


def memory(gib, line="mft_megatron/mcore/trainer.py:10"):
    """A peak of ``gib`` with 1 GiB in each category but the first, which has the rest."""
    by_category = dict.fromkeys(CATEGORIES, GIB)
    by_category[CATEGORIES[0]] = int((gib - len(CATEGORIES) + 1) * GIB)
    largest = tuple(LiveTensors(f"a/b.py:{n}", "weights", n, (20 - n) * 2**28) for n in range(1, 13))
    return Memory(int(gib * GIB), by_category, largest, line)


def report(rank=0, first=20.0, second=18.0, evaluation=9.0, save=None, host=None, longest=None):
    """A report whose peaks are these GiB."""
    waits = (HostWaits("a/waits.py:5", "value", 8, 1), HostWaits("a/waits.py:9", "copy", 0, 2))
    copies = (Copies("a/copies.py:1", True, 16, 4096, 16),)
    messages = (Messages("all-reduce", "tensor", 8, 640, 3 * GIB), Messages("send", "pipeline", 4, 8, GIB // 2))
    messages += (Messages("all-gather", "data", 1, 5, 7 * GIB),)
    steps = tuple(
        Step(number, 8, 8, memory(peak), waits, copies, messages, 1_234 * 10**12, 56_789)
        for number, peak in ((1, first), (2, second))
    )
    position = {"tensor": 0, "pipeline": rank, "context": 0, "data": 0, "expert": 0}
    return RankReport(
        rank=rank,
        position=position,
        layers=tuple(range(10 * rank + 1, 10 * rank + 11)),
        embedding=rank == 0,
        output=rank == 3,
        parameters=1_000_000_000,
        trained_parameters=2_000_000,
        resident={"weights": 2 * GIB},
        steps=steps,
        longest=None if longest is None else memory(longest),
        evaluation=None if evaluation is None else memory(evaluation),
        save=None if save is None else memory(save),
        save_host=None if host is None else int(host * GIB),
        seconds=3.25,
    )
