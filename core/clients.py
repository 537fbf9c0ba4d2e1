"""Which labels the clients of a run hold: `clients.json` in its folder; reading it imports no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .disk import replace
from .errors import RunError

if TYPE_CHECKING:
    from .task import Task

FILE = "clients.json"
MOST = 500
"""Clients that are recorded: a pool may have a million, and a picture shows no more."""


@dataclass(frozen=True)
class Labels:
    """`counts[i, c]`: train samples of class c that client i holds, int64 (clients, classes).

    The clients are the first of a pool of `pool`.
    """

    pool: int
    counts: NDArray[np.int64]


def write(run: Path, task: Task) -> None:
    """Writes the labels of the first `MOST` clients. Raises DiskError if it cannot."""
    targets, classes = task.dataset.train_targets.cpu().numpy(), task.dataset.classes
    pool = task.partition.clients
    counts = [
        np.bincount(targets[task.partition.train_of(client)], minlength=classes).tolist()
        for client in range(min(pool, MOST))
    ]
    text = json.dumps({"pool": pool, "label_counts": counts}) + "\n"
    replace(run / FILE, lambda fresh: fresh.write_text(text, encoding="utf-8"))


def load(run: Path) -> Labels | None:
    """What `write` wrote; None if the run has none. Raises RunError if the file is damaged."""
    path = run / FILE
    if not path.exists():
        return None
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        labels = Labels(int(tree["pool"]), np.array(tree["label_counts"], dtype=np.int64))
        if labels.counts.ndim != 2 or not labels.counts.size or labels.counts.min() < 0:
            raise ValueError("label_counts is no table of counts")
    except (OSError, ValueError, TypeError, KeyError, OverflowError) as error:
        raise RunError(f"cannot read {path}: {error}; remove it to do without") from None
    return labels
