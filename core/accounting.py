"""The ledger of a run, from its task and method."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from . import rng
from .budget import Budget
from .compose import Hooks
from .config import RunConfig
from .ledger import TYPES, Ledger, Seed, paper_bytes
from .state import Masks, Params
from .task import Task


def open_ledger(
    config: RunConfig,
    task: Task,
    hooks: Hooks,
    params: Params,
    buffers: Params,
    macs: Mapping[str, float],
    budget: Callable[[], Budget],
) -> Ledger:
    """A ledger with the method's own formula of bytes; `budget` makes round 0's, `macs` are one sample's."""
    seed = None
    if getattr(hooks.method.mask_init, "from_key", False):
        if hooks.takes("mask_init", "probe"):
            raise hooks.where("mask_init").breach(
                "takes `probe`, but its part says by `from_key` that budget and key alone make the mask"
            )

        def masks(key: int) -> Masks:
            """The mask as a client draws it, who knows no weights yet."""
            unknown = {name: torch.full_like(p, torch.nan) for name, p in params.items()}
            stream = torch.tensor(key, device=task.device)
            drawn: Masks = hooks.call("mask_init", dict, params=unknown, budget=budget(), key=stream)
            return drawn

        seed = Seed(rng.number(config.seed, "mask_init"), masks)
    return Ledger(
        params,
        buffers,
        macs,
        paper=hooks.paper_bytes if hooks.has_extra("paper_bytes") else paper_bytes,
        passes=hooks.pass_densities(params, config.sparsity.target),
        encode=config.ledger.encode,
        values=TYPES[config.ledger.values],
        seed=seed,
    )
