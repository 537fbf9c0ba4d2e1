"""Mask arithmetic shared by methods: prune the smallest, grow the largest, grow at random.

All functions are pure and keep the flat (row-major) order as the tie rule. Counts are Python numbers, so that
they run under `torch.func.vmap`; only those that say so look at tensor values on the host.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from . import rng
from .budget import Budget
from .functional import differentiated, is_stacked
from .recording import operation
from .selection import by_numpy, keep_from, kth_largest, readable, select
from .state import Masks, Params, Scores

_BITS = {torch.float32: (torch.int32, "f"), torch.float64: (torch.int64, "d")}
_FEW = 1 << 11  # values up to which `torch.where` is quicker


def where(mask: Tensor, values: Tensor, other: float) -> Tensor:
    """`torch.where(mask, values, other)`; of large tensors on a CPU by their bits, several times as fast."""
    if not _by_bits(mask, values):
        return torch.where(mask, values, other)
    kind, code = _BITS[values.dtype]
    if mask.stride() != values.stride() and not is_stacked({"mask": mask, "values": values}):
        mask = torch.empty_like(values, dtype=torch.bool).copy_(mask)
    on = mask.view(torch.uint8).to(kind).neg_()  # all bits or none
    kept = on & values.view(kind)
    rest = int.from_bytes(struct.pack(f"<{code}", other), "little", signed=True)
    if rest:
        kept.bitwise_or_(on.bitwise_not_().bitwise_and_(rest))
    return kept.view(values.dtype)


def _by_bits(mask: Tensor, values: Tensor) -> bool:
    """Whether `where` may work on bits, and gains by it; what is differentiated has none."""
    if not values.is_cpu or values.dtype not in _BITS or mask.shape != values.shape:
        return False
    if torch.compiler.is_compiling() or differentiated(values):
        return False
    return values.numel() > _FEW or is_stacked({"mask": mask, "values": values})


@operation
def largest(score: Tensor, count: int) -> Tensor:
    """Mask of the `count` largest entries of `score`; among equals the lower flat index wins."""
    if count <= 0:
        return torch.zeros_like(score, dtype=torch.bool)
    if count >= score.numel():
        return torch.ones_like(score, dtype=torch.bool)
    if by_numpy(score):
        return _largest_of_each(score.detach()[None], count)[0]
    if _stacked_on_cpu(score):
        return cast(Tensor, _Stacked.apply(largest, _largest_of_each, score.detach(), count))
    flat = score.detach().flatten()
    threshold = kth_largest(flat, count)
    above, tied = flat > threshold, flat == threshold
    return (above | (tied & (tied.cumsum(0) <= count - above.sum()))).view(score.shape)


@operation
def _largest_of_each(scores: Tensor, count: int) -> Tensor:
    """`largest` of each row, by numpy."""
    rows = scores.numpy().reshape(len(scores), -1)
    threshold = np.sort(rows, axis=1)[:, -count, None]
    chosen = rows >= threshold
    surplus = np.count_nonzero(chosen, axis=1) - count
    for row in np.flatnonzero(surplus > 0):
        chosen[row, np.flatnonzero(rows[row] == threshold[row])[-surplus[row] :]] = False
    return torch.from_numpy(chosen).view(scores.shape)


OfCount = Callable[[Tensor, int], Tensor]


class _Stacked(torch.autograd.Function):
    """A function of a tensor and a count, for stacked clients on a CPU: by numpy, of all of them at once."""

    @staticmethod
    def forward(of_one: OfCount, of_each: OfCount, values: Tensor, count: int) -> Tensor:
        return of_one(values, count)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, of_one: OfCount, of_each: OfCount, values: Tensor, count: int
    ) -> tuple[Tensor, int]:
        values = values.movedim(in_dims[2], 0)
        if by_numpy(values):
            return of_each(values, count), 0
        return torch.stack([of_one(own, count) for own in values]), 0  # of another vmap's, or bfloat16

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        return (None,) * 4


def _stacked_on_cpu(values: Tensor) -> bool:
    """Whether a transformation stacks these values on a CPU."""
    return is_stacked({"values": values}) and values.is_cpu and not torch.compiler.is_compiling()


@operation
def keep_largest(values: Tensor, count: int) -> Tensor:
    """`values` with zeros off the mask of the `count` largest magnitudes; has no gradient."""
    values = values.detach()
    if 0 < count < values.numel():
        if by_numpy(values):
            return _keep_largest_of_each(values[None], count)[0]
        if _stacked_on_cpu(values):
            return cast(Tensor, _Stacked.apply(keep_largest, _keep_largest_of_each, values, count))
    return values * largest(values.abs(), count)


@operation
def _keep_largest_of_each(values: Tensor, count: int) -> Tensor:
    """`keep_largest` of each row, by numpy; if no row has a tie at its bound, comparing with it is enough."""
    magnitudes, place = np.abs(values.numpy()), values[0].numel() - count
    # the order of one client's does not matter, and to change it takes as long as to select
    ordered = magnitudes.ravel("K")[None] if len(values) == 1 else magnitudes.reshape(len(values), -1)
    select(ordered, place)
    least = ordered[:, place]
    if ((least == 0) | (ordered[:, :place].max(axis=1) < least)).all():  # not of a bound that is NaN
        return keep_from(values, least)
    return values * _largest_of_each(values.abs(), count)


def by_budget(scores: Scores, budget: Budget) -> Masks:
    """The largest scores of each layer, or of the whole network under "global" allocation."""
    if budget.counts is not None:
        return {layer.name: largest(scores[layer.name], budget.counts[layer.name]) for layer in budget.layers}
    flat = torch.cat([scores[layer.name].flatten() for layer in budget.layers])
    parts = torch.split(largest(flat, budget.total), [layer.weights for layer in budget.layers])
    return {layer.name: part.view(layer.shape) for layer, part in zip(budget.layers, parts, strict=True)}


def prune_smallest(params: Params, mask: Masks, budget: Budget, frozen: Masks | None = None) -> Masks:
    """The active weights of largest magnitude, at most as many as the budget; none is added.

    Active positions rank before inactive ones, so an active weight that is exactly 0 is no tie with a
    masked zero; frozen positions rank above everything. Outside vmap a mask within its budget comes back
    as it is (looks at the counts).
    """
    if not is_stacked(mask) and within(mask, budget):
        return mask
    # a look costs a CPU less than what there is to do for each tensor
    frozen = {name: f for name, f in (frozen or {}).items() if not readable(f) or f.any()}
    scores = {}
    for name, active in mask.items():
        score = where(active, params[name].abs().contiguous(), -1.0)
        protected = frozen.get(name)
        scores[name] = score if protected is None else where(~protected, score, math.inf)
    kept = by_budget(scores, budget)
    kept = {name: kept[name] & active for name, active in mask.items()}
    if frozen:  # all of them, even if they exceed the budget
        kept = {name: k | (frozen[name] & mask[name]) if name in frozen else k for name, k in kept.items()}
    return kept


def grow_largest(mask: Masks, score: Scores, budget: Budget) -> Masks:
    """The mask filled up to the budget with inactive positions of largest score; nothing is dropped
    unless the mask exceeds the budget."""
    ranked = {name: where(~active, score[name], math.inf) for name, active in mask.items()}
    return by_budget(ranked, budget)


def drop_smallest(params: Params, mask: Masks, frozen: Masks, counts: Mapping[str, int]) -> Masks:
    """The mask without `counts[layer]` of its unfrozen weights, those of smallest magnitude (or all)."""
    kept = {}
    for name, active in mask.items():
        movable = active & ~frozen[name]
        smallest = largest(where(movable, -params[name].abs(), -math.inf), counts[name])
        kept[name] = active & ~(smallest & movable)
    return kept


def grow_random(mask: Masks, counts: Mapping[str, int], key: Tensor) -> Masks:
    """The mask with `counts[layer]` more positions, uniform without replacement among the inactive ones."""
    grown = {}
    for name, active in mask.items():
        draw = rng.bits(rng.fold(key, name), active.shape).masked_fill(active, -1)
        grown[name] = active | largest(draw, counts[name])
    return grown


def fill_random(mask: Masks, budget: Budget, key: Tensor) -> Masks:
    """The mask filled up to the budget at random; a layer at or above its budget stays as it is."""
    filled = grow_largest(mask, random_scores(mask, rng.fold(key, "fill")), budget)
    return {name: active | filled[name] for name, active in mask.items()}


def random_scores(mask: Masks, key: Tensor) -> Scores:
    """Independent uniform scores in [0, 1), float64 with 53 random bits, for growth at random."""
    return {
        name: (rng.bits(rng.fold(key, name), m.shape) >> 10).to(torch.float64) * 2.0**-53
        for name, m in mask.items()
    }


def apply(params: Params, mask: Masks) -> Params:
    """Parameters with zeros off the mask; unmasked ones as they are."""
    return {name: where(mask[name], p, 0.0) if name in mask else p for name, p in params.items()}


def rescaled(dense: Tensor, masked: Tensor) -> Tensor:
    """The masked tensor with the norm that it had when dense."""
    before: Tensor = torch.linalg.vector_norm(dense)
    after: Tensor = torch.linalg.vector_norm(masked)
    return masked * torch.where(after > 0, before / after, 0.0)


def support(params: Params, mask: Masks) -> Masks:
    """Where the masked parameters are not 0."""
    return {name: m & params[name].bool() for name, m in mask.items()}  # `!=` takes 8 times as long


def active(mask: Masks) -> dict[str, int]:
    """Active weights a layer (looks at the counts: one transfer to the host)."""
    return counted(mask)[0]


def counted(*every: Masks) -> list[dict[str, int]]:
    """`active` of several masks, in one transfer to the host."""
    flat = {(at, name): m for at, mask in enumerate(every) for name, m in mask.items()}
    found = dict(zip(flat, map_counts(flat, lambda m: m), strict=True))
    return [{name: found[at, name] for name in mask} for at, mask in enumerate(every)]


def map_counts(mask: Mapping[Any, Tensor], function: Callable[[Tensor], Tensor]) -> list[int]:
    """Number of True entries of function(mask), by layer, in one transfer."""
    if not mask:
        return []
    # sums of bools take several times as long on a CPU
    found: list[int] = torch.stack([function(m).count_nonzero() for m in mask.values()]).tolist()
    return found


def within(mask: Masks, budget: Budget) -> bool:
    """Whether no layer (or, under "global" allocation, not the network) is above its budget."""
    counts = active(mask)
    if budget.counts is None:
        return sum(counts.values()) <= budget.total
    return all(counts[name] <= allowed for name, allowed in budget.counts.items())


def prune_smallest_tied(params: Params, mask: Masks, budget: Budget, frozen: Masks | None = None) -> Masks:
    """`prune_smallest`, but an active weight that is exactly 0 is no better than a masked zero.

    Magnitudes are ranked over the whole tensor and equal ones by flat index, so some active zeros go while
    masked ones count as kept: fewer than the budget can be left. Released codes prune so.
    """
    scores = {name: where(active, params[name].abs(), 0.0) for name, active in mask.items()}
    held = {name: mask[name] & entries for name, entries in (frozen or {}).items() if name in mask}
    scores |= {name: where(~entries, scores[name], math.inf) for name, entries in held.items()}
    kept = by_budget(scores, budget)
    kept = {name: kept[name] & active for name, active in mask.items()}
    return kept | {name: kept[name] | entries for name, entries in held.items()}


def largest_lacking(mask: Masks, score: Scores, budget: Budget) -> Masks:
    """As many positions of largest score as the mask is short of the budget, active ones not excluded."""
    if budget.counts is not None:
        return {name: rank(score[name]) < budget.counts[name] - active.sum() for name, active in mask.items()}
    ranks = rank(torch.cat([score[layer.name].flatten() for layer in budget.layers]))
    chosen = ranks < budget.total - torch.stack([active.sum() for active in mask.values()]).sum()
    parts = torch.split(chosen, [layer.weights for layer in budget.layers])
    return {layer.name: part.view(layer.shape) for layer, part in zip(budget.layers, parts, strict=True)}


def rank(score: Tensor) -> Tensor:
    """Each entry's place by score, 0 for the largest; among equals the lower flat index comes first.

    Selects a count that is itself a tensor (a client's own, under vmap): `rank(score) < count`.
    """
    order = score.flatten().argsort(descending=True, stable=True)
    return order.argsort().view(score.shape)


def full(params: Params, budget: Budget) -> Masks:
    """The mask of a dense network: every prunable weight exists."""
    return {layer.name: torch.ones_like(params[layer.name], dtype=torch.bool) for layer in budget.layers}


def global_top(params: Params, mask: Masks, budget: Budget, frozen: Masks | None = None) -> Masks:
    """The active weights of largest magnitude in the whole network, whatever the budget's allocation.

    As many as `network` allows, zeros among those that go: exactly so many are left unless fewer were active,
    or more are frozen.
    """
    return prune_smallest(params, mask, network(budget), frozen)


def network(budget: Budget) -> Budget:
    """All but round(S·P) of the network's P weights, wherever they are; `Budget.total` rounds (1-S)·P."""
    dropped = round(budget.sparsity * budget.weights)
    return Budget(budget.layers, "global", dropped / budget.weights)  # its total is exact to the unit


def movable(mask: Masks, frozen: Masks) -> Masks:
    """mask & ~frozen, for every parameter that either names: where an optimiser may change a value."""
    free = {name: m & ~frozen[name] if name in frozen else m for name, m in mask.items()}
    return free | {name: ~f for name, f in frozen.items() if name not in mask}


def steady(mask: Masks, kept: Masks, frozen: Masks) -> Masks:
    """Where a server may move a value on: weights there before and after its round, and not frozen."""
    return movable({name: m & kept[name] for name, m in mask.items()}, frozen)


def largest_with_ties(params: Params, mask: Masks, count: int, frozen: Masks | None = None) -> Masks:
    """The active weights no smaller than the `count`-th largest magnitude of the whole network.

    All that tie with it stay, so that more than `count` can be left; masked weights rank as zeros, frozen
    ones above everything. A network with fewer than `count` nonzero weights comes back as it is.
    """
    sizes = {name: where(active, params[name].abs(), 0.0) for name, active in mask.items()}
    for name in sizes.keys() & (frozen or {}).keys():
        sizes[name] = where(~((frozen or {})[name] & mask[name]), sizes[name], math.inf)
    flat = torch.cat([size.flatten() for size in sizes.values()])
    threshold = kth_largest(flat, count)
    return {name: active & (sizes[name] >= threshold) for name, active in mask.items()}
