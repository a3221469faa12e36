"""Progress marks: what the newest one says, also from another thread."""

import threading
import time

from mft_megatron import progress_marks


def test_marks_replace_each_other_and_keep_their_step():
    progress_marks.restart()
    begun = progress_marks.position()
    assert (begun.mark.phase, begun.step, begun.first_step) == ("start", None, False)
    progress_marks.mark_step(7, [3, 1])
    progress_marks.mark("micro-batch", micro_batch=2)
    found = []
    thread = threading.Thread(target=lambda: found.append(progress_marks.position()))
    thread.start()
    thread.join()
    (now,) = found
    assert (now.mark.phase, dict(now.mark.where)) == ("micro-batch", {"micro_batch": 2})
    assert (now.step, list(now.packs), now.first_step) == (7, [3, 1], True)
    assert begun.mark.since <= now.mark.since <= time.monotonic()
    progress_marks.mark_step(8, [])
    assert not progress_marks.position().first_step
