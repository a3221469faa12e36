"""A process for each device that runs functions in turn, so that a test does not wait for imports and CUDA's start.

A process has one device from its start on, so a comparison of GPU and CPU takes two; the one for the CPU sees no GPU::

    on("cpu", "tests.gpu.device_runs:train", prefix, options)

This file is also the program of these processes. They answer over a pipe of their own: what is printed stays apart.
"""

import atexit
import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIMIT_SECONDS = 600


class Worker:
    """A process on ``cpu`` or ``cuda``."""

    def __init__(self, device):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
        if device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        self.device = device
        self._log = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 (lives as long as the process)
        receiver, sender = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, str(sender)],
            env=environment,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            text=True,
            pass_fds=[sender],
        )
        os.close(sender)
        self._answers = os.fdopen(receiver)

    def call(self, function, arguments):
        """Call ``module:function``; returns its result, or fails with the traceback or the end of what was printed."""
        timer = threading.Timer(LIMIT_SECONDS, self._process.kill)
        timer.start()
        try:
            print(json.dumps({"function": function, "arguments": arguments}), file=self._process.stdin, flush=True)
            line = self._answers.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if not line:
            self._process.wait(10)
            self._log.seek(0)
            raise AssertionError(f"{function} ended its process: {self._log.read()[-4000:]}")
        answer = json.loads(line)
        assert answer["device"] == self.device, answer
        assert "result" in answer, answer["traceback"]
        return answer["result"]

    def close(self):
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._answers.close()
        self._process.stdin.close()
        self._log.close()


_workers = {}


def on(device, function, *arguments):
    """Call a function in the process of ``cpu`` or ``cuda``.

    Args:
        device: ``cpu`` or ``cuda``.
        function: ``module:function``.
        arguments: of the function; JSON values, like its result.
    """
    if device not in _workers:
        _workers[device] = Worker(device)
    try:
        return _workers[device].call(function, arguments)
    except BaseException:
        # an error of a kernel leaves CUDA unusable, so the next call begins with a new process
        _workers.pop(device).close()
        raise


def close_all():
    """End the processes of all devices."""
    while _workers:
        _workers.popitem()[1].close()


atexit.register(close_all)


def _answer(function, arguments):
    import torch

    from mft_megatron.mcore.platform import devices

    module, _, name = function.partition(":")
    environment, answer = dict(os.environ), {"device": devices.device().type}
    try:
        answer["result"] = getattr(importlib.import_module(module), name)(*arguments)
    except BaseException:
        answer["traceback"] = traceback.format_exc()[-4000:]
    # Megatron-Core chooses Transformer Engine's kernels by environment variables
    os.environ.clear()
    os.environ.update(environment)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return answer


def main():
    """Answer calls until the input ends."""
    del sys.path[0]  # this folder
    with os.fdopen(int(sys.argv[1]), "w") as answers:
        for line in sys.stdin:
            print(json.dumps(_answer(**json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
