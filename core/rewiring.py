"""When dynamic sparse training rewires within federated rounds, and the weights that it gives up."""

from __future__ import annotations

import math
from typing import Literal

import torch

from . import masks
from .budget import Budget
from .schedule import share
from .state import Clock, Masks, Params

Site = Literal["client", "server:start", "server:end"]


def rounds_done(clock: Clock, site: Site) -> int:
    """Rounds of training behind a readjustment at a site."""
    return clock.round + (site == "server:end")


def due(clock: Clock, site: Site, period: int, budget: Budget) -> bool:
    """Whether to rewire now: every `period` rounds, neither before the first nor after the last.

    A client does so before its last local epoch, so that what it grows is trained before it is averaged. A
    dense network has nowhere to grow.
    """
    if budget.sparsity == 0 or (site == "client" and clock.epoch != clock.epochs - 1):
        return False
    done = rounds_done(clock, site)
    return done % period == 0 and 0 < done < clock.rounds


def keep_largest(params: Params, mask: Masks, frozen: Masks, budget: Budget, dropped: float) -> Masks:
    """The mask with room for growth: the budget less its fraction `dropped`, the largest weights.

    The fraction, rounded down, is of each layer, or of the network under "global" allocation. Frozen weights
    stay, however small; a mask below the budget loses as many fewer.
    """
    score = {}
    for layer in budget.layers:
        active = masks.where(mask[layer.name], params[layer.name].abs(), -1.0)
        score[layer.name] = masks.where(~frozen[layer.name], active, math.inf)
    if budget.counts is None:
        ranked = torch.cat([entry.flatten() for entry in score.values()])
        largest = masks.largest(ranked, budget.total - share(budget.total, dropped))
        parts = torch.split(largest, [layer.weights for layer in budget.layers])
        chosen = {
            layer.name: part.view(layer.shape) for layer, part in zip(budget.layers, parts, strict=True)
        }
    else:
        counts = {name: count - share(count, dropped) for name, count in budget.counts.items()}
        chosen = {name: masks.largest(entry, counts[name]) for name, entry in score.items()}
    return {name: mask[name] & (entry | frozen[name]) for name, entry in chosen.items()}
