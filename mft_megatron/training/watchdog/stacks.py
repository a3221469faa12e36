"""Stacks of the threads of this process, for a report."""

import sys
import threading
import traceback
from pathlib import Path
from types import FrameType

import mft_megatron

_PACKAGE = str(Path(mft_megatron.__file__).parent)
# files of torch and Megatron-Core in which a rank waits for others
WAITING = ("/torch/distributed/", "/megatron/core/pipeline_parallel/p2p", "/megatron/core/distributed/")


def stacks() -> str:
    """Stacks of all Python threads but the calling one, the main thread's first, innermost call last."""
    frames = sys._current_frames()
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().ident
    order = sorted((ident for ident in frames if ident != threading.get_ident()), key=lambda ident: ident != main)
    parts = []
    for ident in order:
        title = "main thread" if ident == main else f"thread {names.get(ident, ident)}"
        parts.append(f"{title}:\n{''.join(traceback.format_stack(frames[ident]))}")
    return "\n".join(parts)


def main_line() -> tuple[str, bool]:
    """The place in the code where the main thread is.

    Returns:
        the innermost line of this project, or else of other software: ``mcore/trainer.py:208 _run``.
        whether it waits for other ranks in a collective or for a message.
    """
    innermost = frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if innermost is None:
        return "", False
    waits = any(part in innermost.f_code.co_filename for part in WAITING)
    while frame is not None and not frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    return _line(frame or innermost), waits


def _line(frame: FrameType) -> str:
    file = Path(frame.f_code.co_filename)
    name = file.relative_to(_PACKAGE) if file.is_relative_to(_PACKAGE) else file.name
    return f"{name}:{frame.f_lineno} {frame.f_code.co_name}"
