"""Coordinate-wise trimmed mean (Yin et al., ICML 2018, arXiv 1803.01498): the extremes of each weight go.

Of a weight's values, one a client, the smallest and the largest β·n are left out and the rest averaged; up to
β·n faulty or hostile clients among n can then not move it beyond what honest ones sent. β = 0 is the mean of
clients that count alike, β near 1/2 the median. The average of more values makes it less noisy than the
median, at the price of a limit that must be known.

Fidelity: the paper's Definition 2, with floor(β·n) values at each end (the paper leaves the rounding open).
Sparse masks, clients' weights, what is not covered, and memory: as in `median`, n being the clients that hold
the weight; where so few hold it that floor(β·n) is less than the hostile clients among them, those count. A
weight that at most half of the clients hold takes 0.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ..core.budget import Budget
from ..core.hookspecs import hookimpl
from ..core.method import Method
from ..core.part import Part
from ..core.schedule import share
from ..core.state import Aggregated, Masks, Memory, Params, Sums
from .median import opened, settled


class TrimmedMean(Part):
    """Each weight's mean over the clients that hold it, without the extremes at both ends."""

    gathered: ClassVar[bool] = True

    trim: float = Field(
        0.2, ge=0, lt=0.5, description="β: fraction of a weight's values left out at each end, rounded down"
    )

    @hookimpl
    def contribute(self, params: Params, mask: Masks, moved: bool) -> Sums:
        return opened(params, mask, moved)

    @hookimpl
    def aggregate(
        self, sums: Sums, params: Params, mask: Masks, frozen: Masks, budget: Budget, memory: Memory
    ) -> Aggregated:
        return settled(self.inner, sums, params, mask, frozen, budget, memory)

    def inner(self, ranked: Tensor, count: Tensor) -> Tensor:
        """The mean of the first `count` values but the floor(β·count) at each end of them."""
        cuts = torch.tensor([share(n, self.trim) for n in range(len(ranked) + 1)], device=ranked.device)
        cut = cuts[count]
        place = torch.arange(len(ranked), device=ranked.device).view(-1, *[1] * count.dim())
        inside = (place >= cut) & (place < count - cut)
        return torch.where(inside, ranked, 0.0).sum(0) / (count - 2 * cut)


METHOD = Method(
    "trimmed_mean",
    aggregate=TrimmedMean(),
    paper="Yin et al., Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates, ICML 2018 "
    "(trimmed mean)",
)
