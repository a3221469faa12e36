"""A start of a run up to its first step, without process groups: options, model description, data set, plan.

::

    command line ─► model description ─► arguments ─► data set, or mock data ─► evaluation ─► plan of the first step

Everything is refused that a start refuses. What only training needs has a value here if it is not given.
"""

import contextlib
import dataclasses
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mft_megatron.arguments.checks.lora import check_trained_model
from mft_megatron.arguments.command import CommandLine, make_arguments
from mft_megatron.arguments.groups.checkpointing import CheckpointArguments
from mft_megatron.arguments.groups.distributed import DistributedArguments
from mft_megatron.arguments.groups.dry_run import DryRunArguments
from mft_megatron.arguments.groups.lora import LoraArguments
from mft_megatron.arguments.start import Start, find_checkpoint, reads_adapter, reads_hf_model
from mft_megatron.arguments.table import Arguments
from mft_megatron.arguments.values.mock_data import MockTask, mock_task
from mft_megatron.convert.peft.weight_source import AdapterSource
from mft_megatron.data.loading.dataset import PackedDataset, packed_lengths, training_packs
from mft_megatron.errors import InputError
from mft_megatron.training.pretrain import check_data_of_model, evaluation_of, open_dataset

from .measured_steps import largest_batch, measured_steps
from .mock_data import write_mock_data
from .model_description import describe_model, model_folder
from .refusals import refuse_not_simulated

# Values of options that a run needs and that nothing here depends on.
UNIMPORTANT: dict[str, Any] = {"lr": 1e-5, "train_iters": 100}


@dataclasses.dataclass(frozen=True)
class DryStart:
    """A run that is ready for its first step.

    Attributes:
        arguments: complete and checked.
        measured: the same with as many micro-batches in each step as are computed.
        dataset: that it trains on.
        mock: the tasks whose samples are made up; ``None`` for a data set of the user's.
        ranks: to report on.
        notes: lines for the user.
    """

    arguments: Arguments
    measured: Arguments
    dataset: PackedDataset
    mock: tuple[MockTask, ...] | None
    ranks: tuple[int, ...]
    notes: Sequence[str]

    @property
    def largest_batch(self) -> int:
        """Rows of the largest global batch that is to come."""
        return largest_batch(self.arguments)

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a rank in a step with the largest global batch."""
        return self.largest_batch // (self.arguments.training.micro_batch_size * self.arguments.data_parallel_size)

    @property
    def computed_micro_batches(self) -> int:
        """How many of them are computed."""
        rows = self.measured.training.global_batch_size
        return rows // (self.arguments.training.micro_batch_size * self.arguments.data_parallel_size)


@contextlib.contextmanager
def started(command_line: CommandLine) -> Iterator[DryStart]:
    """Start a run without computing; what has to be on a disk is removed at the end.

    Raises:
        InputError: the run could not start, or cannot be simulated.
    """
    options = command_line.group(DryRunArguments)
    with tempfile.TemporaryDirectory(prefix="mft_dry_run_") as folder:
        given, notes = _given(command_line, Path(folder))
        mock = _mock_tasks(command_line, given)
        if mock is not None:
            given["data_path"] = str(Path(folder) / "mock_data")
        command_line = dataclasses.replace(command_line, given=given)
        start, of_model = _described_start(command_line)
        world_size = options.world_size or smallest_world(command_line.group(DistributedArguments))
        arguments = make_arguments(command_line, start, world_size, packed_lengths, training_packs)
        # adapters of a model of random weights are measured like those of any other
        if mock is None and (problem := check_trained_model(arguments)):
            raise InputError(problem)
        if arguments.finished:
            raise InputError(f"{arguments.checkpoint.save}: this run is finished; there is no step to report on")
        refuse_not_simulated(arguments)
        if problem := check_busiest_expert(arguments, options.busiest_expert):
            raise InputError(problem)
        ranks = reported_ranks(arguments, options.rank)
        if mock is not None:
            _write(mock, arguments, options)
        dataset, _ = open_dataset(arguments, main_rank=True)
        of_data = [] if mock is not None else check_data_of_model(arguments, dataset)
        evaluation_of(arguments, dataset)
        every = options.all_micro_batches or dataset.padded
        yield DryStart(arguments, measured_steps(arguments, every), dataset, mock, ranks, (*of_model, *notes, *of_data))


def smallest_world(layout: DistributedArguments) -> int:
    """The fewest ranks that a parallel layout can have."""
    tp, pp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    of_experts = layout.expert_model_parallel_size * (layout.expert_tensor_parallel_size or tp)
    return pp * math.lcm(tp * layout.context_parallel_size, of_experts)


def check_busiest_expert(arguments: Arguments, busiest: float) -> str | None:
    """Check that an expert can have ``busiest`` times its equal share of tokens."""
    experts, topk = arguments.network.num_experts, arguments.network.moe_router_topk
    if experts is None:
        return f"--busiest-expert {busiest:g}: the model has no experts; leave it out" if busiest > 1 else None
    if busiest > experts / topk:
        return (
            f"--busiest-expert {busiest:g}: where each token takes {topk} of {experts} experts, one that all take has "
            f"{experts / topk:g} times its equal share; give no more"
        )
    return None


def reported_ranks(arguments: Arguments, wanted: Sequence[int] | None) -> tuple[int, ...]:
    """The ranks to report on: ``wanted``, or the first rank of the first, the second and the last pipeline stage.

    Raises:
        InputError: there is no such rank.
    """
    world, stages = arguments.world_size, arguments.distributed.pipeline_model_parallel_size
    for rank in wanted or ():
        if not 0 <= rank < world:
            raise InputError(f"--rank {rank}: ranks are from 0 to {world - 1}; --world-size sets how many there are")
    if wanted:
        return tuple(dict.fromkeys(wanted))
    return tuple(stage * (world // stages) for stage in sorted({0, min(1, stages - 1), stages - 1}))


def _given(command_line: CommandLine, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Add to the options that are given those that nothing here depends on, and a line that says what else is added."""
    given, notes = dict(command_line.given), []
    for name, value in UNIMPORTANT.items():
        if name not in given and not (name == "train_iters" and "num_train_epochs" in given):
            given[name] = value
    if "micro_batch_size" not in given:
        given["micro_batch_size"] = 1
        notes.append("--micro-batch-size is not given; it is 1 here")
    # without a folder nothing would be saved, and a save would not be reported
    given.setdefault("save", str(folder / "run"))
    if "hf_checkpoint" in given:
        given["hf_checkpoint"] = model_folder(given["hf_checkpoint"])
    return given, notes


def _mock_tasks(command_line: CommandLine, given: dict[str, Any]) -> tuple[MockTask, ...] | None:
    """The tasks of mock data, from which ``--seq-length`` may follow; ``None`` for a data set of the user's."""
    options = command_line.group(DryRunArguments)
    if "data_path" in given:
        for name, value in (("--mock-data", options.mock_data), ("--vocab-size", options.vocab_size)):
            if value is not None:
                raise InputError(f"--data-path {given['data_path']}: leave {name} out, or --data-path")
        return None
    if "num_train_epochs" in given:
        raise InputError("--num-train-epochs: mock data have no epochs; leave it out, or give --data-path")
    tasks = options.mock_data
    if tasks is None and "seq_length" not in given:
        raise InputError(
            "missing option: give --data-path PREFIX, or --seq-length N for rows of N made-up tokens, or --mock-data"
        )
    if tasks is None:
        return (mock_task(str(given["seq_length"])),)
    if "seq_length" not in given:
        if len(tasks) > 1 or tasks[0].distribution != "lengths" or len(tasks[0].numbers) > 1:
            raise InputError(f"missing option: give --seq-length; --mock-data {tasks[0].text} has many lengths")
        given["seq_length"] = int(tasks[0].numbers[0])
    return tasks


def _described_start(command_line: CommandLine) -> tuple[Start, Sequence[str]]:
    """The start of the run, and lines about the model of ``--hf-checkpoint``."""
    options, lora = command_line.group(CheckpointArguments), command_line.group(LoraArguments)
    start = Start(find_checkpoint(options))
    notes: Sequence[str] = []
    if options.hf_checkpoint is not None and reads_hf_model(options, start.checkpoint):
        info, notes = describe_model(Path(options.hf_checkpoint))
        start = dataclasses.replace(start, hf_model=info)
    resume = start.resume(options)
    if lora.hf_adapter is not None and resume is not None and reads_adapter(lora, start.checkpoint):
        adapter = AdapterSource(lora.hf_adapter, resume.info)
        start = dataclasses.replace(start, adapter=adapter.lora)
    return start, notes


def _write(tasks: Sequence[MockTask], arguments: Arguments, options: DryRunArguments) -> None:
    """Write mock data for two steps of the largest global batch."""
    vocab_size = options.vocab_size
    if arguments.resume is not None:
        of_model = arguments.resume.info.vocab_size
        if vocab_size not in (None, of_model):
            origin = "--hf-checkpoint" if arguments.reads_hf else "the checkpoint"
            raise InputError(f"--vocab-size {vocab_size}: the model of {origin} has {of_model}; leave it out")
        vocab_size = of_model
    if vocab_size is None:
        raise InputError("missing option: give --vocab-size N; a model of random weights and mock data need it")
    write_mock_data(
        Path(arguments.data.data_path),
        tasks,
        arguments.data.seq_length,
        2 * largest_batch(arguments),
        vocab_size,
        options.mock_padding_mode,
        options.mock_supervised,
    )
