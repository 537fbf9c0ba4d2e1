"""How long a run would take where links and devices are slow, from its metrics."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, Problem
from ..results import Result
from .columns import column


@dataclass(frozen=True)
class Bandwidth:
    """A client's links and speed. A round takes as long as its mean client:

        download bytes · 8 / down + FLOPs / rate + upload bytes · 8 / up

    with a round's bytes and FLOPs divided by its number of clients. The server takes no time, stragglers are
    not modelled, and evaluation costs nothing. `up` and `down` are in Mbit/s (10^6 bit/s), `flops` in FLOP/s;
    all must be above 0 and finite, or ConfigError names those that are not.
    """

    up: float = 1.0
    down: float = 10.0
    flops: float = 1e9

    def __post_init__(self) -> None:
        given = {"up": self.up, "down": self.down, "flops": self.flops}
        wrong = {name: value for name, value in given.items() if not (value > 0 and math.isfinite(value))}
        if wrong:
            raise ConfigError(
                Problem("", f"--{name} {value:g}: expected a number above 0") for name, value in wrong.items()
            )

    def seconds(self, run: Result) -> NDArray[np.float64]:
        """Seconds from the run's start to the end of each round; NaN where metrics lack what it takes."""
        clients = np.array([len(line.get("clients", ())) or np.nan for line in run.rounds])
        totals = (column(run, f"{name}_total") for name in ("download_bytes", "upload_bytes", "flops"))
        # what the totals gained: what round 0 is charged for the set-up counts, too
        down, up, flops = (np.diff(total, prepend=0.0) / clients for total in totals)
        rounds = down * 8 / (self.down * 1e6) + flops / self.flops + up * 8 / (self.up * 1e6)
        return np.asarray(np.cumsum(rounds))

    def __str__(self) -> str:
        return (
            "Time: a round takes as long as its mean client, "
            f"download bytes · 8 / {self.down:g} Mbit/s + FLOPs / {self.flops:g} FLOP/s + "
            f"upload bytes · 8 / {self.up:g} Mbit/s."
        )
