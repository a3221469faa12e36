"""A run that is finished: its command given again has nothing left to do, whatever options say where it started.

That is told from its folder: from the newest checkpoint with the options and the data of the run that saved it, and,
where that was not at the last step, from the outcome.
"""

import os

from mft_megatron.arguments.auto_resume import continue_own_run
from mft_megatron.arguments.command import CommandLine
from mft_megatron.arguments.groups.checkpointing import CheckpointArguments
from mft_megatron.arguments.groups.validation import ValidationArguments
from mft_megatron.arguments.table import Arguments
from mft_megatron.data.storage.ledger import read_ledger
from mft_megatron.exit_codes import FINISHED
from mft_megatron.run_folder.names import is_checkpoint
from mft_megatron.run_folder.outcome import read_outcome

from .differences import same_options


def continued(command_line: CommandLine) -> CommandLine | None:
    """The command with its own folder to load, as --auto-resume would have it.

    Returns:
        ``None`` for a command that loads it anyway, for one that trains nothing, and without a checkpoint there.
    """
    options = command_line.group(CheckpointArguments)
    if options.save is None or options.auto_resume or not is_checkpoint(options.save):
        return None
    if options.load is not None and os.path.abspath(options.load) == os.path.abspath(options.save):
        return None
    if command_line.group(ValidationArguments).skip_train:
        return None
    return CommandLine(*continue_own_run({**command_line.given, "auto_resume": True}, command_line.asked_for))


def is_over(arguments: Arguments) -> bool:
    """Whether the run that a :func:`continued` command names is finished, and the same as the one in its folder.

    Args:
        arguments: of that command.

    Raises:
        InputError: the data set, or the outcome, cannot be read.
    """
    resume, folder = arguments.resume, arguments.checkpoint.save
    if resume is None or folder is None or not same_options(arguments, resume.info):
        return False
    data = arguments.data
    if read_ledger(data.data_path).dataset_hash(data.seq_length) != resume.info.dataset_hash:
        return False
    if arguments.finished:
        return True
    outcome = read_outcome(folder)
    return outcome is not None and (outcome.code, outcome.step) == (FINISHED, resume.info.iteration)
