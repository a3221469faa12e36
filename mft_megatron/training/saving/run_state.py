"""The state of a run that its checkpoints hold."""

from mft_megatron.training.bad_steps.bad_steps import BadStepState
from mft_megatron.training.epochs import EpochState
from mft_megatron.training.evaluation import EvaluationState
from mft_megatron.training.shares.share_log import RunShareState


class RunState(EvaluationState, EpochState, RunShareState, BadStepState):
    """The state that a run saves with its weights and resumes from, beside the optimizer's; empty before the first."""
