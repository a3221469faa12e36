"""``tools/inspect_checkpoint.py``: what is in a checkpoint or a run folder, and whether it is whole."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from mft_megatron.errors import InputError
from mft_megatron.exit_codes import DAMAGED, FAILED, FINISHED, NAMES, OWNED
from mft_megatron.options import option, read_options
from mft_megatron.run_folder.outcome import read_outcome
from mft_megatron.run_folder.owner.owner import owner_in_another_job
from mft_megatron.run_folder.verification import AUTO, LEVELS, SIZES

from .facts import checkpoint_facts, run_facts
from .report import describe_checkpoint, describe_run


@dataclasses.dataclass(frozen=True)
class InspectOptions:
    """Show what is in a checkpoint, or in all checkpoints of a run folder, and whether their files are whole.

    The exit code is 0 if no damage was found and 13 otherwise; with --outcome it is that of the run."""

    folder: str = option(
        None, "Run folder, or one iter_NNNNNNN folder. The option's name may be left out.", metavar="DIR", required=True
    )
    verify: str | None = option(
        None,
        "Compare files with their sizes alone, or with their hashes: full reads all bytes, auto at most 16 GiB of each "
        "checkpoint. Not given: auto for one checkpoint, sizes for those of a run folder.",
        choices=LEVELS,
    )
    json: bool = option(False, "Print everything as one JSON object.")
    outcome: bool = option(
        False,
        "Print how the newest start of the run in DIR ended, and exit with its code: for job scripts. A start that was "
        "killed before it could say how it ended has code 1; one that runs in another job than the command has 16.",
    )


def inspect_checkpoint(command_line: Sequence[str]) -> int:
    """Print what was asked for.

    Returns:
        the exit code.

    Raises:
        InputError: there is nothing to inspect.
    """
    words = list(command_line)
    if words and not words[0].startswith("-"):
        words.insert(0, "--folder")
    options = read_options(InspectOptions, words, "inspect_checkpoint.py")
    folder = Path(options.folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: is no folder; give a folder that --save wrote, or one iter_ folder")
    if options.outcome:
        return _print_outcome(folder, options.json)
    if folder.name.startswith("iter_"):
        checkpoints = [checkpoint_facts(folder, options.verify or AUTO)]
        facts, lines = checkpoints[0].facts(), describe_checkpoint(checkpoints[0])
    else:
        run, checkpoints = run_facts(folder, options.verify or SIZES)
        facts = {**run, "checkpoints": [checkpoint.facts() for checkpoint in checkpoints]}
        lines = describe_run(run, checkpoints)
    for line in [json.dumps(facts, indent=2)] if options.json else lines:
        print(line)
    return DAMAGED if any(checkpoint.damage is not None for checkpoint in checkpoints) else FINISHED


def _print_outcome(folder: Path, as_json: bool) -> int:
    """Print the outcome of a run.

    Returns:
        its exit code; where the run has not ended, that of a failure, or of a folder that another job owns.

    Raises:
        InputError: none was recorded.
    """
    outcome = read_outcome(folder)
    if outcome is None:
        raise InputError(f"{folder}: no run has recorded an outcome there; give a run folder, which --save wrote")
    step = "" if outcome.step is None else f" at step {outcome.step}"
    code, line = outcome.code, f"{outcome.name}{step}: {outcome.reason}"
    if code is None:
        code, owner = FAILED, owner_in_another_job(folder)
        line = f"{outcome.reason}{step and f';{step} or later'}"
        if owner is not None:
            code, line = OWNED, f"{NAMES[OWNED]}: {owner}"
    print(json.dumps({**dataclasses.asdict(outcome), "exit_code": code}, indent=2) if as_json else line)
    return code
