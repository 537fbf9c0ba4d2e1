"""FedDST (Bibikar et al., AAAI 2022, arXiv 2112.09824): clients rewire, the server votes and prunes back.

Every `period` rounds each client drops the smallest fraction of its active weights and grows as many
connections where its own gradient is largest; the server averages each weight over the clients that hold
it and prunes the union to the budget.

Fidelity: `variant = "paper"` is what the method means. Growth happens after epoch E-1 of E (our reading), so
that new weights are trained before the server prunes; it never hits active weights; ties prefer active
weights; the fraction is annealed; clients are weighted by samples. `variant = "released"` of both parts is
what the code (bibikar/feddst) does: α stays constant and the cosine only ends it; clients rewire after
their last epoch, so that new weights arrive as zeros and are pruned at once; growth may pick active weights
and erases them; active zeros tie with masked ones, so that the density leaks below the budget; a dense
network is rewired too ("FedAvg" of the code's README). Its clients weigh 2·ceil(n/B): `batch_size`.

It samples clients with replacement: `federation.replacement`. No hook can express the rest: the engine
averages buffers by samples; the code's gate by a client's own count of epochs is that of E = 10 (for other
E we follow the fork of PFFDST, which always takes the last epoch; that fork anneals α). Its ties are broken
arbitrarily, ours by position; where the code would skip the server's pruning and leave a layer above its
budget, ours prunes; and a layer whose budget comes out below 1, which the code leaves dense, keeps one
weight. FedDST's rows in PFFDST's tables come from that fork's code; which code the abstract's figures come
from is not established (the small nets have a second softmax: `task.model.double_softmax`).
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

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

    grows: ClassVar[bool] = True
    budget_promise: ClassVar[Literal["at most"]] = "at most"  # exact but for the released variant
    site: ClassVar[Literal["client"]] = "client"

    variant: Literal["paper", "released"] = Field(
        "paper",
        description="'released': constant α, after the last epoch, growth can erase weights, density leaks",
    )
    ratio: float = Field(
        0.01, ge=0, le=1, description="α: fraction of the active weights replaced at a readjustment"
    )
    period: int = Field(15, ge=1, description="ΔR: rounds between readjustments")
    annealing: Literal["cosine", "constant"] = Field(
        "cosine", description="how the fraction decays; 'constant' readjusts to the end of the run"
    )
    starts: tuple[Annotated[float, Field(ge=0, lt=1)], ...] = Field(
        (0.0,), description="where cycles of annealing start, as fractions of the rounds in [0, 1)"
    )
    end: float = Field(0.5, gt=0, le=1, description="R_end: a cycle ends after this fraction of the rounds")
    final_sparsity: float | None = Field(
        None, ge=0, lt=1, description="S_fin: sparsity reached linearly at `end`; unset keeps the target"
    )
    score_batches: int = Field(1, ge=1, description="minibatches behind the growth gradient")

    def since(self, clock: Clock) -> int:
        """Rounds since the latest cycle started, t - t₀; 0 before the first one."""
        started = [t for start in self.starts if (t := share(clock.rounds, start)) <= clock.round]
        return clock.round - max(started, default=clock.round)

    def decayed(self, clock: Clock) -> float:
        """r_t = DECAY(t - t₀, α, R_end)."""
        if self.annealing == "constant":
            return self.ratio
        return cosine_decay(self.since(clock), self.ratio, share(clock.rounds, self.end))

    def fraction(self, clock: Clock) -> float:
        """Of the active weights, replaced now."""
        return self.decayed(clock) if self.variant == "paper" else self.ratio

    @hookimpl
    def target_sparsity(self, base: float, clock: Clock) -> float:
        if self.final_sparsity is None:
            return base
        end = max(1, share(clock.rounds, self.end))
        return base + (self.final_sparsity - base) * min(clock.round / end, 1)

    @hookimpl
    def due(self, clock: Clock, budget: Budget) -> bool:
        paper, since = self.variant == "paper", self.since(clock)
        if paper and budget.sparsity == 0:
            return False  # a dense network has nowhere to grow
        in_round = since > 0 and (since - 1) % self.period == 0 and self.decayed(clock) > 0
        return in_round and clock.epoch == clock.epochs - paper

    @hookimpl
    def grow_score(self, dense_grad: Params) -> Scores:
        return {name: gradient.abs() for name, gradient in dense_grad.items()}

    @hookimpl
    def readjust(
        self, params: Params, mask: Masks, frozen: Masks, score: Scores, budget: Budget, clock: Clock
    ) -> Readjusted:
        paper = self.variant == "paper"
        prune = masks.prune_smallest if paper else masks.prune_smallest_tied
        sparser = budget.at(budget.sparsity + (1 - budget.sparsity) * self.fraction(clock))
        kept = prune(params, mask, sparser, frozen)
        kept = prune(params, kept, budget, frozen)  # rounding can favour a layer at `sparser`
        params = masks.apply(params, kept)
        if paper:
            return Readjusted(params, masks.grow_largest(kept, score, budget), {})
        free = {name: s.masked_fill(frozen[name], -math.inf) for name, s in score.items()}
        grown = masks.largest_lacking(kept, free, budget)
        erased = {name: torch.where(grown[name], 0.0, params[name]) for name in mask}
        return Readjusted(params | erased, {name: kept[name] | grown[name] for name in mask}, {})


class MaskedMean(Part):
    """Each weight's mean over the clients that hold it, weighted, pruned back to the budget."""

    linear: ClassVar[bool] = True

    variant: Literal["paper", "released"] = Field(
        "paper", description="'released': weights that are exactly 0 tie with pruned ones; the density leaks"
    )
    min_votes: float = Field(
        0, ge=0, description="weights held by clients with this weight together, or less, are dropped"
    )
    batch_size: int | None = Field(
        None,
        ge=1,
        description="weigh clients by 2·ceil(n/B) as the released code does: its B, that of the federation; "
        "unset weighs them by their n samples",
    )

    @hookimpl
    def contribute(self, params: Params, mask: Masks, weight: Tensor, moved: bool) -> Sums:
        if self.batch_size is not None:
            weight = 2 * torch.ceil(weight / self.batch_size)
        votes = {f"votes/{name}": weight * m for name, m in mask.items()} if moved else {}
        return {**{name: weight * p for name, p in params.items()}, **votes, "weight": weight}

    @hookimpl
    def aggregate(
        self, sums: Sums, params: Params, mask: Masks, frozen: Masks, budget: Budget, memory: Memory
    ) -> Aggregated:
        mean, union = {}, {}
        for name in params:
            if name in mask:
                votes = sums.get(f"votes/{name}", sums["weight"] * mask[name])
                union[name] = (votes > self.min_votes) | frozen[name]
                mean[name] = torch.where(union[name], sums[name] / votes, 0.0)
            else:
                mean[name] = sums[name] / sums["weight"]
        if self.variant == "paper":
            kept = masks.prune_smallest(mean, union, budget, frozen)
        elif self.too_dense(params, union, budget):
            kept = masks.prune_smallest_tied(mean, union, budget, frozen)
        else:
            kept = union
        return Aggregated(masks.apply(mean, kept), kept, memory)

    def too_dense(self, params: Params, union: Masks, budget: Budget) -> bool:
        """Whether the released code prunes: in its density every tensor named weight counts, scales too."""
        scales = sum(p.numel() for name, p in params.items() if name.endswith("weight") and name not in union)
        held = sum(masks.active(union).values()) + scales
        return 1 - held / (budget.weights + scales) < budget.sparsity or not masks.within(union, budget)


class CodeCost(Part):
    """Bytes as the released code counts them: 32 bits a value and bias, masks 1 bit a weight.

    A mask that a client sends back costs 1 bit an active weight.
    With its flag for a new mask mended: it compares with what was just overwritten, and so is never set.
    """

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
