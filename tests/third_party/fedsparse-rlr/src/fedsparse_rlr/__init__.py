"""Robust learning rates (Ozdayi et al., Defending against Backdoors in Federated Learning, AAAI 2021).

The server adds up the signs of the clients' updates. Where the sum is below a threshold in size, too few
agree on a direction, and the server takes its step the other way.

Fidelity: the paper's equations for FedAvg with a server rate of 1. Our reading: the threshold is a fraction
of the clients of a round (votes of 4 among 10 are 0.4).
"""

from __future__ import annotations

import torch
from fedsparse import Aggregated, Budget, Field, Masks, Memory, Method, Params, Part, Sums, hookimpl, masks
from fedsparse.plugins.fedavg import WeightedMean
from torch import Tensor


class RobustMean(Part):
    """The sample-weighted mean, its step reversed where too few clients agree on the direction."""

    threshold: float = Field(default=0.4, ge=0, le=1, description="θ: votes needed, as a fraction of all")

    @hookimpl
    def contribute(self, params: Params, mask: Masks, anchor: Params, weight: Tensor, moved: bool) -> Sums:
        votes = {f"votes/{name}": (value - anchor[name]).sign() for name, value in params.items()}
        mean = WeightedMean().contribute(params, mask, weight, moved)
        return {**mean, **votes, "clients": torch.ones_like(weight)}

    @hookimpl
    def aggregate(
        self, sums: Sums, params: Params, mask: Masks, frozen: Masks, budget: Budget, memory: Memory
    ) -> Aggregated:
        mean, kept, memory = WeightedMean().aggregate(sums, params, mask, frozen, budget, memory)
        moved = {}
        for name, held in params.items():
            agree = sums[f"votes/{name}"].abs() >= self.threshold * sums["clients"]
            moved[name] = torch.where(agree, mean[name], 2 * held - mean[name])
        return Aggregated(masks.apply(moved, kept), kept, memory)


METHOD = Method(
    "rlr",
    aggregate=RobustMean(),
    paper="Ozdayi et al., Defending against Backdoors in Federated Learning, AAAI 2021",
)
