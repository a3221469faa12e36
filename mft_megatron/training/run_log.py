"""Where records go: ``metrics.jsonl`` in full precision, TensorBoard, and one readable line on the terminal."""

import json
import time
from pathlib import Path
from typing import Any

from mft_megatron.run_folder import METRICS, TENSORBOARD


class RunLog:
    """Takes every record of a run on the main process; a no-op on the others."""

    def __init__(self, active: bool, folder: str | None, tensorboard_dir: str | None):
        """
        Args:
            active: whether this is the main process.
            folder: ``--save``; without it only the terminal is written to.
            tensorboard_dir: ``--tensorboard-dir``; by default in ``folder``.
        """
        self._active = active
        self._file = self._board = None
        if not active:
            return
        if folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self._file = open(Path(folder) / METRICS, "a")  # noqa: SIM115  (open as long as the run)
            tensorboard_dir = tensorboard_dir or str(Path(folder) / TENSORBOARD)
        if tensorboard_dir is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(tensorboard_dir)

    def write(self, record: dict[str, Any]) -> None:
        """Append a record everywhere."""
        if not self._active:
            return
        if self._file is not None:
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()
        if self._board is not None and record["kind"] != "event":
            for name, value in _scalars(record):
                self._board.add_scalar(name, value, record["step"])
        self.say(_line(record))

    def say(self, text: str) -> None:
        """A line on the terminal alone."""
        if self._active:
            print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)

    def close(self) -> None:
        for target in (self._file, self._board):
            if target is not None:
                target.close()


def _scalars(record: dict[str, Any]):
    kind = record["kind"]
    for name, value in record.items():
        if name not in ("kind", "step", "tasks") and value is not None:
            yield f"{kind}/{name}", value
    for task, values in record["tasks"].items():
        for name, value in values.items():
            if value is not None:
                yield f"{kind}-{name}/{task}", value


def _line(record: dict[str, Any]) -> str:
    if record["kind"] == "event":
        details = (f"{k} {v}" for k, v in record.items() if k not in ("kind", "event", "step", "consumed_samples"))
        return f"step {record['step']} | {record['event']} | " + " | ".join(details)
    tasks = ", ".join(f"{name} {_short(values['loss'])}" for name, values in record["tasks"].items())
    if record["kind"] == "valid":
        return (
            f"step {record['step']} | validation | loss {_short(record['loss'])} | macro "
            f"{_short(record['macro_loss'])} | {tasks}"
        )
    return (
        f"step {record['step']} | loss {_short(record['loss'])} | grad norm {_short(record['grad_norm'])} | lr "
        f"{record['lr']:.3g} | {record['tokens'] / record['step_time']:,.0f} tokens/s | {tasks}"
    )


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
