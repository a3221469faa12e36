"""Command lines that the tests of options parse, and a checkpoint to resume from."""

import dataclasses

from mft_megatron.arguments.command import parse_arguments
from mft_megatron.run_folder.description import CheckpointInfo, write_info
from mft_megatron.run_folder.names import TRACKER, iteration_folder
from tests.command_lines import SHORT_RUN, SMALL

# SHORT_RUN without the shape of the model, which a checkpoint holds
WITHOUT_SHAPE = SHORT_RUN.removeprefix(SMALL)


def parse(extra="", world_size=1, base=SHORT_RUN, lengths=lambda prefix: [128]):
    """Complete and check a command line, ``base`` and then ``extra``, which takes precedence."""
    return parse_arguments(f"{base} {extra}".split(), world_size, lengths)


def resumed(extra, world_size=1):
    """Parse the command line of a run whose checkpoint, in ``extra``, knows the shape of the model."""
    return parse(extra, world_size, WITHOUT_SHAPE)


def checkpoint(folder, **changes):
    """Write the description of a checkpoint at iteration 5 and return the run folder.

    Args:
        changes: fields of the description with other values.
    """
    network = dataclasses.asdict(parse("--swiglu --position-embedding-type rope").network)
    info = CheckpointInfo(
        iteration=5,
        consumed_samples=10,
        architecture=network,
        vocab_size=100,
        tokenizer={},
        dataset_hash="abc",
        seed=7,
        global_batch_size=2,
    )
    info = dataclasses.replace(info, **changes)
    path = iteration_folder(folder, info.iteration)
    path.mkdir(parents=True)
    write_info(path, info)
    (folder / TRACKER).write_text(f"{info.iteration}\n")
    return folder
