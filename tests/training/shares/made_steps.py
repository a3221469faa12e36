"""Reports of steps with given shares."""

import numpy as np
import torch

from mft_megatron.mcore.trainer import EvaluationReport, StepReport


def reported(share_K, weight_K, **more):
    """A report whose Σ c_t by task are ``share_K``; its other sums are 1."""
    sums = {name: torch.ones(len(share_K), dtype=torch.float64) for name in EvaluationReport.__annotations__}
    sums["share_K"] = torch.tensor(np.asarray(share_K), dtype=torch.float64)
    return StepReport(**sums, weight_K=np.asarray(weight_K, float), learning_rate=1e-3, **more)
