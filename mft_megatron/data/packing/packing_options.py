"""The options of packing, and which of them contradict each other or the data."""

import dataclasses
from collections.abc import Sequence

from mft_megatron.data.storage.ledger import OVERLONG, LengthEntry, TaskEntry
from mft_megatron.errors import InputError
from mft_megatron.parsing.typed_json import from_json

SPLITS = ("train", "valid", "test")
PACKINGS = ("mixed", "per-task")
PADDING_MODES = ("pack", "padding", "concat")
PACKERS = ("mixed", "decreasing")


@dataclasses.dataclass(frozen=True)
class PackingOptions:
    """How stored samples become packs: the packing options of the commands, parsed.

    The names and values of the fields are stored in the ledger of the data set.

    Attributes:
        seq_length: tokens of a pack.
        split: weights of train, valid and test.
        seed: of the split, of sampling, of the packer and of the order of documents.
        overlong: a value of :data:`OVERLONG`; a task may have another one.
        padding_mode: a value of :data:`PADDING_MODES`.
        packing: a value of :data:`PACKINGS`; "per-task": a pack has samples of one task only.
        packer: a value of :data:`PACKERS`, for training rows of several samples: "mixed" spreads the samples of each
            task evenly over the rows; "decreasing" packs from the longest sample to the shortest, as in other splits.
        task_sampling: ratio of each task, by name; see :mod:`.sampling`.
        sampling_temperature, sampling_max_epochs, sampling_epochs: see :mod:`.sampling`.
    """

    seq_length: int
    split: tuple[float, float, float] = (98.0, 2.0, 0.0)
    seed: int = 1234
    overlong: str = OVERLONG[0]
    padding_mode: str = PADDING_MODES[0]
    packing: str = "mixed"
    packer: str = PACKERS[0]
    task_sampling: dict[str, float] = dataclasses.field(default_factory=dict)
    sampling_temperature: float | None = None
    sampling_max_epochs: float | None = None
    sampling_epochs: int = 1

    @classmethod
    def from_entry(cls, entry: LengthEntry, ledger_path: str) -> "PackingOptions":
        """Read the options that a data set was packed with from its ledger.

        Args:
            entry: the ledger's entry for one length.
            ledger_path: of the ledger, for the error.

        Raises:
            InputError: the entry holds other fields or values than these options.
        """
        try:
            options = from_json(cls, {**entry.options, "packer": entry.packer, "split": entry.options.get("split")})
            choices = {"overlong": OVERLONG, "padding_mode": PADDING_MODES, "packing": PACKINGS, "packer": PACKERS}
            for name, known in choices.items():
                if getattr(options, name) not in known:
                    raise ValueError(f"{name} {getattr(options, name)!r}")
            if not 0 < options.sampling_epochs < 2**31:
                raise ValueError(f"sampling_epochs {options.sampling_epochs}")
            return options
        except ValueError as error:
            raise InputError(
                f"{ledger_path}: packing options that cannot be read ({error}); preprocess again"
            ) from None


def check_packing_options(options: PackingOptions, tasks: Sequence[TaskEntry] = ()) -> None:
    """Refuse options that contradict each other or, where ``tasks`` are given, the data.

    Raises:
        InputError: the first contradiction.
    """
    concat = options.padding_mode == "concat"
    if options.sampling_temperature is not None and options.task_sampling:
        raise InputError("--sampling-temperature: gives every task its ratio; leave --task-sampling out, or it")
    sampled = options.task_sampling or options.sampling_temperature or options.sampling_max_epochs
    if concat and (sampled or options.sampling_epochs != 1):
        raise InputError("--padding-mode concat: every token is used once; leave the sampling options out")
    of_file = [task.name for task in tasks if task.sampling is not None and task.name not in options.task_sampling]
    if of_file and (concat or options.sampling_temperature is not None):
        option = "--padding-mode concat" if concat else "--sampling-temperature"
        raise InputError(
            f"{option}: the task file has a sampling of its own for task {of_file[0]}; leave one of them out"
        )
    names = [task.name for task in tasks]
    unknown = [name for name in options.task_sampling if name not in names]
    if tasks and unknown:
        raise InputError(f"--task-sampling {unknown[0]}: no such task; there are {', '.join(names)}")
    partly = [task.name for task in tasks if not task.documents]
    if concat and partly:
        raise InputError(
            f"--padding-mode concat: task {partly[0]} is not of text alone, and cutting through a conversation would "
            "train on answers without their questions; use pack"
        )
    weighted = [task.name for task in tasks if task.weights]
    if concat and weighted:
        raise InputError(
            f"--padding-mode concat: documents of task {weighted[0]} have weights, and a row of several documents "
            "counts as one sample; use pack, or preprocess them without weights (--ignore-keys weight)"
        )
