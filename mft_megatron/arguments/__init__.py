"""The options of ``pretrain_mft.py``: Megatron's names, meanings and defaults, as frozen dataclasses."""

from .command import parse_arguments as parse_arguments
from .groups.checkpointing import CheckpointArguments as CheckpointArguments
from .groups.data import DataArguments as DataArguments
from .groups.distributed import DistributedArguments as DistributedArguments
from .groups.fusions import FusionArguments as FusionArguments
from .groups.initialization import InitializationArguments as InitializationArguments
from .groups.learning_rate import LearningRateArguments as LearningRateArguments
from .groups.logging import LoggingArguments as LoggingArguments
from .groups.lora import LoraArguments as LoraArguments
from .groups.mixed_precision import MixedPrecisionArguments as MixedPrecisionArguments
from .groups.moe import MoEArguments as MoEArguments
from .groups.multi_task import MultiTaskArguments as MultiTaskArguments
from .groups.network import NetworkArguments as NetworkArguments
from .groups.recompute import RecomputeArguments as RecomputeArguments
from .groups.regularization import RegularizationArguments as RegularizationArguments
from .groups.training import TrainingArguments as TrainingArguments
from .groups.transformer_engine import TransformerEngineArguments as TransformerEngineArguments
from .groups.validation import ValidationArguments as ValidationArguments
from .table import GROUPS as GROUPS
from .table import Arguments as Arguments
