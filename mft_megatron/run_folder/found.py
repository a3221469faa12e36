"""Checkpoints of a run folder: the newest, the best, or that of an iteration."""

import contextlib
from pathlib import Path

from mft_megatron.errors import InputError

from .description import CheckpointInfo, CheckpointRef, is_of_megatron, read_info
from .files import remedy
from .manifest import DamagedCheckpointError
from .names import (
    BEST,
    INFO,
    TRACKER,
    checkpoint_folders,
    complete_checkpoints,
    is_iteration_folder,
    iteration_folder,
    iteration_of,
)
from .publishing import restore_replaced

# digits of an iteration; more are damage
LONGEST_ITERATION = 18


def latest_checkpoint(folder: Path | str, option: str = "--load") -> CheckpointRef:
    """Return the newest complete checkpoint in ``folder``, which may also be one ``iter_NNNNNNN`` itself.

    Raises:
        InputError: there is none, or it is unfinished or has another format.
    """
    folder = Path(folder)
    if _is_one_checkpoint(folder):
        return _described(folder, option)
    absent, otherwise = "no checkpoint was completed there", f"give a folder that --save wrote, or leave {option} out"
    return _named_checkpoint(folder, TRACKER, option, absent, otherwise)


def checkpoint_of(folder: Path | str, iteration: int, option: str = "--load") -> CheckpointRef:
    """Return the complete checkpoint of one iteration in ``folder``.

    Raises:
        InputError: there is none, or it is unfinished or has another format.
    """
    path = iteration_folder(Path(folder), iteration)
    if not path.is_dir() and not restore_replaced(path):
        there = ", ".join(sorted(found.name for found in Path(folder).glob("iter_*"))) or "no checkpoint"
        raise InputError(f"{option} {folder} --ckpt-step {iteration}: {path} does not exist; there is {there}")
    return _described(path, option)


def newest_or_earlier(folder: Path | str, option: str = "--load") -> CheckpointRef:
    """Return the newest complete checkpoint in the run folder ``folder``, or an earlier one if it is damaged.

    Of the newest one only the description is read. What is wrong with it is in ``instead_of`` of the result.

    Raises:
        InputError: there is none, or all are damaged, or the newest has another format.
    """
    folder = Path(folder)
    try:
        return latest_checkpoint(folder, option)
    except DamagedCheckpointError as error:
        if _is_one_checkpoint(folder) or not (folder / TRACKER).is_file():
            raise
        newest = iteration_folder(folder, int((folder / TRACKER).read_text()))
        found = earlier_checkpoint(newest, (error.problem,))
        if found is None:
            raise
        return found


def earlier_checkpoint(path: Path, instead_of: tuple[str, ...]) -> CheckpointRef | None:
    """Return the newest checkpoint of the same run folder with a lower iteration and a readable description.

    Args:
        path: folder of a damaged checkpoint; it need not exist.
        instead_of: what is wrong with it and with those that are newer; what is wrong with others is added.
    """
    limit = iteration_of(path) if is_iteration_folder(path) else 0
    for other in (other for other in reversed(checkpoint_folders(path.parent)) if iteration_of(other) < limit):
        try:
            return CheckpointRef(other, _own_info(other), instead_of)
        except DamagedCheckpointError as error:
            instead_of = (*instead_of, error.problem)
        except InputError as error:  # of another version or program
            instead_of = (*instead_of, str(error))
    return None


def described_checkpoints(folder: Path) -> list[CheckpointRef]:
    """All checkpoints in the run folder ``folder`` with a readable description of their own, oldest first."""
    found = []
    for path in checkpoint_folders(folder):
        with contextlib.suppress(InputError):  # unfinished, damaged, or written by another program
            found.append(CheckpointRef(path, _own_info(path)))
    return found


def best_checkpoint(folder: Path | str, option: str = "--load") -> CheckpointRef:
    """Return the checkpoint with the best evaluation of the run in ``folder``.

    Raises:
        InputError: no best checkpoint was kept, or it is unfinished or has another format.
    """
    absent, otherwise = (
        "no best checkpoint was kept there",
        "give the folder of a run that kept one, or take its newest",
    )
    return _named_checkpoint(Path(folder), BEST, option, absent, otherwise)


def select_checkpoint(folder: Path | str, best: bool, option: str = "--load") -> CheckpointRef:
    """Return :func:`best_checkpoint` or :func:`latest_checkpoint`."""
    return best_checkpoint(folder, option) if best else latest_checkpoint(folder, option)


def refuse_adapters(checkpoint: CheckpointRef) -> None:
    """Check that a checkpoint is a plain model, the only thing that becomes a Hugging Face model.

    Raises:
        InputError: the checkpoint has adapters.
    """
    if checkpoint.info.lora is not None:
        raise InputError(
            f"--load {checkpoint.path}: has adapters; merge-lora writes the model with them merged into it, "
            "lora-to-peft writes them alone"
        )


def _named_checkpoint(folder: Path, file_name: str, option: str, absent: str, otherwise: str) -> CheckpointRef:
    """Return the checkpoint whose iteration is in a file of ``folder``.

    Args:
        folder: the run folder.
        file_name: name of the file with the iteration.
        option: the option that gave the folder, for messages.
        absent: what a missing file means, for messages.
        otherwise: what to do then.
    """
    file = folder / file_name
    if not file.is_file():
        complete = complete_checkpoints(folder) if file_name == TRACKER else []
        if len(complete) == 1:  # the first save of a run was interrupted just before it wrote the file
            return _described(complete[0], option)
        if complete:
            names = ", ".join(path.name for path in complete[-5:])
            raise InputError(
                f"{option} {folder}: its file {file_name}, which names the newest checkpoint, is lost, and several are "
                f"complete ({names}); write the number of the one to go on from into it: "
                f"echo {int(complete[-1].name.removeprefix('iter_'))} > {file}"
            )
        what = "does not exist" if not folder.exists() else f"has no {file_name}, so {absent}"
        raise InputError(f"{option} {folder}: {what}; {otherwise}")
    text = file.read_bytes().decode(errors="backslashreplace").strip()
    if text == "release" and is_of_megatron(folder / text):
        return CheckpointRef(folder / text, read_info(folder / text, option))
    if not text.isdecimal() or len(text) > LONGEST_ITERATION:
        raise InputError(
            f"{file}: {text!r} is not an iteration number; write the number of an existing iter_ folder; "
            f"{remedy(file, INFO)}"
        )
    path = iteration_folder(folder, int(text))
    if not path.is_dir() and not restore_replaced(path):
        raise DamagedCheckpointError(
            f"{file} names iteration {text}, but {path} does not exist",
            f"correct the number in it; {remedy(path, INFO)}",
        )
    return _described(path, option)


def _described(path: Path, option: str) -> CheckpointRef:
    """Return the checkpoint ``path``; of a damaged one the error names the newest whole one beside it.

    Raises:
        InputError: as :func:`read_info`.
    """
    try:
        return CheckpointRef(path, _own_info(path, option))
    except DamagedCheckpointError as error:
        raise DamagedCheckpointError(error.problem, remedy(path, INFO)) from None


def _own_info(path: Path, option: str = "--load") -> CheckpointInfo:
    """The description of the checkpoint ``path``, whose iteration is that of its folder unless it is renamed.

    Raises:
        InputError: as :func:`read_info`.
        DamagedCheckpointError: it is the description of another iteration.
    """
    info = read_info(path, option)
    if is_iteration_folder(path) and path.name != iteration_folder(path.parent, info.iteration).name:
        raise DamagedCheckpointError(f"{path}: its description is that of iteration {info.iteration}")
    return info


def _is_one_checkpoint(folder: Path) -> bool:
    return folder.name.startswith("iter_") and folder.is_dir()
