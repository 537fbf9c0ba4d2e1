"""PruneFL (Jiang et al., TNNLS 2022, arXiv 1909.12326): the server reconfigures by importance over time.

A set of weights M lowers the loss by about Δ(M) = Σ g² and takes the time T(M) = c + Σ t. To maximise Δ/T,
a reconfiguration adds weights in the order of g²/t, where t is the time that a weight of a layer costs. It
does so every `period` rounds with the clients' squared gradients, dense. Only the prunable set is up for
choice: weights that are inactive, and the smallest 30 % of the active ones, a share that decays over the run.

Fidelity: importance, prunable set and its decay (0.3·0.5^(t/half-life), a half-life of the whole run, every
50 rounds) are those of the authors' code, but that it takes the smallest of each layer, and under "global"
allocation we take those of the network. Our reading, by design: the user's budget decides how many
weights there are, where the paper adds until g²/t falls below Δ/T and so chooses a size of its own; only the
ranking by g²/t is left of that rule, and under other allocations than "global" (the preset) time cancels.
Measured times are not portable and neither times nor MACs reach the hook: without `times` every weight
costs 1, as if communication, the same for every weight, were all (`fedsparse` counts MACs in its ledger).
g² is of a client's last minibatches in the round, averaged by samples; the released code accumulates it
over all steps since the last reconfiguration. The initial stage, in which one client trains and prunes by
itself, cannot be expressed; in its place the first mask ranks by g²/t on a sample of the pooled training
data, everything being prunable. A prunable weight that is chosen again keeps its value.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from ..core import masks, rewiring
from ..core.budget import Budget
from ..core.hookspecs import hookimpl
from ..core.loss import Probe
from ..core.method import Method
from ..core.part import Part
from ..core.state import Clock, Masks, Params, Readjusted, Scores

Times = tuple[Annotated[float, Field(gt=0)], ...]
TIMES = Field(
    (), description="t: relative time per active weight, for each prunable layer in order; empty is 1"
)


def check(times: Times, budget: Budget) -> None:
    """Raises ValueError unless there is one time a layer, or none."""
    if times and len(times) != len(budget.layers):
        raise ValueError(f"times has {len(times)} entries for {len(budget.layers)} prunable layers")


def importance(squares: Scores, times: Times, budget: Budget) -> Scores:
    """g²/t, with one t a layer."""
    check(times, budget)
    costs = times or (1.0,) * len(budget.layers)
    return {layer.name: squares[layer.name] / t for layer, t in zip(budget.layers, costs, strict=True)}


class InitialImportance(Part):
    """Keeps the weights with the largest squared gradient over time at initialisation."""

    budget_promise: ClassVar[Literal["exact"]] = "exact"

    times: Times = TIMES

    @hookimpl
    def mask_init(self, params: Params, budget: Budget, probe: Probe) -> Masks:
        gradient = probe.gradient(probe.of.weights(params, masks.full(params, budget)))
        squares = {layer.name: gradient[layer.name].square() for layer in budget.layers}
        return masks.by_budget(importance(squares, self.times, budget), budget)


class Reconfigure(Part):
    """Chooses among inactive and small weights those with the largest squared gradient over time."""

    grows: ClassVar[bool] = True
    budget_promise: ClassVar[Literal["exact"]] = "exact"
    site: ClassVar[Literal["server:end"]] = "server:end"

    period: int = Field(50, ge=1, description="rounds between reconfigurations")
    prunable: float = Field(
        0.3, ge=0, le=1, description="share of the active weights, the smallest, up for choice in round 0"
    )
    half_life: float = Field(1.0, gt=0, description="the share halves in this fraction of the rounds")
    times: Times = TIMES
    score_batches: int = Field(1, ge=1, description="minibatches behind each client's gradient")

    @hookimpl
    def due(self, clock: Clock, budget: Budget) -> bool:
        check(self.times, budget)  # in round 0, not in the first that is due
        return rewiring.due(clock, self.site, self.period, budget)

    @hookimpl
    def grow_score(self, dense_grad: Params) -> Scores:
        return {name: gradient.square() for name, gradient in dense_grad.items()}

    @hookimpl
    def readjust(
        self, params: Params, mask: Masks, frozen: Masks, score: Scores, budget: Budget, clock: Clock
    ) -> Readjusted:
        share = self.prunable * 0.5 ** (clock.round / (self.half_life * clock.rounds))
        kept = rewiring.keep_largest(params, mask, frozen, budget, share)
        chosen = masks.grow_largest(kept, importance(score, self.times, budget), budget)
        return Readjusted(masks.apply(params, chosen), chosen, {})


METHOD = Method(
    "prunefl",
    mask_init=InitialImportance(),
    readjust=Reconfigure(),
    paper="Jiang et al., Model Pruning Enables Efficient Federated Learning on Edge Devices, TNNLS 2022",
)
