"""FedDST (Bibikar et al., AAAI 2022, arXiv 2112.09824): clients rewire, the server votes and prunes back.

Every `period` rounds each client drops the smallest fraction of its active weights and grows as many
connections where its own gradient is largest; the server averages each weight over the clients that hold
it and prunes the union to the budget.

Fidelity: what the method means, not what the released code does. Growth happens after epoch E-1 of E, so
that new weights are trained before the server prunes (in the code they arrive as zeros and are pruned at
once); it never hits active weights; ties prefer active weights; the fraction is annealed; clients are
weighted by samples and sampled without replacement. Published figures come from the released code.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..core import masks
from ..core.budget import Budget
from ..core.hookspecs import hookimpl
from ..core.ledger import Traffic
from ..core.method import Method
from ..core.part import Part
from ..core.schedule import cosine_decay, share
from ..core.state import Aggregated, Clock, Masks, Memory, Params, Readjusted, Scores, Sums


class Regrow(Part):
    """Clients drop their smallest weights and grow where their gradient is largest."""

    budget_promise: ClassVar[Literal["exact"]] = "exact"
    site: ClassVar[Literal["client"]] = "client"

    ratio: float = Field(
        0.01, ge=0, le=1, description="α: fraction of the active weights replaced at a readjustment"
    )
    period: int = Field(15, ge=1, description="ΔR: rounds between readjustments")
    annealing: Literal["cosine", "constant"] = Field(
        "cosine", description="how the fraction decays; 'constant' readjusts to the end of the run"
    )
    end: float = Field(0.5, gt=0, le=1, description="R_end: annealing ends after this fraction of the rounds")
    final_sparsity: float | None = Field(
        None, ge=0, lt=1, description="S_fin: sparsity reached linearly at `end`; unset keeps the target"
    )
    score_batches: int = Field(1, ge=1, description="minibatches behind the growth gradient")

    def fraction(self, clock: Clock) -> float:
        """r_t = DECAY(t, α, R_end)."""
        if self.annealing == "constant":
            return self.ratio
        return cosine_decay(clock.round, self.ratio, share(clock.rounds, self.end))

    @hookimpl
    def target_sparsity(self, base: float, clock: Clock) -> float:
        if self.final_sparsity is None:
            return base
        end = max(1, share(clock.rounds, self.end))
        return base + (self.final_sparsity - base) * min(clock.round / end, 1)

    @hookimpl
    def due(self, clock: Clock, budget: Budget) -> bool:
        if budget.sparsity == 0:
            return False  # a dense network has nowhere to grow
        in_round = (clock.round - 1) % self.period == 0 and clock.round > 0 and self.fraction(clock) > 0
        return in_round and clock.epoch == clock.epochs - 1

    @hookimpl
    def grow_score(self, dense_grad: Params) -> Scores:
        return {name: gradient.abs() for name, gradient in dense_grad.items()}

    @hookimpl
    def readjust(
        self, params: Params, mask: Masks, frozen: Masks, score: Scores, budget: Budget, clock: Clock
    ) -> Readjusted:
        sparser = budget.at(budget.sparsity + (1 - budget.sparsity) * self.fraction(clock))
        kept = masks.prune_smallest(params, mask, sparser, frozen)
        kept = masks.prune_smallest(params, kept, budget, frozen)  # rounding can favour a layer at `sparser`
        params = masks.apply(params, kept)
        return Readjusted(params, masks.grow_largest(kept, score, budget), {})


class MaskedMean(Part):
    """Each weight's sample-weighted mean over the clients that hold it, pruned back to the budget."""

    min_votes: float = Field(
        0, ge=0, description="weights held by clients with this many samples together, or fewer, are dropped"
    )

    @hookimpl
    def contribute(self, params: Params, mask: Masks, weight: Tensor) -> Sums:
        votes = {f"votes/{name}": weight * m for name, m in mask.items()}
        return {**{name: weight * p for name, p in params.items()}, **votes, "weight": weight}

    @hookimpl
    def aggregate(
        self, sums: Sums, params: Params, mask: Masks, frozen: Masks, budget: Budget, memory: Memory
    ) -> Aggregated:
        mean, union = {}, {}
        for name in params:
            if name in mask:
                votes = sums[f"votes/{name}"]
                union[name] = (votes > self.min_votes) | frozen[name]
                mean[name] = torch.where(union[name], sums[name] / votes, 0.0)
            else:
                mean[name] = sums[name] / sums["weight"]
        kept = masks.prune_smallest(mean, union, budget, frozen)
        return Aggregated(masks.apply(mean, kept), kept, memory)


class CodeCost(Part):
    """Bytes as the released code counts them: 1 bit a weight for masks, 32 bits a value and bias."""

    @hookimpl
    def paper_bytes(self, traffic: Traffic) -> float:
        dense = 32 * traffic.unmasked
        download = traffic.mask_changed * traffic.weights
        if traffic.round > 0:  # everybody can draw the first weights from the seed
            download += 32 * traffic.active + dense
        upload = traffic.client_readjusted * traffic.active_upload + 32 * traffic.active_upload + dense
        return (download + upload) / 8


METHOD = Method(
    "feddst",
    readjust=Regrow(),
    aggregate=MaskedMean(),
    extras=(CodeCost(),),
    paper="Bibikar et al., Federated Dynamic Sparse Training, AAAI 2022",
)
