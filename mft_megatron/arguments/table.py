"""All options of a run: the groups, and what follows from several of them."""

import dataclasses
import os
from pathlib import Path
from typing import Any

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
from mft_megatron.run_folder import CheckpointRef

GROUPS: tuple[tuple[str, type], ...] = (
    ("network", NetworkArguments),
    ("regularization", RegularizationArguments),
    ("training", TrainingArguments),
    ("recompute", RecomputeArguments),
    ("initialization", InitializationArguments),
    ("learning rate", LearningRateArguments),
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

    ``resume``: the checkpoint ``--load`` found: its folder and description; ``None`` for a run that starts anew.
    ``base``: likewise the model whose weights are read name by name: one from Hugging Face, or that beside which
    adapters are trained, unless it is in their own checkpoint. ``adapters``: what is trained beside the model, if not
    the model.
    """

    network: NetworkArguments
    regularization: RegularizationArguments
    training: TrainingArguments
    recompute: RecomputeArguments
    initialization: InitializationArguments
    learning_rate: LearningRateArguments
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

    @property
    def weights_alone(self) -> bool:
        """Whether a run that loads takes the weights and begins at iteration 0."""
        return self.checkpoint.finetune or from_pretrained(self.resume, self.checkpoint.pretrained_checkpoint)

    @property
    def starts_from_hf(self) -> bool:
        """Whether the weights come from the folder of ``--hf-checkpoint``."""
        given = self.checkpoint.hf_checkpoint
        return None not in (self.resume, given) and Path(os.path.abspath(given)) == self.resume.path

    @property
    def reads_hf(self) -> bool:
        """Whether weights are read from the folder of ``--hf-checkpoint``."""
        given = self.checkpoint.hf_checkpoint
        return None not in (self.base, given) and Path(os.path.abspath(given)) == self.base.path

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
    def data_parallel_size(self) -> int:
        layout = self.distributed
        model = layout.tensor_model_parallel_size * layout.pipeline_model_parallel_size
        return self.world_size // (model * layout.context_parallel_size)

    @property
    def batch_multiple(self) -> int:
        """A batch has a multiple of this many packs: one micro-batch of each data-parallel rank, or, since interleaved
        stages take turns after as many micro-batches as the pipeline has ranks, so many of each."""
        micro_batches = self.distributed.pipeline_model_parallel_size if self.distributed.interleaved else 1
        return self.training.micro_batch_size * self.data_parallel_size * micro_batches

    @property
    def batch_sizes(self) -> BatchSizes:
        """Packs of each step, by the packs consumed before it."""
        training = self.training
        if training.step_batch_size_schedule is not None:
            return step_schedule(training.step_batch_size_schedule, self.data.seq_length)
        if training.rampup_batch_size is not None:
            return ramp_up(*training.rampup_batch_size, training.global_batch_size)
        return BatchSizes([0], [training.global_batch_size])

    @property
    def optimizer_states(self) -> str:
        """What kind of states the optimizer has: adam, sgd, or sgd without momentum, which has none."""
        without = self.training.optimizer == "sgd" and not self.regularization.sgd_momentum
        return f"{self.training.optimizer} without momentum" if without else self.training.optimizer

    def groups(self) -> list[Any]:
        """The groups of options, in the order of :data:`GROUPS`."""
        return [getattr(self, field.name) for field, _ in zip(dataclasses.fields(self), GROUPS, strict=False)]

    def as_options(self) -> dict[str, Any]:
        """Every option's effective value by Megatron's name, for ``config.yaml``."""
        return {
            field.name: getattr(group, field.name) for group in self.groups() for field in dataclasses.fields(group)
        }


def from_pretrained(resume: CheckpointRef | None, pretrained: str | None) -> bool:
    """Whether what a run starts from is ``--pretrained-checkpoint``, there being none of its own to go on from, or a
    model from Hugging Face, which has weights alone."""
    if resume is not None and resume.info.is_converted:
        return True
    if resume is None or pretrained is None:
        return False
    return Path(os.path.abspath(pretrained)) in (resume.path, resume.path.parent)
