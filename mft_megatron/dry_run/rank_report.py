"""A dry run's report about one rank: memory, host waits, copies, messages and work of a step.

All sizes are bytes of torch's allocator: each storage rounded up to 512. Lines of code are ``file:line`` with the
file's path below its package, e.g. ``mft_megatron/mcore/trainer.py:120``.
"""

import dataclasses
from typing import Any

# Categories of memory, in the order in which they are printed.
WEIGHTS = "weights"
GRADIENTS = "gradients"
OPTIMIZER = "optimizer"  # main weights and the optimizer's states
ACTIVATIONS = "activations"  # saved for the backward pass
LOGITS = "logits"  # logits and token losses, saved or not
COMMUNICATION = "communication"  # buffers that messages are sent from or received into
TEMPORARIES = "temporaries"
CATEGORIES = (WEIGHTS, GRADIENTS, OPTIMIZER, ACTIVATIONS, LOGITS, COMMUNICATION, TEMPORARIES)


@dataclasses.dataclass(frozen=True)
class LiveTensors:
    """Tensors that one line of code made and that were alive at a peak.

    Attributes:
        line: the line of code; in a backward pass without Python code the name of the operation stands before it.
        category: one of :data:`CATEGORIES`.
        count: how many tensors.
        bytes: of all of them.
    """

    line: str
    category: str
    count: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Memory:
    """Memory of the GPU at its peak.

    Attributes:
        peak: bytes.
        by_category: bytes of each of :data:`CATEGORIES` at the peak; they sum to ``peak``.
        largest: what was alive at the peak, by line and category, the largest first; at most 20 entries.
        line: where the peak was reached.
    """

    peak: int
    by_category: dict[str, int]
    largest: tuple[LiveTensors, ...]
    line: str


@dataclasses.dataclass(frozen=True)
class HostWaits:
    """Times that one line of code lets the host wait for the GPU.

    Attributes:
        line: the line of code.
        kind: ``value`` (a tensor's value is read), ``copy`` (a tensor is copied to the host), ``pageable copy`` (a copy
            to the GPU that is not from pinned memory), ``size`` (a result's size depends on values), ``event`` (a
            stream or event is waited for) or ``device`` (all work of the GPU is waited for).
        in_micro_batches: within the pipeline schedule, summed over the step's micro-batches.
        outside: in the rest of the step.
    """

    line: str
    kind: str
    in_micro_batches: int
    outside: int


@dataclasses.dataclass(frozen=True)
class Copies:
    """Copies from the host to the GPU by one line of code in a step.

    Attributes:
        line: the line of code.
        pinned: whether from pinned memory.
        count: how many.
        bytes: of all of them.
        in_micro_batches: how many of them within the pipeline schedule.
    """

    line: str
    pinned: bool
    count: int
    bytes: int
    in_micro_batches: int


@dataclasses.dataclass(frozen=True)
class Messages:
    """Messages of one kind within one process group in a step.

    Attributes:
        kind: ``all-reduce``, ``all-gather``, ``reduce-scatter``, ``all-to-all``, ``broadcast``, ``send``, ``receive``,
            ``barrier``, or torch's name of another.
        group: name of the process group: ``tensor``, ``pipeline``, ``data``, ``context``, …
        ranks: size of the group.
        count: how many.
        bytes: of this rank's tensors: the larger of what goes in and what comes out of each.
    """

    kind: str
    group: str
    ranks: int
    count: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Step:
    """One training step of a rank.

    Where not all micro-batches are computed, what is counted in them is multiplied: the counts are those of the whole
    step. Micro-batches of packed samples differ in their attention, and these of a step are taken for alike.

    Attributes:
        number: of the step, from 1.
        micro_batches: how many this rank has.
        computed: how many of them are computed.
        memory: at the step's peak.
        waits: by line, the most frequent first.
        copies: by line.
        messages: by kind and group, the most bytes first.
        operations: floating-point operations of matrix products and attention, forward, backward and recomputed.
        kernels: operations that launch a kernel, by torch's count of operators.
    """

    number: int
    micro_batches: int
    computed: int
    memory: Memory
    waits: tuple[HostWaits, ...]
    copies: tuple[Copies, ...]
    messages: tuple[Messages, ...]
    operations: int
    kernels: int


@dataclasses.dataclass(frozen=True)
class RankReport:
    """A dry run of one rank.

    Attributes:
        rank: of the world.
        position: this rank in its groups, by name: ``tensor``, ``pipeline``, ``context``, ``data``, ``expert``.
        layers: numbers of the transformer layers of this rank, from 1.
        embedding: whether this rank has the word embedding.
        output: whether this rank has the output layer.
        parameters: of this rank.
        trained_parameters: those that are trained.
        resident: bytes by category that stay between steps, after the last one.
        steps: the training steps, in order; the first one also makes what is kept from then on.
        longest: memory at the peak of a step with the longest rows of the data set; ``None`` where all rows are equally
            long.
        evaluation: memory at the peak of an evaluation after the steps; ``None`` if the run evaluates nothing.
        save: memory of the GPU at the peak of a save after the steps; ``None`` if the run saves nothing.
        save_host: bytes of tensors that the save holds on the host at its peak; ``None`` if the run saves nothing.
        seconds: how long the dry run of this rank took.
    """

    rank: int
    position: dict[str, int]
    layers: tuple[int, ...]
    embedding: bool
    output: bool
    parameters: int
    trained_parameters: int
    resident: dict[str, int]
    steps: tuple[Step, ...]
    longest: Memory | None
    evaluation: Memory | None
    save: Memory | None
    save_host: int | None
    seconds: float

    @property
    def peak(self) -> int:
        """Most bytes of the GPU at any time of steps, evaluation and save."""
        others = [memory.peak for memory in (self.longest, self.evaluation, self.save) if memory is not None]
        return max([step.memory.peak for step in self.steps] + others)

    def as_json(self) -> dict[str, Any]:
        """The report as JSON values, under the names of its fields."""
        return dataclasses.asdict(self) | {"peak": self.peak}
