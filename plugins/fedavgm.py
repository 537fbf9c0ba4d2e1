"""FedAvgM (Hsu et al., arXiv 1909.06335, 2019): FedAvg with momentum on the server.

With Δ = mean of the uploads - W the server keeps v ← βv + Δ and moves W ← W + v.

Fidelity: the paper's equations, as W ← mean + β·v, which is the same and is FedAvg to the bit at β = 0. The
FedDST paper's "FedAvgM" has no server momentum; it is FedAvg with `federation.momentum`. Our reading for
moving masks: v lives on weights that stay, so it revives nothing and moves nothing frozen; it starts at 0
where the model is 0, which tells a weight that the server has drawn anew, be it in the call that dropped it.
What FedAvg's aggregation prunes takes v = 0 and the value 0 with it; a weight that clients have grown enters
with its mean as value and v = 0, because a starting value is not a step; Δ counts from the next round on.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from ..core import masks, optim
from ..core.budget import Budget
from ..core.hookspecs import hookimpl
from ..core.method import Method
from ..core.part import Part
from ..core.state import Aggregated, Masks, Memory, Params, Sums
from .fedavg import WeightedMean


class ServerMomentum(Part):
    """The sample-weighted mean of all clients, carried on by the server's momentum."""

    linear: ClassVar[bool] = True

    beta: float = Field(0.9, ge=0, lt=1, description="β: momentum of the server; 0 is FedAvg")

    @hookimpl
    def contribute(self, params: Params, mask: Masks, weight: Tensor, moved: bool) -> Sums:
        return WeightedMean().contribute(params, mask, weight, moved)

    @hookimpl
    def aggregate(
        self, sums: Sums, params: Params, mask: Masks, frozen: Masks, budget: Budget, memory: Memory
    ) -> Aggregated:
        mean, kept, _ = WeightedMean().aggregate(sums, params, mask, frozen, budget, {})
        steady = masks.steady(mask, kept, frozen)
        velocity = masks.apply(memory.get("velocity", optim.zeros(params)), masks.support(params, steady))
        moved = {name: p + self.beta * velocity[name] for name, p in mean.items()}
        velocity = masks.apply({name: p - params[name] for name, p in moved.items()}, steady)
        return Aggregated(moved, kept, {"velocity": velocity})


METHOD = Method(
    "fedavgm",
    aggregate=ServerMomentum(),
    paper="Hsu et al., Measuring the Effects of Non-Identical Data Distribution, 2019",
)
