"""RigL (Evci et al., ICML 2020, arXiv 1911.11134), run federated: grows where the gradient is largest.

From a random ERK network, every `period` rounds each layer drops the fraction f(t) = α/2·(1+cos(πt/T_end))
of its weights, the smallest, and grows as many connections where the magnitude of the gradient is largest;
grown weights start at 0.

Fidelity: the paper's algorithm 1 and its α = 0.3, T_end = 3/4 of the training; nothing happens at t = 0. Our
reading: t counts rounds, and 5 of them stand for ΔT = 100 steps; by default the server rewires after
aggregation, by the magnitude of the clients' mean gradient on a minibatch each (the mean before the
magnitude: the gradient of the federation's loss); a connection that is dropped and grown at once restarts
at 0, where the released code keeps its value. With site "client" each client rewires by its own gradient
before its last epoch, which is FedDST's rewiring but for the fraction, there of the allocation's shift to a
sparser budget and here of each layer, and for the defaults.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from ..core import masks, rewiring
from ..core.budget import Budget
from ..core.hookspecs import hookimpl
from ..core.method import Method
from ..core.part import Part
from ..core.schedule import cosine_decay, share
from ..core.state import Clock, Masks, Params, Readjusted, Scores
from .feddst import MaskedMean
from .random import RandomMask


class Rig(Part):
    """Drops the smallest weights and grows where the gradient is largest."""

    grows: ClassVar[bool] = True
    budget_promise: ClassVar[Literal["exact"]] = "exact"

    site: Literal["server:end", "client"] = Field("server:end", description="who rewires, by whose gradient")
    fraction: float = Field(0.3, ge=0, le=1, description="α: part of a layer's weights replaced, at first")
    period: int = Field(5, ge=1, description="ΔT: rounds between rewirings")
    end: float = Field(0.75, gt=0, le=1, description="T_end: rewiring ends after this fraction of the rounds")
    score_batches: int = Field(1, ge=1, description="minibatches behind each client's gradient")

    def dropped(self, clock: Clock) -> float:
        """f_decay(t; α, T_end)."""
        done = rewiring.rounds_done(clock, self.site)
        return cosine_decay(done, self.fraction, share(clock.rounds, self.end))

    @hookimpl
    def due(self, clock: Clock, budget: Budget) -> bool:
        return self.dropped(clock) > 0 and rewiring.due(clock, self.site, self.period, budget)

    @hookimpl
    def grow_score(self, dense_grad: Params) -> Scores:
        return dense_grad  # signed: the magnitude is taken of the clients' mean

    @hookimpl
    def readjust(
        self, params: Params, mask: Masks, frozen: Masks, score: Scores, budget: Budget, clock: Clock
    ) -> Readjusted:
        kept = rewiring.keep_largest(params, mask, frozen, budget, self.dropped(clock))
        grown = masks.grow_largest(kept, {name: g.abs() for name, g in score.items()}, budget)
        return Readjusted(masks.apply(params, kept), grown, {})


METHOD = Method(
    "rigl",
    mask_init=RandomMask(),
    readjust=Rig(),
    aggregate=MaskedMean(),
    paper="Evci et al., Rigging the Lottery: Making All Tickets Winners, ICML 2020",
)
