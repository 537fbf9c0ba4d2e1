"""What a round's line of `metrics.jsonl` says of the model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from . import masks
from .errors import RunError
from .execution.exchange import Uploads
from .state import Clock, Masks, ServerState


def measured(
    state: ServerState, before: Masks, now: Masks, prunable: Sequence[str], uploads: Uploads, clock: Clock
) -> dict[str, Any]:
    """Training metrics, sparsity, frozen fraction, and how the mask moved from `before` to `now`.

    Over prunable weights: `density` is the active share of each layer, `mask_changed` counts positions that
    are active in one of both masks, `regrown_fraction` is the share of those active now that were not before,
    `frozen_fraction` of those that no longer change. The training loss is NaN if nobody reported. Raises
    RunError if it is not finite otherwise.
    """
    means = {name: float(value) / uploads.steps_weight for name, value in uploads.metrics.items()}
    if uploads.samples and not math.isfinite(means["loss"]):
        raise RunError(
            f"round {clock.round}: the loss is {means['loss']}; lower the learning rate, or set "
            "faults.non_finite = 'drop' to go on without clients whose loss is not finite"
        )
    means.setdefault("loss", math.nan)
    total = sum(mask.numel() for mask in now.values())
    both = {name: now[name] & before[name] for name in prunable}
    counts, *others = masks.counted(now, before, {name: state.frozen[name] for name in prunable}, both)
    active, was, still, stayed = (sum(each.values()) for each in (counts, *others))
    either = active + was - stayed
    return {
        "round": clock.round,
        **{f"train_{name}": value for name, value in means.items()},
        "sparsity": 1 - active / total,
        "density": {name: round(count / now[name].numel(), 6) for name, count in counts.items()},
        "frozen_fraction": still / active if active else 0.0,
        "regrown_fraction": (active - stayed) / active if active else 0.0,
        "mask_changed": either - stayed,
        "mask_iou": stayed / either if either else 1.0,
    }
