"""A pool of any size: what a client owns is drawn when it is asked for, and never stored."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from pydantic import Field

from ..rng import generator
from .partition import Indices, PartitionRule, Pool, Tested, _error, _offsets

TESTED = 1000
"""Clients over whom `client_accuracy` is taken: its standard error is then at most 0.016 for any pool."""


@dataclass(frozen=True, eq=False)
class Labelled:
    """Sample indices sorted by label: class c has `indices[offsets[c]:offsets[c + 1]]`; int64 both."""

    indices: Indices
    offsets: Indices

    @classmethod
    def of(cls, targets: Indices, classes: int) -> Labelled:
        """The samples with these labels, int64 (n,) in [0, classes)."""
        return cls(np.argsort(targets, kind="stable"), _offsets(np.bincount(targets, minlength=classes)))

    def draw(self, count: int, p: npt.NDArray[np.float64] | None, stream: np.random.Generator) -> Indices:
        """`count` distinct samples, at most all, in random order; of classes by `p` (classes,), None: evenly.

        What a class is short of is drawn from the others, by `p` again.
        """
        if p is None:
            return self.indices[stream.choice(len(self.indices), count, replace=False)]
        sizes = np.diff(self.offsets)
        counts = np.zeros_like(sizes)
        while short := count - int(counts.sum()):  # each pass draws all, or exhausts a class
            left = sizes - counts
            weights = np.where(left > 0, p, 0.0)
            if not weights.any():  # a small alpha leaves classes of probability 0 in float64
                weights = left.astype(np.float64)
            counts += np.minimum(stream.multinomial(short, weights / weights.sum()), left)
        drawn = [
            self.offsets[c] + stream.choice(sizes[c], counts[c], replace=False, shuffle=False)
            for c in np.flatnonzero(counts)
        ]
        chosen: Indices = stream.permutation(np.concatenate(drawn))
        return self.indices[chosen]


@dataclass(frozen=True, eq=False)
class DrawnPool(Pool):
    """`size` clients of whom none is stored: memory is by the data's labels."""

    size: int
    key: int
    samples: int
    test_samples: int
    alpha: float | None
    train: Labelled
    test: Labelled

    @property
    def clients(self) -> int:
        return self.size

    @property
    def pool_samples(self) -> int:
        """A sample counts for every client that owns it."""
        return self.size * self.samples

    @property
    def train_range(self) -> tuple[int, int]:
        return self.samples, self.samples

    @cached_property
    def tested(self) -> Tested:
        """The first `TESTED` clients: clients are drawn alike, so these are a sample of them like any."""
        clients = min(self.size, TESTED)
        indices = np.concatenate([self.test_of(k) for k in range(clients)])
        return Tested(indices, np.arange(clients + 1, dtype=np.int64) * self.test_samples)

    def train_of(self, k: int) -> Indices:
        return self.train.draw(self.samples, self._labels(k), generator("drawn", self.key, "train", k))

    def test_of(self, k: int) -> Indices:
        return self.test.draw(self.test_samples, self._labels(k), generator("drawn", self.key, "test", k))

    def _labels(self, k: int) -> npt.NDArray[np.float64] | None:
        """Client k's own probability of each class (classes,), for train and test; None: the data's."""
        if self.alpha is None:
            return None
        classes = len(self.train.offsets) - 1
        return generator("drawn", self.key, "labels", k).dirichlet(np.full(classes, self.alpha))


class Drawn(PartitionRule):
    """Every client draws samples of its own from the whole data set, so that a pool may have any size.

    A client's samples are distinct, but clients share samples with each other: with more clients than data a
    pool is a population of users who were each asked for a few samples of one distribution. Every client
    has as many samples as the next. What a client owns follows from the seed and its number and is drawn
    anew each time that it is asked for, so time and memory of a round depend on the sampled clients only.
    With `alpha`, classes are drawn by Dirichlet proportions of the client's own, the same for train and
    test; a class that has too few samples is made up for from the others. `client_accuracy` is taken over
    the first 1,000 clients.
    """

    samples: int = Field(
        default=40, ge=1, le=100_000_000, description="Train samples of a client, 1 to those there are."
    )
    test_samples: int = Field(
        default=10, ge=1, le=100_000, description="Test samples of a client, 1 to 100,000 or those there are."
    )
    alpha: float | None = Field(
        default=None,
        ge=1e-3,
        le=1e6,
        description="Concentration of label skew, 0.001 to 10^6: small gives each client few classes. Unset: "
        "every client draws from the data as they are (iid).",
    )

    def split(
        self, train_targets: Indices, test_targets: Indices, clients: int, rng: np.random.Generator
    ) -> DrawnPool:
        """Needs `samples` train and `test_samples` test samples in all; any number of clients."""
        for setting, asked, targets in (
            ("samples", self.samples, train_targets),
            ("test_samples", self.test_samples, test_targets),
        ):
            if asked > len(targets):
                part = "test" if targets is test_targets else "train"
                raise _error(
                    f"task.partition.{setting}",
                    f"{asked:,} for each client, who owns none twice, but the data set has "
                    f"{len(targets):,} {part} samples; use at most {len(targets):,}",
                )
        classes = int(max(train_targets.max(), test_targets.max())) + 1
        return DrawnPool(
            size=clients,
            key=int(rng.integers(2**63)),
            samples=self.samples,
            test_samples=self.test_samples,
            alpha=self.alpha,
            train=Labelled.of(train_targets, classes),
            test=Labelled.of(test_targets, classes),
        )
