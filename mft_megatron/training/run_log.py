"""The log of a run: ``metrics.jsonl`` in full precision, TensorBoard, Weights & Biases, and lines on the terminal."""

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias

from mft_megatron.arguments.groups.logging import LoggingArguments
from mft_megatron.errors import InputError
from mft_megatron.run_folder import METRICS, TENSORBOARD

from .events import EventRecord, event_text
from .records import EvaluationRecord, StepRecord

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

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
        """
        options = options or LoggingArguments()
        tensorboard_dir = options.tensorboard_dir
        self._active = active
        self._perplexities = options.log_validation_ppl_to_tensorboard
        self._file: IO[str] | None = None
        self._board: SummaryWriter | None = None
        self._wandb: Any = None
        if not active:
            return
        if folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self._file = open(Path(folder) / METRICS, "a")  # noqa: SIM115  (open as long as the run)
            tensorboard_dir = tensorboard_dir or str(Path(folder) / TENSORBOARD)
        if tensorboard_dir is not None:
            self._board = _open_board(tensorboard_dir, options.tensorboard_queue_size)
        if options.wandb_project is not None:
            self._wandb = _start_wandb(options, options.wandb_project, folder)

    def write(self, record: Record) -> None:
        """Append a record to the file and the terminal, and the scalars of an evaluation to the boards."""
        if not self._active:
            return
        if self._file is not None:
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()
        if record["kind"] == "valid":
            self.write_scalars(record)
        self.print(_line(record))

    def write_scalars(self, record: StepRecord | EvaluationRecord, others: Mapping[str, float] | None = None) -> None:
        """Write the scalars of a step or an evaluation, and ``others`` of the same step, to the boards."""
        if not self._active:
            return
        scalars = {**dict(_scalars(record)), **(others or {})}
        if self._board is not None:
            for name, value in scalars.items():
                if self._perplexities or not name.startswith("valid-perplexity/"):
                    self._board.add_scalar(name, value, record["step"])
        if self._wandb is not None:
            self._wandb.log(scalars, step=record["step"])

    def print(self, text: str) -> None:
        """Print a line on the terminal alone."""
        if self._active:
            print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)

    def close(self) -> None:
        """Close the file and the boards."""
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def _open_board(folder: str, queue_size: int) -> "SummaryWriter":
    # imported here because it takes long, and most ranks write to no board
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder, max_queue=queue_size)


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
