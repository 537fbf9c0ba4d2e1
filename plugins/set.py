"""SET (Mocanu et al., Nature Communications 2018, arXiv 1707.04780), run federated: random rewiring.

From a random Erdős–Rényi network, every `period` rounds the fraction ζ of each layer's weights that are
closest to zero is removed, and as many connections are drawn at random; not after the last round.

Fidelity: the paper's algorithm 1. Our reading: 5 rounds stand for its epoch (with a fifth of the clients
in each, a pass over all data); the server rewires at the start of a round, so that all clients share a mask
and what is evaluated has been trained (site "client": each client draws its own connections before its
last local epoch; the server averages each weight over its holders and prunes the union by magnitude);
"closest to zero" is by magnitude, where the paper takes ζ of the positive and ζ of the negative weights;
new weights start at 0, where it draws them. A connection just removed may be drawn again, as a new one.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from ..core import masks, rewiring
from ..core.budget import Budget
from ..core.hookspecs import hookimpl
from ..core.method import Method
from ..core.part import Part
from ..core.state import Clock, Masks, Params, Readjusted
from .feddst import MaskedMean
from .random import RandomMask


class Evolve(Part):
    """Removes the smallest weights and draws as many connections at random."""

    grows: ClassVar[bool] = True
    budget_promise: ClassVar[Literal["exact"]] = "exact"

    site: Literal["server:start", "client"] = Field("server:start", description="who rewires")
    fraction: float = Field(0.3, ge=0, le=1, description="ζ: part of a layer's weights that is replaced")
    period: int = Field(5, ge=1, description="rounds between rewirings")

    @hookimpl
    def due(self, clock: Clock, budget: Budget) -> bool:
        return rewiring.due(clock, self.site, self.period, budget)

    @hookimpl
    def readjust(self, params: Params, mask: Masks, frozen: Masks, budget: Budget, key: Tensor) -> Readjusted:
        kept = rewiring.keep_largest(params, mask, frozen, budget, self.fraction)
        grown = masks.grow_largest(kept, masks.random_scores(mask, key), budget)
        return Readjusted(masks.apply(params, kept), grown, {})


METHOD = Method(
    "set",
    mask_init=RandomMask(),
    readjust=Evolve(),
    aggregate=MaskedMean(),
    paper="Mocanu et al., Scalable training of artificial neural networks with adaptive sparse connectivity "
    "inspired by network science, Nature Communications 2018",
)
