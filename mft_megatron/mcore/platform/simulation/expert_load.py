"""The load of experts that a simulated GPU takes for given: which experts the tokens of a rank choose."""

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class ExpertLoad:
    """A load of experts, the same in every layer.

    Attributes:
        experts: number of experts of a layer.
        topk: how many a token chooses.
        busiest: load of the busiest expert, in multiples of the mean; all others have the rest evenly.
        which: the busiest expert.
    """

    experts: int
    topk: int
    busiest: float = 1.0
    which: int = 0

    def routes(self, indices: Tensor, scores: Tensor) -> bool:
        """Whether the results of an operator that finds the largest elements are a router's choice."""
        return scores.dim() == 2 and scores.shape[1] == self.experts and indices.shape[1] == self.topk

    def chosen(self, tokens: int) -> Tensor:
        """The experts that each token chooses, int64 [tokens, topk], all different; systematic sampling of the load."""
        first = min(self.busiest * self.topk / self.experts, 1.0)
        rest = (self.topk - first) / max(self.experts - 1, 1)
        probability = torch.full((self.experts,), rest, dtype=torch.float64)
        probability[self.which] = first
        bounds = probability.cumsum(0)
        # a token's choices are one apart on a line on which every expert has its probability's length
        starts = (torch.arange(tokens, dtype=torch.float64) + 0.5) / tokens
        points = starts[:, None] + torch.arange(self.topk)
        return torch.searchsorted(bounds, points, right=True).clamp_(max=self.experts - 1)
