"""Coordinate-wise median (Yin et al., ICML 2018, arXiv 1803.01498): a minority of clients moves nothing far.

Each weight of the next model is the median of the clients' values, the mean of the two middle ones if they
are even in number. With fewer than half of a weight's clients faulty or hostile it lies between values of
honest ones. Clients count alike, whatever their samples: those with many would be worth capturing.

Sparse masks (our reading; the paper is dense): where clients have moved their masks, a weight's median is
over the clients that hold it, and one that dropped it casts no zero. A weight that at most half of them hold
has no value that a few could not have set: it takes 0, as a weight that is newly grown. The next mask is what
more than half hold, pruned to the budget by magnitude as FedDST prunes; room that is left goes to the others
with the most votes, which so start afresh. Frozen weights stay. So hostile clients set no value while they
are fewer than half (where masks move: a quarter) of the round's, but they do vote for masks. Buffers (running
statistics) and the scores of server-side growth remain means, which one client can move.

Memory: the contributions of all the round's clients at once on every worker, in float32, and at the end about
five times the largest tensor's stack.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from ..core import masks
from ..core.budget import Budget
from ..core.hookspecs import hookimpl
from ..core.method import Method
from ..core.part import Part
from ..core.state import Aggregated, Masks, Memory, Params, Sums

Centre = Callable[[Tensor, Tensor], Tensor]
"""From values sorted along the clients (clients, …), of which the first count, int64 (…), at least 1."""


def opened(params: Params, mask: Masks, moved: bool) -> Sums:
    """What a client contributes to a gathered part: its values, and its mask if masks can differ."""
    return {**params, **({f"held/{name}": m for name, m in mask.items()} if moved else {})}


def settled(
    centre: Centre, sums: Sums, params: Params, mask: Masks, frozen: Masks, budget: Budget, memory: Memory
) -> Aggregated:
    """The next model: each weight's centre over the clients that hold it, and the mask as above."""
    values, major, rest = dict[str, Tensor](), dict[str, Tensor](), dict[str, Tensor]()
    for name in params:
        stack, held = sums[name], sums.get(f"held/{name}")
        if held is None:  # nobody moved: who trains a weight, trains it with all
            count = torch.full(stack.shape[1:], len(stack), device=stack.device)
        else:
            count = held.sum(0)
            stack = stack.masked_fill(~held, torch.inf)  # behind every value that counts
        value = centre(stack.sort(0).values, count.clamp(min=1))
        if name in mask:
            votes = count if held is not None else count * mask[name]
            major[name] = (2 * votes > len(stack)) | frozen[name]
            rest[name] = (votes > 0) & ~major[name]
            value = torch.where(2 * votes > len(stack), value, 0.0)
            votes = votes.to(value.dtype)
            rest[name] = torch.where(rest[name], votes, 0.0)
        values[name] = value
    kept = masks.prune_smallest(values, major, budget, frozen)
    filled = masks.grow_largest(kept, rest, budget)
    kept = {name: k | (filled[name] & (rest[name] > 0)) for name, k in kept.items()}
    return Aggregated(masks.apply(values, kept), kept, memory)


def middle(ranked: Tensor, count: Tensor) -> Tensor:
    """The median of the first `count` values."""
    low, high = ((count - 1) // 2).unsqueeze(0), (count // 2).unsqueeze(0)
    return (0.5 * ranked.gather(0, low) + 0.5 * ranked.gather(0, high)).squeeze(0)


class Median(Part):
    """Each weight's median over the clients that hold it; what at most half of them hold starts at 0."""

    gathered: ClassVar[bool] = True

    @hookimpl
    def contribute(self, params: Params, mask: Masks, moved: bool) -> Sums:
        return opened(params, mask, moved)

    @hookimpl
    def aggregate(
        self, sums: Sums, params: Params, mask: Masks, frozen: Masks, budget: Budget, memory: Memory
    ) -> Aggregated:
        return settled(middle, sums, params, mask, frozen, budget, memory)


METHOD = Method(
    "median",
    aggregate=Median(),
    paper="Yin et al., Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates, ICML 2018",
)
