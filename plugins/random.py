"""A fixed random mask: the sparse topology that says how much a chosen one is worth.

Every weight is as likely to exist as any other of its layer (of the network under "global" allocation), and
the mask never moves; training is FedAvg's.

Fidelity: the "static" baseline of the RigL paper (Evci et al., ICML 2020), which draws from the same
budgets (uniform, ER or ERK). Our reading: weights keep the scale of the dense initialisation.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from ..core import masks
from ..core.budget import Budget
from ..core.hookspecs import hookimpl
from ..core.method import Method
from ..core.part import Part
from ..core.state import Masks, Params


class RandomMask(Part):
    """Draws each layer's weights uniformly without replacement."""

    budget_promise: ClassVar[Literal["exact"]] = "exact"
    from_key: ClassVar[bool] = True

    @hookimpl
    def mask_init(self, params: Params, budget: Budget, key: Tensor) -> Masks:
        return masks.by_budget(masks.random_scores(masks.full(params, budget), key), budget)


METHOD = Method(
    "random",
    mask_init=RandomMask(),
    paper="Evci et al., Rigging the Lottery: Making All Tickets Winners, ICML 2020 (static baseline)",
)
