"""FLASH (Babakniya et al., TMLR 2023): clients find how dense each layer should be, then agree on one mask.

Stage 1, the first `warmup` rounds: every sampled client starts from the same weights under the same random
mask; after each local epoch e of E it drops the smallest fraction p·(1 - e/E) of every layer and draws as
many new connections at random, more of them in layers of large mean |w|. The server averages the clients'
layer densities d_l, scales them to the target, min(1, c·d_l), draws a random mask of these densities and
initialises the weights again. Stage 2: "spdst" trains that mask; in "jmwst", every `period` rounds, clients
adapt again, and the server takes d_l anew and keeps each layer's largest averaged weights.

Fidelity: the released code of FLASH (method document of SparsyFed, appendix A). Its growth leaves a client
somewhat above or below the target and its random masks are Bernoulli draws; here every count is exact: growth
is weighted sampling without replacement over the whole network, and densities are rounded by Sainte-Laguë's
divisors, which give what the cap at 1 cuts off to the other layers. Layer counts are the clients' decision:
the preset allocates the budget "global"ly, under another rule only the total is kept after stage 1. Our
reading: rounds have as many epochs as the run has (the code: 10 in stage 1), and more warm-up rounds sample
more clients; with one epoch, clients adapt after it at p/2 (the code: in its middle). Hooks hold no
initialiser: weights are redrawn from the layer's own initial values, other parameters go back to theirs,
running statistics stay. Clients' weights are averaged by samples, their densities are not.
Variant "sparsyfed" is FLASH as SparsyFed's authors ran it, with `mask_init` and `readjust` of topk: a dense
round with Top-K at its end, densities averaged by samples, the largest averaged weights of each layer, which
keep their values. Two of its quirks are not here: only prunable weights are masked (9.15: BatchNorm offsets
and biases froze at 0), and densities are corrected to the real target (9.16: it was truncated to an integer).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..core import masks, rng
from ..core.budget import Budget
from ..core.hookspecs import hookimpl
from ..core.method import Method
from ..core.part import Part
from ..core.state import Aggregated, Clock, Masks, Memory, Params, Readjusted, Scores, Sums
from .random import RandomMask


class AdaptDensities(Part):
    """Clients drop each layer's smallest weights and grow at random where weights are large."""

    grows: ClassVar[bool] = True
    agrees: ClassVar[dict[str, tuple[str, ...]]] = {"aggregate": ("warmup",)}
    budget_promise: ClassVar[Literal["none"]] = "none"  # the total is exact; the layers' shares move
    site: ClassVar[Literal["client"]] = "client"

    variant: Literal["spdst", "jmwst"] = Field(
        "spdst", description="clients adapt in stage 1 only, or in stage 2 as well"
    )
    warmup: int = Field(1, ge=1, description="rounds of stage 1; the same as aggregate's")
    period: int = Field(1, ge=1, description="r: rounds between adaptations in stage 2 of jmwst")
    ratio: float = Field(
        0.25, ge=0, le=1, description="p: fraction of a layer dropped, falling to 0 linearly"
    )

    @hookimpl
    def due(self, clock: Clock, budget: Budget) -> bool:
        if budget.sparsity == 0:
            return False  # a dense network has nowhere to grow
        in_round = clock.round < self.warmup or (
            self.variant == "jmwst" and (clock.round - self.warmup) % self.period == 0
        )
        return in_round and (0 < clock.epoch < clock.epochs or clock.epoch == clock.epochs == 1)

    @hookimpl
    def readjust(
        self, params: Params, mask: Masks, frozen: Masks, budget: Budget, clock: Clock, key: Tensor
    ) -> Readjusted:
        rate = self.ratio * (0.5 if clock.epochs == 1 else 1 - clock.epoch / clock.epochs)
        draws, kept, score = masks.random_scores(mask, key), {}, {}
        for name, active in mask.items():
            movable, magnitude = active & ~frozen[name], params[name].abs()
            order = masks.rank(torch.where(movable, -magnitude, -math.inf))
            dropped = (rate * active.sum().double() - 1e-9).ceil()  # forgives the last bit of fractions
            kept[name] = active & ~(movable & (order < dropped))
            mean = torch.where(active, magnitude, 0).sum() / active.sum().clamp(min=1)
            # the largest log(u)/w of all positions: a sample without replacement with weights w
            score[name] = draws[name].log() * (~kept[name]).sum() / mean.double()
        grown = masks.grow_largest(kept, score, anywhere(budget))
        grown = {name: kept[name] | entries for name, entries in grown.items()}
        return Readjusted(masks.apply(params, kept), grown, {})


class Consensus(Part):
    """Weighted mean; whenever clients moved their masks, one new mask of their mean layer densities."""

    budget_promise: ClassVar[Literal["none"]] = "none"  # the total is exact; the layers' shares are learnt

    variant: Literal["original", "sparsyfed"] = Field(
        "original", description="how stage 1 ends: a random mask and fresh weights, or the largest averages"
    )
    warmup: int = Field(
        1, ge=1, description="rounds of stage 1 of the original; more rounds sample more clients"
    )

    @hookimpl
    def contribute(self, params: Params, mask: Masks, weight: Tensor) -> Sums:
        vote = weight if self.variant == "sparsyfed" else torch.ones_like(weight)
        held = {f"held/{name}": vote * m for name, m in mask.items()}
        return {**{name: weight * p for name, p in params.items()}, **held, "weight": weight, "votes": vote}

    @hookimpl
    def aggregate(
        self,
        sums: Sums,
        params: Params,
        mask: Masks,
        frozen: Masks,
        budget: Budget,
        key: Tensor,
        memory: Memory,
    ) -> Aggregated:
        if self.variant == "sparsyfed":
            budget = masks.network(budget)  # what its clients keep, to the unit
        mean = {name: sums[name] / sums["weight"] for name in params}
        moved = torch.stack([(sums[f"held/{n}"] != sums["votes"] * m).any() for n, m in mask.items()]).any()
        density = {name: sums[f"held/{name}"].sum(dtype=torch.float64) for name in mask}
        played = memory.get("played", 0) + 1
        if self.variant == "original" and played <= self.warmup:
            density = {name: d + memory.get("density", {}).get(name, 0) for name, d in density.items()}
            if played < self.warmup:
                return Aggregated(params, mask, {"played": played, "density": density})
            drawn = agreed(density, masks.random_scores(mask, rng.fold(key, "mask")), frozen, budget)
            return Aggregated(redrawn(params, mask, drawn, key), drawn, {"played": played})
        if moved:
            mask = agreed(density, {name: mean[name].abs() for name in mask}, frozen, budget)
        mask = masks.prune_smallest(mean, mask, anywhere(budget), frozen)  # when a server part overfilled it
        return Aggregated(masks.apply(mean, mask), mask, {"played": played})


def agreed(density: Params, score: Scores, frozen: Masks, budget: Budget) -> Masks:
    """Exactly the budget's total, shared among layers in proportion to `density`, the best of each by score.

    Sainte-Laguë: the k-th best of a layer ranks by d/(k - 1/2); a full layer has no more to give.
    """
    claims = {}
    for name, layer in score.items():
        protected = layer.masked_fill(frozen[name], math.inf)
        claims[name] = (density[name] / (masks.rank(protected) + 0.5)).masked_fill(frozen[name], math.inf)
    return masks.by_budget(claims, anywhere(budget))


def anywhere(budget: Budget) -> Budget:
    """The budget's total, wherever in the network."""
    return replace(budget, allocation="global", sparsity=1 - budget.total / budget.weights)


def redrawn(params: Params, mask: Masks, drawn: Masks, stream: Tensor) -> Params:
    """Weights on the mask `drawn`, each a random one of the layer's initial values on `mask`."""
    fresh = dict(params)
    for name, active in mask.items():
        values = params[name][active] if active.any() else params[name].flatten()
        index = rng.bits(rng.fold(stream, "weights", name), active.shape) % len(values)
        fresh[name] = torch.where(drawn[name], values[index], 0.0)
    return fresh


METHOD = Method(
    "flash",
    mask_init=RandomMask(),
    readjust=AdaptDensities(),
    aggregate=Consensus(),
    paper="Babakniya et al., Revisiting Sparsity Hunting in Federated Learning: Why does Sparsity Consensus "
    "Matter?, TMLR 2023",
)
