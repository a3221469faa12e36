"""The log of a run: ``metrics.jsonl`` in full precision, TensorBoard, Weights & Biases, and lines on the terminal.

A log that cannot be written, as on a full disk, does not end a run of weeks: that is said once, in a line, and the run
continues. Records wait until ``metrics.jsonl`` takes them again; TensorBoard goes on when the run is resumed.
"""

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from mft_megatron.arguments.groups.logging import LoggingArguments
from mft_megatron.disk_errors import explain
from mft_megatron.errors import InputError
from mft_megatron.run_folder.names import METRICS, TENSORBOARD

from .events import EventRecord, event_text
from .log_sinks.board import Board
from .log_sinks.record_file import RecordFile
from .records import EvaluationRecord, StepRecord, TaskStep
from .shares.deviations import SHARE_TOLERANCE

# more tasks than these are not listed in a line on the terminal
LISTED_TASKS = 20

Record: TypeAlias = StepRecord | EvaluationRecord | EventRecord


class RunLog:
    """The log of a run on the main process; on the others it does nothing."""

    def __init__(self, active: bool, folder: str | None = None, options: LoggingArguments | None = None):
        """
        Args:
            active: whether this is the main process.
            folder: ``--save``; without it only the terminal is written to.
            options: where else, and what goes there.

        Raises:
            InputError: a project of Weights & Biases is asked for, and wandb is not installed.
            OSError: a file cannot be opened.
        """
        options = options or LoggingArguments()
        tensorboard_dir = options.tensorboard_dir
        self._active = active
        self._perplexities = options.log_validation_ppl_to_tensorboard
        self._file: RecordFile | None = None
        self._board: Board | None = None
        self._wandb: Any = None
        self._file_fails = False
        if not active:
            return
        if folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self._metrics = Path(folder) / METRICS
            self._file = RecordFile(self._metrics)
            if self._file.cut_off:
                self.print(f"note: {self._metrics}: the part of a line at its end is removed; its writer was killed")
            tensorboard_dir = tensorboard_dir or str(Path(folder) / TENSORBOARD)
        if tensorboard_dir is not None:
            self._board = Board(tensorboard_dir, options.tensorboard_queue_size)
        if options.wandb_project is not None:
            self._wandb = _start_wandb(options, options.wandb_project, folder)

    def write(self, record: Record) -> None:
        """Append a record to the file and the terminal, and the scalars of an evaluation to the boards."""
        if not self._active:
            return
        if self._file is not None:
            self._note_of_file(self._file.write(json.dumps(record, allow_nan=False)))
        if record["kind"] == "valid":
            self.write_scalars(record)
        self.print(_line(record))

    def write_scalars(self, record: StepRecord | EvaluationRecord, others: Mapping[str, float] | None = None) -> None:
        """Write the scalars of a step or an evaluation, and ``others`` of the same step, to the boards."""
        if not self._active:
            return
        scalars = {**dict(_scalars(record)), **(others or {})}
        if self._board is not None:
            shown = {
                name: value
                for name, value in scalars.items()
                if self._perplexities or not name.startswith("valid-perplexity/")
            }
            self._note_of_board(self._board, self._board.write(shown, record["step"]))
        if self._wandb is not None:
            self._wandb.log(scalars, step=record["step"])

    def print(self, text: str) -> None:
        """Print a line on the terminal alone."""
        if not self._active:
            return
        try:
            print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)
        except BrokenPipeError:
            raise
        except OSError:
            pass  # the terminal is a file on a full disk; Python keeps the line, and the next one tries again

    def close(self) -> None:
        """Close the file and the boards; what cannot be written at last is said in a line."""
        if self._file is not None:
            error = self._file.close()
            if error is not None:
                lost = len(self._file.waiting)
                self.print(f"note: {self._metrics}: {explain(error, self._metrics)}; {lost} records are lost")
        if self._board is not None:
            self._note_of_board(self._board, self._board.close())
        if self._wandb is not None:
            self._wandb.finish()

    def _note_of_file(self, error: OSError | None) -> None:
        """Say once that records have to wait, and once that they are written again."""
        if error is not None and not self._file_fails:
            self.print(f"note: {self._metrics}: {explain(error, self._metrics)}; training continues, and records wait")
        elif error is None and self._file_fails:
            self.print(f"note: {self._metrics}: can be written again; no record is missing")
        self._file_fails = error is not None

    def _note_of_board(self, board: Board, reason: str | None) -> None:
        if reason is not None:
            self.print(f"note: {board.folder}: {reason}; training continues without TensorBoard")


def _start_wandb(options: LoggingArguments, project: str, folder: str | None) -> Any:
    try:
        import wandb
    except ImportError:
        raise InputError(
            f"--wandb-project {project}: wandb is not installed; pip install wandb, or leave it out"
        ) from None
    name = options.wandb_exp_name or (Path(folder).name if folder else None)
    return wandb.init(project=project, entity=options.wandb_entity, name=name, dir=options.wandb_save_dir or folder)


def _scalars(record: StepRecord | EvaluationRecord) -> Iterator[tuple[str, float]]:
    kind = record["kind"]
    for name, value in record.items():
        if name != "step" and isinstance(value, int | float):
            yield f"{kind}/{name}", value
    if record["kind"] == "train":
        for name, loss in record.get("moe", {}).items():
            if isinstance(loss, float):
                yield f"{kind}-moe/{name}", loss
                continue
            for layer, losses in loss.items():
                for layer_name, layer_loss in losses.items():
                    yield f"{kind}-moe-{layer_name}/layer {layer}", layer_loss
    for task, values in record["tasks"].items():
        for name, value in values.items():
            if isinstance(value, int | float):
                yield f"{kind}-{name}/{task}", value


def _line(record: Record) -> str:
    if record["kind"] == "event":
        return f"step {record['step']} | {event_text(record)}"
    if record["kind"] == "valid":
        tasks = _listed(f"{name} {_short(values['loss'])}" for name, values in record["tasks"].items())
        return (
            f"step {record['step']} | validation | loss {_short(record['loss'])} | macro "
            f"{_short(record['macro_loss'])} | {tasks}"
        )
    loss, mean = _short(record["loss"]), _short(record.get("mean_loss", record["loss"]))
    loss = loss if mean == loss else f"{loss} (mean {mean})"
    tasks = _listed(f"{name} {_short(task['loss'])}{_run_share(task)}" for name, task in record["tasks"].items())
    return (
        f"step {record['step']} | loss {loss} | grad norm {_short(record['grad_norm'])} | lr "
        f"{record['lr']:.3g} | {record['tokens'] / record['step_time']:,.0f} tokens/s | {tasks}"
    )


def _listed(tasks: Iterator[str]) -> str:
    """Tasks of a line on the terminal, which has room for some; the file and the boards have all."""
    parts = list(tasks)
    others = len(parts) - LISTED_TASKS
    return ", ".join(
        [*parts[:LISTED_TASKS], *([f"{others} more task{'s' if others > 1 else ''}"] if others > 0 else [])]
    )


def _run_share(task: TaskStep) -> str:
    """A task's share of the objective so far, with its target where it is off that."""
    share, target = task["run_share"], task["run_target_share"]
    if share is None:
        return ""
    off = target is not None and abs(share - target) > SHARE_TOLERANCE * target
    return f" ({share:.1%} for {target:.1%})" if off else f" ({share:.1%})"


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
