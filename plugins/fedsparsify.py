"""FedSparsify (Stripelis et al., arXiv 2204.12430): magnitude pruning, a little stricter every round.

Training starts dense. The sparsity s_t of round t = 1..T follows a polynomial from `initial` to the target
on the last round, steep at first; a weight that is gone never returns. FedSparsify-Global averages and
then prunes the average on the server (`site = "server:end"`): purge, merge, tune in the next round.
FedSparsify-Local prunes every client's model after its last epoch (`site = "client"`), and the server keeps
what enough clients kept (`MajorityVote`). When all masks agree, as they do in Global, that vote is FedAvg's
mean. OneShot, their baseline, is `initial` = sparsity.target with `start` = 90.

Fidelity: schedule, gate, threshold, vote and kept momentum are those of the authors' code (its states of
2022, which ran the experiments); the text of the paper was not available. One threshold ranks every
trainable tensor, biases and normalisation included, so the preset sets sparsity.prunable = "all" and
allocation = "global". N - int(s·N) weights stay (a budget rounds, which can be one fewer), and all that tie
with the smallest of them. `variant` of the vote: "paper" keeps what at least half of the clients kept, our
reading of a majority; "released" asks for floor(n/2), a minority for odd n. All published settings have n =
10 or 8, where both are the same. Our reading, too: until `start` the mask is full, and it becomes supp(w)
only at a purge (the code's supp(w) of the first weights would freeze biases that start at 0); a mean that
cancels to exactly 0 stays in the mask until the next purge; under another allocation than "global" each
layer is pruned to its own budget. The purged model is broadcast, where the code sends the average and purges
it again on the client. In Local the momentum of what a client purged restarts at 0, also where the vote
keeps the weight (the code's stays). Only the code's VGG-16 has Nesterov momentum: `nesterov` is off by
default. Left out: fine-tuning after a local purge (off by default and broken in the code), the geometric
schedule of an early state.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..core import masks, optim
from ..core.budget import Budget
from ..core.errors import ConfigError, Problem
from ..core.hookspecs import hookimpl
from ..core.loss import ClientLoss
from ..core.method import Method
from ..core.part import Part
from ..core.state import Aggregated, Batch, Carry, Clock, Masks, Memory, Params, Readjusted, Stepped, Sums
from .fedavg import WeightedMean
from .topk import FullMask


class PersistentSgd(Part):
    """FedAvg's step with a momentum that each client keeps between its rounds."""

    keep_momentum: bool = Field(
        True, description="a client's momentum goes on where its last round ended; false restarts it at zero"
    )
    nesterov: bool = Field(
        False, description="step by g + μv instead of v (Nesterov); no effect without federation.momentum"
    )

    @hookimpl
    def client_init(self, params: Params, momentum: float, memory: Memory) -> dict[str, Params]:
        return {"momentum": memory.get("momentum", optim.zeros(params))} if momentum else {}

    @hookimpl
    def local_step(
        self,
        loss: ClientLoss,
        params: Params,
        carry: Carry,
        batch: Batch,
        trainable: Masks,
        lr: float,
        momentum: float,
        weight_decay: float,
    ) -> Stepped:
        value, grads, carry = loss.value_and_grad(params, carry, batch)
        params, state = optim.sgd(
            params, grads, carry.state, trainable, lr, momentum, weight_decay, self.nesterov
        )
        return Stepped(params, Carry(carry.buffers, state), {"loss": value})

    @hookimpl
    def client_final(self, params: Params, carry: Carry) -> Memory:
        # none for weights that are gone: one that a swapped part grows again starts afresh
        kept = {
            kind: {name: torch.where(params[name] != 0, v, 0.0) for name, v in entries.items()}
            for kind, entries in carry.state.items()
        }
        return dict(kept) if self.keep_momentum else {}


class ProgressivePurge(Part):
    """The smallest weights of the whole network go, up to the sparsity that the round's schedule sets."""

    budget_promise: ClassVar[Literal["none"]] = "none"  # N - int(s·N) weights and ties; budgets round

    site: Literal["server:end", "client"] = Field(
        "server:end", description="'server:end' prunes the average (Global), 'client' each upload (Local)"
    )
    initial: float = Field(0.0, ge=0, lt=1, description="S_0: sparsity that the schedule starts from")
    start: int = Field(
        1, ge=0, description="t_0: rounds that train dense, less than federation.rounds; 1 or more is advised"
    )
    frequency: int = Field(
        1,
        ge=1,
        description="F: rounds between steps; the target is reached if it divides the rounds",
    )
    exponent: float = Field(3.0, gt=0, description="e: 1 sparsifies evenly, larger ones earlier")

    def scheduled(self, final: float, t: int, rounds: int) -> float:
        """s_t = S_T + (S_0 - S_T)·(1 - (F·⌊t/F⌋ - t_0) / (T - t_0))^e."""
        left = 1 - (self.frequency * (t // self.frequency) - self.start) / (rounds - self.start)
        return float(final + (self.initial - final) * left**self.exponent)

    @hookimpl
    def target_sparsity(self, base: float, clock: Clock) -> float:
        if self.start >= clock.rounds:
            message = f"given {self.start}, but federation.rounds is {clock.rounds}; use less, or more rounds"
            raise ConfigError([Problem("method.readjust.start", message)])
        if self.frequency * (clock.rounds // self.frequency) <= self.start and self.initial < base:
            message = f"given {self.frequency}, so that no step comes before the end of {clock.rounds} rounds"
            raise ConfigError([Problem("method.readjust.frequency", message)])
        if self.initial > base:
            message = f"given {self.initial:g}, above the final sparsity {base:g} (sparsity.target)"
            raise ConfigError([Problem("method.readjust.initial", message)])
        t = clock.round + 1  # rounds count from 1 here
        return max(self.scheduled(base, t, clock.rounds), 0.0) if t > self.start else 0.0

    @hookimpl
    def due(self, clock: Clock, budget: Budget) -> bool:
        return budget.sparsity > 0 and (self.site == "server:end" or clock.epoch == clock.epochs)

    @hookimpl
    def readjust(
        self, params: Params, mask: Masks, frozen: Masks, budget: Budget, memory: Memory
    ) -> Readjusted:
        if budget.counts is None:
            count = budget.weights - int(budget.sparsity * budget.weights)
            kept = masks.largest_with_ties(params, mask, count, frozen)
            kept = {name: m & ((params[name] != 0) | frozen[name]) for name, m in kept.items()}
        else:
            kept = masks.prune_smallest(params, mask, budget, frozen)
        return Readjusted(masks.apply(params, kept), kept, memory)


class MajorityVote(Part):
    """The sample-weighted mean, zeros counted, of the weights that enough clients kept; nothing is pruned.

    Clients count one vote each, whatever their samples.
    """

    budget_promise: ClassVar[Literal["none"]] = "none"  # clients that disagree leave more than one of them

    variant: Literal["paper", "released"] = Field(
        "paper", description="votes needed of n clients: 'paper' half of them, 'released' floor(n/2), or one"
    )

    @hookimpl
    def contribute(self, params: Params, mask: Masks, weight: Tensor) -> Sums:
        return {
            **WeightedMean().contribute(params, mask, weight, moved=True),
            "clients": torch.ones_like(weight),
        }

    @hookimpl
    def aggregate(self, sums: Sums, params: Params, mask: Masks, memory: Memory) -> Aggregated:
        half = sums["clients"] / 2
        needed = half if self.variant == "paper" else half.floor().clamp(min=1)
        kept = {name: sums[f"held/{name}"] >= needed for name in mask}
        mean = {name: sums[name] / sums["weight"] for name in params}
        return Aggregated(masks.apply(mean, kept), kept, memory)


METHOD = Method(
    "fedsparsify",
    mask_init=FullMask(),
    local_step=PersistentSgd(),
    readjust=ProgressivePurge(),
    aggregate=MajorityVote(),
    paper="Stripelis et al., Federated Progressive Sparsification (Purge, Merge, Tune)+, arXiv 2204.12430",
)
