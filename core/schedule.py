"""Schedules over rounds: pure functions of plain numbers."""

from __future__ import annotations

import math
from typing import Literal

LearningRateSchedule = Literal["constant", "linear", "cosine", "exponential"]


def cosine_decay(step: int, start: float, end_step: int) -> float:
    """From `start` at step 0 to 0 at `end_step` and after: start/2·(1 + cos(π·step/end_step)).

    DECAY of FedDST's code; also used for rewiring fractions in RigL.
    """
    if step >= end_step:
        return 0.0
    return start / 2 * (1 + math.cos(math.pi * step / end_step))


def learning_rate(
    schedule: LearningRateSchedule, start: float, final: float | None, step: int, steps: int
) -> float:
    """The rate in round `step` of `steps`: `start` in round 0, approaching `final` after the last one."""
    if schedule == "constant" or final is None:
        return start
    done = step / steps
    if schedule == "linear":
        return start + (final - start) * done
    if schedule == "cosine":
        return final + (start - final) * (1 + math.cos(math.pi * done)) / 2
    return start * float((final / start) ** done)


def share(total: int, fraction: float) -> int:
    """floor(fraction·total), forgiving the last bit of binary fractions (0.05·768000 is 38400)."""
    return math.floor(total * fraction + 1e-9)
