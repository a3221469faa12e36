"""``--auto-resume``: one command line that starts a run and, where the run has a checkpoint, continues it."""

import contextlib
from collections.abc import Iterator, Set

from mft_megatron.errors import InputError
from mft_megatron.options import Given
from mft_megatron.run_folder.names import is_checkpoint

# options that say how a run starts; those of states only if the run's own checkpoints have these
_OF_THE_START = ("ckpt_step", "finetune", "exit_on_missing_checkpoint")
_OF_STATES = {"load_optim": "save_optim", "load_rng": "save_rng"}


def continue_own_run(given: Given, asked_for: Set[str]) -> tuple[Given, Set[str]]:
    """Let a run with ``--auto-resume`` load its own folder, once a checkpoint is complete there.

    What it started from is then out of the question: ``--load`` of another folder, ``--finetune`` and the like count
    for the first start alone. ``--hf-checkpoint`` and ``--pretrained-checkpoint`` give way to ``--load`` in any run.

    Args:
        given: options of the command line, by field.
        asked_for: fields that the user set.

    Returns:
        both, without what counts for the first start alone.
    """
    save = given.get("save")
    if not given.get("auto_resume") or save is None or not is_checkpoint(save):
        return given, asked_for
    states = {name for name, saved in _OF_STATES.items() if given.get(saved, True)}
    set_aside = {*_OF_THE_START, *states}
    kept = {name: value for name, value in given.items() if name not in set_aside}
    return {**kept, "load": save}, asked_for - set_aside


@contextlib.contextmanager
def advice_of_own_run(given: Given) -> Iterator[None]:
    """Complete the advice of an error in the block by what ``--auto-resume`` has to do with it.

    Args:
        given: options of the command line, by field, of :func:`continue_own_run`.

    Raises:
        InputError: with the advice, where it names options that a run in its own folder sets aside.
    """
    try:
        yield
    except InputError as error:
        save = given.get("save")
        continues = given.get("auto_resume") and save is not None and given.get("load") == save
        if not continues or not any(option in str(error) for option in ("--finetune", "--no-load-optim")):
            raise
        advice = f"--auto-resume sets that aside: give --load {save} in its place, with --finetune also another --save"
        raise InputError(f"{error} ({advice})", error.always, error.code) from None
