"""FedAdam (Reddi et al., Adaptive Federated Optimization, ICLR 2021): Adam on the server; also Yogi, Adagrad.

With Δ = mean of the uploads - W the server keeps m ← β₁m + (1-β₁)Δ and a second moment v by `rule` and
moves W ← W + η·m/(√v + τ).

Fidelity: Algorithm 2 of the paper, without bias correction, v from τ² on; clients are weighted by samples.
Our reading for moving masks: m and v live on weights that stay, 0 elsewhere, so they revive nothing and move
nothing frozen; they start afresh where the model is 0, which tells a weight that the server has drawn anew,
be it in the call that dropped it. What FedAvg's aggregation prunes is 0 with its memory; a weight that
clients have grown enters with its mean as value, not with an adaptive step, and with fresh memory.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..core import masks, optim
from ..core.budget import Budget
from ..core.hookspecs import hookimpl
from ..core.method import Method
from ..core.part import Part
from ..core.state import Aggregated, Masks, Memory, Params, Sums
from .fedavg import WeightedMean


class AdaptiveServer(Part):
    """The server takes the clients' mean movement as the gradient of an adaptive optimiser."""

    linear: ClassVar[bool] = True

    rule: Literal["adam", "yogi", "adagrad"] = Field("adam", description="how the second moment moves")
    rate: float = Field(0.01, gt=0, description="η: learning rate of the server")
    beta1: float = Field(0.9, ge=0, lt=1, description="β₁: decay of the first moment")
    beta2: float = Field(0.99, ge=0, lt=1, description="β₂: decay of the second moment (adam, yogi)")
    tau: float = Field(1e-3, gt=0, description="τ: adaptivity; larger is closer to plain server momentum")

    def second_moment(self, moment: Tensor, delta: Tensor) -> Tensor:
        """v of this round."""
        square = delta.square()
        moment = torch.where(moment > 0, moment, self.tau**2)  # a weight's first step
        if self.rule == "adagrad":
            return moment + square
        if self.rule == "yogi":
            return moment - (1 - self.beta2) * square * torch.sign(moment - square)
        return self.beta2 * moment + (1 - self.beta2) * square

    @hookimpl
    def contribute(self, params: Params, mask: Masks, weight: Tensor, moved: bool) -> Sums:
        return WeightedMean().contribute(params, mask, weight, moved)

    @hookimpl
    def aggregate(
        self, sums: Sums, params: Params, mask: Masks, frozen: Masks, budget: Budget, memory: Memory
    ) -> Aggregated:
        mean, kept, _ = WeightedMean().aggregate(sums, params, mask, frozen, budget, {})
        steady = masks.steady(mask, kept, frozen)
        begun = masks.support(params, steady)
        first, second = (
            masks.apply(memory.get(name, optim.zeros(params)), begun) for name in ("first", "second")
        )
        delta = {name: p - params[name] for name, p in mean.items()}
        first = {name: self.beta1 * first[name] + (1 - self.beta1) * d for name, d in delta.items()}
        second = {name: self.second_moment(second[name], d) for name, d in delta.items()}
        step = {name: self.rate * m / (second[name].sqrt() + self.tau) for name, m in first.items()}
        # where the optimiser has no say, the mean stands
        change = masks.apply({name: step[name] - d for name, d in delta.items()}, steady)
        moved = {name: p + change[name] for name, p in mean.items()}
        first, second = masks.apply(first, steady), masks.apply(second, steady)
        return Aggregated(moved, kept, {"first": first, "second": second})


METHOD = Method(
    "fedadam",
    aggregate=AdaptiveServer(),
    paper="Reddi et al., Adaptive Federated Optimization, ICLR 2021",
)
