"""Where records go: ``metrics.jsonl`` in full precision, TensorBoard, Weights & Biases, and a line on the terminal."""

import json
import time
from pathlib import Path
from typing import Any

from mft_megatron.arguments.groups.logging import LoggingArguments
from mft_megatron.errors import InputError
from mft_megatron.run_folder import METRICS, TENSORBOARD


class RunLog:
    """Takes every record of a run on the main process; a no-op on the others."""

    def __init__(
        self,
        active: bool,
        folder: str | None = None,
        options: LoggingArguments | None = None,
    ):
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
        self._file = self._board = self._wandb = None
        if not active:
            return
        if folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self._file = open(Path(folder) / METRICS, "a")  # noqa: SIM115  (open as long as the run)
            tensorboard_dir = tensorboard_dir or str(Path(folder) / TENSORBOARD)
        if tensorboard_dir is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(tensorboard_dir, max_queue=options.tensorboard_queue_size)
        if options.wandb_project is not None:
            self._wandb = _start_wandb(options, folder)

    def write(self, record: dict[str, Any]) -> None:
        """Append a record to the file and the terminal; an evaluation goes to boards, too, a step by :meth:`draw`."""
        if not self._active:
            return
        if self._file is not None:
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()
        if record["kind"] == "valid":
            self.write_scalars(record)
        self.print(_line(record))

    def write_scalars(self, record: dict[str, Any], others: dict[str, float] | None = None) -> None:
        """Put the numbers of a step or an evaluation, and ``others`` of the same step, on the boards."""
        if not self._active:
            return
        scalars = {**dict(_scalars(record)), **(others or {})}
        for name, value in scalars.items() if self._board is not None else ():
            if self._perplexities or not name.startswith("valid-perplexity/"):
                self._board.add_scalar(name, value, record["step"])
        if self._wandb is not None:
            self._wandb.log(scalars, step=record["step"])

    def print(self, text: str) -> None:
        """A line on the terminal alone."""
        if self._active:
            print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)

    def close(self) -> None:
        for target in (self._file, self._board):
            if target is not None:
                target.close()
        if self._wandb is not None:
            self._wandb.finish()


def _start_wandb(options: LoggingArguments, folder: str | None):
    project = options.wandb_project
    try:
        import wandb
    except ImportError:
        raise InputError(
            f"--wandb-project {project}: wandb is not installed; pip install wandb, or leave it out"
        ) from None
    name = options.wandb_exp_name or (Path(folder).name if folder else None)
    return wandb.init(project=project, entity=options.wandb_entity, name=name, dir=options.wandb_save_dir or folder)


def _scalars(record: dict[str, Any]):
    kind = record["kind"]
    for name, value in record.items():
        if name not in ("kind", "step", "tasks", "moe") and value is not None:
            yield f"{kind}/{name}", value
    experts = dict(record.get("moe", {}))
    by_layer = experts.pop("layers", {})
    for name, value in experts.items():
        yield f"{kind}-moe/{name}", value
    for layer, values in by_layer.items():
        for name, value in values.items():
            yield f"{kind}-moe-{name}/layer {layer}", value
    for task, values in record["tasks"].items():
        for name, value in values.items():
            if value is not None:
                yield f"{kind}-{name}/{task}", value


def _line(record: dict[str, Any]) -> str:
    if record["kind"] == "event" and record["event"] == "epoch":
        slices = sum(task["samples"] for task in record["tasks"].values())
        judged = "used exactly as planned" if record["complete"] else "counted in part, not judged"
        return f"step {record['step']} | epoch {record['epoch']} is over | {slices:,} samples, {judged}"
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
