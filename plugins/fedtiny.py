"""FedTiny (Huang et al., ICDCS 2023, arXiv 2212.01977): a chosen coarse mask, then pruned block by block.

Adaptive batch-normalisation selection: of C masks of the target density, cut from one pretrained network
with different layer densities, the one of lowest loss is taken, after normalisation statistics have adapted
to it on clients' data.
Progressive pruning: every ΔR rounds, up to R_stop, one block of layers is adjusted, from the output to the
input and round again; each layer l of it, with n_l weights, grows the a_t^l = 0.15·(1 + cos(πt/R_stop))·n_l
inactive positions whose mean gradient over the clients is largest, at 0, and prunes as many of its other
weights, those of smallest magnitude.

Fidelity: the paper's equations as its authors' later library and public code restate them, not checked
against its text, with ΔR = 10, R_stop = 100 of 300 rounds and five blocks; that library prunes first, so
that what was just pruned may return at once, and adjusts every layer (`blocks` = 1). Our reading: t counts
rounds of training done, so that the first adjustment ends the ΔR-th round and none ends the last one, after
which nothing could train what it grows; n_l counts active weights; a block is one of `blocks` runs of
consecutive prunable layers, as equal in number as can be. The preset allocates "global"ly, so that layer
densities are free: candidate c multiplies each layer's magnitudes by a random factor and keeps the largest
of the network (c = 0: no factor); under a rule that fixes the layers' counts each weight gets its own factor
instead. The server's sample of the pooled training
data stands for the clients: the loss is taken on it in training mode, in which normalisation uses the
sample's own statistics. Runs start from random weights, at which the lowest loss is that of a network that
says nothing; so a candidate first takes `steps` full-batch gradient steps on the sample, which are forgotten.
Clients send their whole gradient, the paper's only the a_t^l largest entries of the block's layers: the
ledger charges more bytes than the paper, and the mean misses no small entries. Each client's gradient is
weighted by its samples.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from ..core import masks, rewiring, rng
from ..core.budget import Budget
from ..core.hookspecs import hookimpl
from ..core.loss import Probe
from ..core.method import Method
from ..core.part import Part
from ..core.schedule import cosine_decay, share
from ..core.state import Clock, Masks, Memory, Params, Readjusted, Scores


class Adjustments(NamedTuple):
    """When the server adjusts, how much of each layer, and how many blocks take turns."""

    period: int
    stop: float
    ratio: float
    blocks: int = 1

    def fraction(self, clock: Clock) -> float:
        """a_t/n in a round that ends with an adjustment, 0 in others."""
        done = rewiring.rounds_done(clock, "server:end")
        if done % self.period or done >= clock.rounds:
            return 0.0
        return cosine_decay(done, self.ratio, share(clock.rounds, self.stop))


class BestCandidate(Part):
    """Takes the magnitude mask, among some of different layer densities, that has the lowest loss."""

    budget_promise: ClassVar[Literal["exact"]] = "exact"

    candidates: int = Field(10, ge=1, description="C: masks to choose from; 1 is the plain magnitude mask")
    spread: float = Field(
        2.0, ge=1, description="candidates multiply magnitudes by random factors from 1/spread to spread"
    )
    steps: int = Field(5, ge=0, description="gradient steps on the sample before a candidate is scored")
    rate: float = Field(0.1, gt=0, description="learning rate of these steps")

    @hookimpl
    def mask_init(self, params: Params, budget: Budget, probe: Probe, key: Tensor) -> Masks:
        pool = [self.candidate(params, budget, rng.fold(key, c), c) for c in range(self.candidates)]
        losses = torch.stack([self.loss(params, mask, probe) for mask in pool]).nan_to_num(math.inf)
        return pool[int(losses.argmin())]

    def loss(self, params: Params, mask: Masks, probe: Probe) -> Tensor:
        """The sample's loss after a short training of the masked network on it."""
        weights = probe.of.weights(masks.apply(params, mask), mask)
        for _ in range(self.steps):
            gradient = probe.gradient(weights)
            weights = masks.apply({name: w - self.rate * gradient[name] for name, w in weights.items()}, mask)
        return probe.loss(weights)

    def candidate(self, params: Params, budget: Budget, key: Tensor, number: int) -> Masks:
        """One coarsely pruned mask of exactly the budget."""
        scores = {}
        for layer in budget.layers:
            shape = layer.shape if budget.counts else ()
            exponent = 2 * rng.uniform(rng.fold(key, layer.name), shape) - 1
            factor = self.spread**exponent if number else 1.0
            scores[layer.name] = params[layer.name].abs() * factor
        return masks.by_budget(scores, budget)


class Progressive(Part):
    """The server grows by mean gradient and prunes by magnitude, one block of layers at a time."""

    grows: ClassVar[bool] = True
    budget_promise: ClassVar[Literal["none"]] = "none"  # keeps every layer's count, whatever it is
    site: ClassVar[Literal["server:end"]] = "server:end"

    period: int = Field(10, ge=1, description="ΔR: rounds between adjustments")
    stop: float = Field(1 / 3, gt=0, le=1, description="R_stop, as a fraction of the rounds")
    ratio: float = Field(
        0.3, ge=0, le=1, description="a_0/n: fraction of a layer's weights replaced at first"
    )
    blocks: int = Field(5, ge=1, description="blocks, visited from output to input; 1 adjusts every layer")
    score_batches: int = Field(1, ge=1, description="minibatches behind each client's gradient")

    @property
    def adjustments(self) -> Adjustments:
        """What a local step that prepares them must agree on."""
        return Adjustments(self.period, self.stop, self.ratio, self.blocks)

    @hookimpl
    def due(self, clock: Clock, budget: Budget) -> bool:
        return budget.sparsity > 0 and self.adjustments.fraction(clock) > 0

    @hookimpl
    def grow_score(self, dense_grad: Params) -> Scores:
        return dense_grad  # signed: what counts is the mean over clients, not each one's size

    @hookimpl
    def readjust(
        self, params: Params, mask: Masks, frozen: Masks, score: Scores, clock: Clock, memory: Memory
    ) -> Readjusted:
        part = self.adjustments.fraction(clock)
        inactive = masks.active({name: ~active for name, active in mask.items()})
        movable = masks.active({name: active & ~frozen[name] for name, active in mask.items()})
        counts = dict.fromkeys(mask, 0)
        held = masks.active({name: mask[name] for name in self.block(list(mask), clock)})
        counts |= {n: min(share(held[n], part), inactive[n], movable[n]) for n in held}
        kept = masks.drop_smallest(params, mask, frozen, counts)
        moved = {}
        for name, active in mask.items():
            ranked = torch.where(active, -1.0, score[name].abs())
            moved[name] = kept[name] | masks.largest(ranked, counts[name])
        return Readjusted(masks.apply(params, kept), moved, memory)

    def block(self, layers: list[str], clock: Clock) -> list[str]:
        """The layers that are adjusted now."""
        number = min(self.blocks, len(layers))
        at = number - 1 - clock.round // self.period % number  # so many adjustments have been before this one
        return layers[at * len(layers) // number : (at + 1) * len(layers) // number]


METHOD = Method(
    "fedtiny",
    mask_init=BestCandidate(),
    readjust=Progressive(),
    paper="Huang et al., Distributed Pruning Towards Tiny Neural Networks in Federated Learning, ICDCS 2023",
)
