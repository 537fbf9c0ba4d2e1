"""PFFDST (AAAI 2025, doi 10.1609/aaai.v39i17.34019): freeze half of the network, rewire on the server.

Half A trains a network of half the target density, s1 = (1+s)/2. At mid-run its weights are frozen for good,
random connections are added up to the target s2 = s, and half B trains only those. At the start of each
half is a window in which the server, every `period` rounds, drops the smallest weights and draws as many new
ones at random; in it the network is denser by the differential sparsity f, pruned when the window closes.

Fidelity: `variant = "paper"` is the schedule of paper and appendix, whose budgets the published tables 4 and
5 fit (windows of R/8 in both halves). A window closes by pruning to the nominal budget, never below it (our
reading). `variant = "released"` of ServerReadjust is what the code (Dawns14/pffdst) does with both flags of
its README: one window of R/4, and half B stays f denser than the target to the end, density 1.25·(1-s); a
window that ends between two readjustments closes by the round's pruning alone. That of MaskedMean adds the
code's ties: new weights that are still 0 are switched off, and the density leaks. The code's `--sparsity` is
s1, not the target: its README's 0.95 is `sparsity.target` = 2·0.95 - 1 = 0.9. The README's command lines are
"released"; which schedule the published accuracies come from is not established.

`variant = "released"` of FreezeHalf freezes the network of the best *test* accuracy so far, all of its mask,
and rolls the run back to it; one that was best inside the window is denser than half A, and so is what
follows. Test data then decide on training: use it to repeat the code, not to compare methods. The paper does
not say which network it freezes; "paper" takes the current one. The code samples clients with replacement:
`federation.replacement`. It evaluates rounds 0, 10, 20, …, right after a readjustment, a run of ours the
rounds before those. f·n is not truncated in floating point (38,399 for 38,400 in the code), and no client is
weighted by batches unless `aggregate.batch_size` says so.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..core import masks
from ..core.budget import Budget
from ..core.errors import RunError
from ..core.hookspecs import hookimpl
from ..core.ledger import Traffic
from ..core.method import Method
from ..core.part import Part
from ..core.schedule import share
from ..core.state import Best, Clock, Frozen, Masks, Memory, Params, Readjusted
from .feddst import MaskedMean


class FreezeHalf(Part):
    """Trains at half the target density, then freezes that network and grows to the target."""

    grows: ClassVar[bool] = True
    budget_promise: ClassVar[Literal["none"]] = "none"  # growth is uniform; the round's pruning reconciles

    variant: Literal["paper", "released"] = Field(
        "paper",
        description="'released': goes back to the network of best test accuracy and freezes all of it",
    )
    at: float = Field(
        0.5,
        gt=0,
        lt=1,
        description="T_F: freezes after this fraction of the rounds; keep it behind readjust's first window "
        "and at the start of its second",
    )
    freeze_scales: bool = Field(
        True, description="also freeze the scales of normalisation layers, as the released code does"
    )

    @hookimpl
    def base_sparsity(self, target: float, clock: Clock) -> float:
        return (1 + target) / 2 if clock.round < self.freeze_round(clock) else target

    def freeze_round(self, clock: Clock) -> int:
        """T_F, in 1..R."""
        return max(1, share(clock.rounds, self.at))

    @hookimpl
    def freeze(
        self,
        params: Params,
        mask: Masks,
        target: float,
        budget: Budget,
        clock: Clock,
        key: Tensor,
        memory: Memory,
        best: Best | None,
    ) -> Frozen | None:
        if clock.round != self.freeze_round(clock):
            return None
        buffers = None
        if self.variant == "released":
            if best is None:
                raise RunError(
                    f"no evaluation before round {clock.round}, in which the best network is to be frozen; "
                    'evaluate earlier by output.evaluate_every, or set method.freeze_policy.variant = "paper"'
                )
            params, mask, buffers = best.params, best.mask, best.buffers
            frozen = dict(mask)
        else:  # the network of half A; a swapped readjustment can have left the mask denser than that
            frozen = dict(masks.prune_smallest(params, mask, budget.at((1 + target) / 2)))
        if self.freeze_scales:
            scales = [n for n, p in params.items() if n.endswith("weight") and n not in mask and p.dim() == 1]
            frozen |= {name: torch.ones_like(params[name], dtype=torch.bool) for name in scales}
        half_a = (1 - target) / 2
        grown = {layer.name: share(layer.weights, 1 - budget.sparsity - half_a) for layer in budget.layers}
        moved = masks.grow_random(mask, grown, key)
        # under other allocations than "scaled" a uniform growth can miss a layer's final budget
        return Frozen(frozen, masks.fill_random(moved, budget.at(target), key), memory, params, buffers)


class ServerReadjust(Part):
    """The server drops the smallest weights and draws as many at random, inside a window of each half."""

    grows: ClassVar[bool] = True
    budget_promise: ClassVar[Literal["none"]] = "none"  # swaps q weights a layer whatever the count
    site: ClassVar[Literal["server:start"]] = "server:start"

    variant: Literal["paper", "released"] = Field(
        "paper",
        description="'released': the first window is twice as long, the others stay open and swap nothing",
    )
    ratio: float = Field(
        0.5,
        ge=0,
        le=1,
        description="f/(1-s1): differential sparsity over half A's density; the denser part of a window",
    )
    period: int = Field(10, ge=1, description="ΔR: rounds between readjustments")
    starts: tuple[Annotated[float, Field(ge=0, lt=1)], ...] = Field(
        (0.0, 0.5), description="where windows open, as fractions of the rounds in [0, 1)"
    )
    window: float = Field(0.125, ge=0, lt=0.5, description="length of a window, as a fraction of the rounds")

    def differential(self, target: float) -> float:
        """f = ratio·(1-s1) = ratio·(1-s)/2."""
        return self.ratio * (1 - target) / 2

    def windows(self, rounds: int) -> list[tuple[int, int]]:
        """(T_open, T_close) of each window."""
        opens = [share(rounds, start) for start in self.starts]
        if self.variant == "paper":
            return [(opened, opened + share(rounds, self.window)) for opened in opens]
        if not self.window:
            return []
        first = share(rounds, 2 * self.window)
        return [(opened, rounds if index else opened + first) for index, opened in enumerate(opens)]

    @hookimpl
    def target_sparsity(self, base: float, target: float, clock: Clock) -> float:
        inside = any(opened <= clock.round < closed for opened, closed in self.windows(clock.rounds))
        return max(base - self.differential(target), 0.0) if inside else base

    @hookimpl
    def due(self, clock: Clock) -> bool:
        swapping = self.windows(clock.rounds)[: None if self.variant == "paper" else 1]
        inside = any(opened < clock.round < closed for opened, closed in swapping)
        return (inside and clock.round % self.period == 0) or self.closing(clock)

    def closing(self, clock: Clock) -> bool:
        """Whether a window closes in this round: prune, no growth."""
        if self.variant == "released" and clock.round % self.period:
            return False  # the round's pruning does it
        return any(clock.round == closed > opened for opened, closed in self.windows(clock.rounds))

    @hookimpl
    def readjust(
        self,
        params: Params,
        mask: Masks,
        frozen: Masks,
        target: float,
        budget: Budget,
        clock: Clock,
        key: Tensor,
        memory: Memory,
    ) -> Readjusted:
        if self.closing(clock) and self.variant == "paper":
            moved = masks.prune_smallest(params, mask, budget, frozen)
            return Readjusted(masks.apply(params, moved), moved, memory)
        swapped = {layer.name: share(layer.weights, self.differential(target)) for layer in budget.layers}
        kept = masks.drop_smallest(params, mask, frozen, swapped)
        if self.closing(clock):
            return Readjusted(masks.apply(params, kept), kept, memory)
        before, after = masks.active(mask), masks.active(kept)
        dropped = {name: before[name] - after[name] for name in mask}
        params = masks.apply(params, kept)
        return Readjusted(params, masks.grow_random(kept, dropped, key), memory)


class CodeCost(Part):
    """Bytes as the released code counts them: trainable values, biases, 1 bit a weight for a new mask.

    Of masks, a new one costs the bits of its trainable weights down; a client's own, those of all weights
    up. The code takes its nominal share for the frozen weights, and counts BatchNorm's masks as weights.
    """

    @hookimpl
    def paper_bytes(self, traffic: Traffic) -> float:
        values = 32 * (traffic.active - traffic.frozen + traffic.biases)
        download = traffic.mask_changed * (traffic.active - traffic.frozen)
        upload = values + traffic.client_readjusted * traffic.weights
        return (download + (values if traffic.round > 0 else 0) + upload) / 8


METHOD = Method(
    "pffdst",
    freeze_policy=FreezeHalf(),
    readjust=ServerReadjust(),
    aggregate=MaskedMean(),
    extras=(CodeCost(),),
    paper="An Efficient and Accurate Dynamic Sparse Training Framework Based on Parameter-Freezing, AAAI 25",
)
