"""The dry run: a start of the run on a machine without GPUs, to learn what it needs."""

import dataclasses
from collections.abc import Set

from mft_megatron.arguments.values.mock_data import FORMS, MockTask, mock_task
from mft_megatron.errors import InputError
from mft_megatron.options import option, spelling


@dataclasses.dataclass(frozen=True)
class DryRunArguments:
    """A start without a GPU and without torchrun, which computes nothing and reports what ranks need.

    For the command line only, not for a file.
    """

    dry_run: bool = option(
        False,
        "Check everything that a start checks, then take two steps of some ranks on tensors without content, and print "
        "for each of these ranks where its memory goes, its messages, FLOPs and waits, and whether it fits the GPU. Of "
        "models config.json or the description of a checkpoint is read, never weights. Nothing is trained or written.",
    )
    rank: tuple[int, ...] | None = option(
        None,
        "Ranks to report on. Not given: the first rank of the first, the second and the last pipeline stage; no other "
        "stage in the middle has more micro-batches in flight than the second.",
        metavar="R",
    )
    world_size: int | None = option(
        None, "Number of ranks. Not given: the fewest that the parallel layout can have.", metavar="N", at_least=1
    )
    all_micro_batches: bool = option(
        False,
        "Compute all micro-batches of a step. Not given: no more than two for each pipeline stage, where rows are not "
        "padded; memory has then reached its peak, and counts are multiplied to those of the whole step.",
    )
    gpu: str = option(
        "a100-80g",
        "The GPU that is simulated: options and kernels are chosen as for it.",
        choices=("a100-40g", "a100-80g", "h100-80g", "h200-141g", "b200-180g"),
    )
    busiest_expert: float = option(
        1.0,
        "Tokens of the busiest expert of each layer, in multiples of the mean; the ranks that are reported on have it. "
        "1 is a balanced load. Which tokens a router sends where is not known.",
        at_least=1,
    )
    json: bool = option(False, "Print the report as JSON.")
    mock_data: tuple[MockTask, ...] | None = option(
        None,
        f"Lengths of samples that are made up instead of --data-path, one value for each task: {FORMS}. All tasks have "
        "equally many samples; longer ones are cut at --seq-length. Without --seq-length it is N. Not given, and no "
        "--data-path either: rows without padding of one sample each. Unlike in Megatron, for the dry run only.",
        reader=mock_task,
        metavar="LENGTHS",
    )
    mock_padding_mode: str = option(
        "pack",
        "Whether rows of mock data are packed, padded or cut from one stream: --padding-mode of "
        "tools/preprocess_data.py.",
        choices=("pack", "padding", "concat"),
    )
    mock_supervised: float = option(
        1.0,
        "Fraction of the tokens of each mock sample that are supervised, at its end; at least one is.",
        at_least=0,
        at_most=1,
    )
    vocab_size: int | None = option(
        None,
        "Vocabulary of mock data and of a model of random weights. Unlike in Megatron, for the dry run only: otherwise "
        "it is that of the data set's tokenizer.",
        metavar="N",
        at_least=2,
    )


# what to do for those that are Megatron's, too
_WITHOUT = {
    "mock_data": "to train, make a small data set with tools/preprocess_data.py",
    "vocab_size": "the vocabulary is the data set's tokenizer's, so leave it out",
}
# further groups of the command line of pretrain_mft.py
DRY_RUN = (("dry run", DryRunArguments),)


def refuse_without_dry_run(asked_for: Set[str]) -> None:
    """Refuse the options of a dry run in a run that trains.

    Raises:
        InputError: the first of these options.
    """
    for field in dataclasses.fields(DryRunArguments):
        if field.name in asked_for:
            remedy = _WITHOUT.get(field.name, "add that, or leave it out")
            raise InputError(f"{spelling(field)} has no effect without --dry-run; {remedy}")
