"""All options of a run: the groups, and values that follow from several of them."""

import dataclasses
import fractions
import math
import os
from pathlib import Path
from typing import Any

from mft_megatron.arguments.groups.bad_steps import BadStepArguments
from mft_megatron.arguments.groups.checkpointing import CheckpointArguments
from mft_megatron.arguments.groups.data import DataArguments
from mft_megatron.arguments.groups.distributed import DistributedArguments
from mft_megatron.arguments.groups.fusions import FusionArguments
from mft_megatron.arguments.groups.initialization import InitializationArguments
from mft_megatron.arguments.groups.learning_rate import LearningRateArguments
from mft_megatron.arguments.groups.logging import LoggingArguments
from mft_megatron.arguments.groups.lora import LoraArguments
from mft_megatron.arguments.groups.mixed_precision import MixedPrecisionArguments
from mft_megatron.arguments.groups.moe import MoEArguments
from mft_megatron.arguments.groups.multi_task import MultiTaskArguments
from mft_megatron.arguments.groups.network import NetworkArguments
from mft_megatron.arguments.groups.recompute import RecomputeArguments
from mft_megatron.arguments.groups.regularization import RegularizationArguments
from mft_megatron.arguments.groups.training import TrainingArguments
from mft_megatron.arguments.groups.transformer_engine import TransformerEngineArguments
from mft_megatron.arguments.groups.validation import ValidationArguments
from mft_megatron.batch_sizes import BatchSizes, ramp_up, step_schedule
from mft_megatron.lora import Lora
from mft_megatron.run_folder.description import CheckpointRef

GROUPS: tuple[tuple[str, type], ...] = (
    ("network", NetworkArguments),
    ("regularization", RegularizationArguments),
    ("training", TrainingArguments),
    ("recompute", RecomputeArguments),
    ("initialization", InitializationArguments),
    ("learning rate", LearningRateArguments),
    ("bad steps", BadStepArguments),
    ("checkpointing", CheckpointArguments),
    ("mixed precision", MixedPrecisionArguments),
    ("transformer engine", TransformerEngineArguments),
    ("fusions", FusionArguments),
    ("distributed", DistributedArguments),
    ("validation", ValidationArguments),
    ("data", DataArguments),
    ("logging", LoggingArguments),
    ("moe", MoEArguments),
    ("multi-task fine-tuning", MultiTaskArguments),
    ("adapters", LoraArguments),
)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """All options of a run, complete and checked.

    Attributes:
        world_size: number of ranks.
        resume: the checkpoint or Hugging Face model that the run starts from; ``None`` for random weights.
        base: the model whose weights are read name by name: one from Hugging Face, or the model of adapters unless it
            is in the same checkpoint as they are.
        adapters: the adapters that are trained; ``None`` if the model itself is trained.
        epoch_packs: packs of the training split; known where ``--num-train-epochs`` is given.
    """

    network: NetworkArguments
    regularization: RegularizationArguments
    training: TrainingArguments
    recompute: RecomputeArguments
    initialization: InitializationArguments
    learning_rate: LearningRateArguments
    bad_steps: BadStepArguments
    checkpoint: CheckpointArguments
    precision: MixedPrecisionArguments
    transformer_engine: TransformerEngineArguments
    fusions: FusionArguments
    distributed: DistributedArguments
    validation: ValidationArguments
    data: DataArguments
    logging: LoggingArguments
    moe: MoEArguments
    multi_task: MultiTaskArguments
    lora: LoraArguments
    world_size: int
    resume: CheckpointRef | None = None
    base: CheckpointRef | None = None
    adapters: Lora | None = None
    epoch_packs: int | None = None

    @property
    def weights_alone(self) -> bool:
        """Whether a run that loads takes only the weights and starts at iteration 0."""
        return self.checkpoint.finetune or from_pretrained(self.resume, self.checkpoint.pretrained_checkpoint)

    @property
    def starts_from_hf(self) -> bool:
        """Whether the run starts from the folder of ``--hf-checkpoint``."""
        return _is_folder(self.resume, self.checkpoint.hf_checkpoint)

    @property
    def reads_hf(self) -> bool:
        """Whether weights are read from the folder of ``--hf-checkpoint``."""
        return _is_folder(self.base, self.checkpoint.hf_checkpoint)

    @property
    def starts_from_adapter(self) -> bool:
        """Whether adapters come from the folder of ``--hf-adapter``."""
        return self.lora.hf_adapter is not None and (self.resume is None or self.resume.info.lora is None)

    @property
    def saves_base(self) -> bool:
        """Whether checkpoints hold more than adapters."""
        kind = self.lora.peft_type
        return kind == "none" or not (self.lora.save_adapters_only or kind == "qlora")

    @property
    def layout_in_words(self) -> str:
        """The parallel layout without sizes of 1, as in ``TP 8 × PP 4``; empty for one process."""
        layout = self.distributed
        sizes = {
            "TP": layout.tensor_model_parallel_size,
            "PP": layout.pipeline_model_parallel_size,
            "VPP": layout.num_virtual_stages_per_pipeline_rank or 1,
            "CP": layout.context_parallel_size,
            "EP": layout.expert_model_parallel_size,
            "DP": self.data_parallel_size,
        }
        return " × ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)

    @property
    def data_parallel_size(self) -> int:
        """Number of ranks that train on different packs."""
        layout = self.distributed
        model = layout.tensor_model_parallel_size * layout.pipeline_model_parallel_size
        return self.world_size // (model * layout.context_parallel_size)

    @property
    def batch_multiple(self) -> int:
        """The number of packs that every batch must be a multiple of.

        One micro-batch of each data-parallel rank. With interleaved stages as many micro-batches of each as the
        pipeline has ranks, because the stages of a rank alternate after that many.
        """
        micro_batches = self.distributed.pipeline_model_parallel_size if self.distributed.interleaved else 1
        return self.training.micro_batch_size * self.data_parallel_size * micro_batches

    @property
    def batch_sizes(self) -> BatchSizes:
        """The number of packs of each step."""
        training = self.training
        if training.step_batch_size_schedule is not None:
            return step_schedule(training.step_batch_size_schedule, self.data.seq_length)
        if training.rampup_batch_size is not None:
            return ramp_up(*training.rampup_batch_size, training.global_batch_size)
        return BatchSizes([0], [training.global_batch_size])

    @property
    def total_packs(self) -> int | None:
        """Packs after which the run ends; ``None`` where ``--train-iters`` ends it. A part of a pack counts whole."""
        epochs = self.training.num_train_epochs
        if epochs is None or self.epoch_packs is None:
            return None
        # of the decimal number that was given: in floating point 0.07 · 100 is more than 7
        return math.ceil(fractions.Fraction(repr(epochs)) * self.epoch_packs)

    @property
    def progress(self) -> tuple[int, int]:
        """Optimizer steps and consumed packs that the run starts from."""
        if self.resume is None or self.weights_alone:
            return 0, 0
        return self.resume.info.iteration, self.resume.info.consumed_samples

    @property
    def finished(self) -> bool:
        """Whether a job that is started again finds that its run, in its own folder, has taken its last step."""
        if self.weights_alone or self.validation.skip_train or not self.in_own_folder:
            return False
        if self.evaluation_due:
            return False
        steps, consumed = self.progress
        ends_here = self.total_packs is None or consumed == self.total_packs
        return ends_here and steps == self.training.train_iters

    @property
    def evaluation_due(self) -> bool:
        """Whether the run begins with an evaluation that a signal interrupted in the job before."""
        return self.resume is not None and self.resume.info.evaluation_due and not self.weights_alone

    @property
    def in_own_folder(self) -> bool:
        """Whether the run starts from a checkpoint in its ``--save`` folder."""
        if self.resume is None or self.checkpoint.save is None:
            return False
        return os.path.realpath(self.resume.path.parent) == os.path.realpath(self.checkpoint.save)

    @property
    def optimizer_states(self) -> str:
        """Kind of the optimizer's states: adam, sgd, or sgd without momentum, which has none."""
        without = self.training.optimizer == "sgd" and not self.regularization.sgd_momentum
        return f"{self.training.optimizer} without momentum" if without else self.training.optimizer

    def groups(self) -> list[Any]:
        """The groups of options, in the order of :data:`GROUPS`."""
        return [getattr(self, field.name) for field, _ in zip(dataclasses.fields(self), GROUPS, strict=False)]

    def as_options(self) -> dict[str, Any]:
        """The effective value of every option by the name of its field, for ``config.yaml``.

        Steps that follow from ``--num-train-epochs`` are left out: read again, they would contradict it.
        """
        values = {
            field.name: getattr(group, field.name) for group in self.groups() for field in dataclasses.fields(group)
        }
        if self.training.num_train_epochs is not None:
            steps = values.pop("train_iters")
            if values["lr_decay_iters"] == steps:
                del values["lr_decay_iters"]
        return values


def from_pretrained(resume: CheckpointRef | None, pretrained: str | None) -> bool:
    """Whether a run starts from ``--pretrained-checkpoint`` or from a converted model: from weights only.

    A run that has a checkpoint of its own starts from that instead.
    """
    if resume is not None and resume.info.is_converted:
        return True
    if resume is None or pretrained is None:
        return False
    return Path(os.path.abspath(pretrained)) in (resume.path, resume.path.parent)


def _is_folder(found: CheckpointRef | None, folder: str | None) -> bool:
    return found is not None and folder is not None and Path(os.path.abspath(folder)) == found.path
