"""Partitions: which client owns which samples.

`Pool` is what a run asks of it, one client at a time. A `Partition` is index arrays, so that 100,000 clients
cost no more than their indices; nothing here loops over samples.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import Field

from ..component import Component
from ..errors import ConfigError, Problem

Indices = npt.NDArray[np.int64]


class Tested(NamedTuple):
    """Clients on whom the model is tested: the i-th has `indices[offsets[i]:offsets[i + 1]]`, one or more.

    Both int64; `offsets` has one entry more than there are such clients.
    """

    indices: Indices
    offsets: Indices


class Pool(ABC):
    """Which client owns which samples. Clients are numbered from 0 and have train and test samples each.

    A round calls nothing here that takes time or memory by the number of clients, but for `tested`.
    """

    @property
    @abstractmethod
    def clients(self) -> int:
        """Clients that can be sampled."""

    @property
    @abstractmethod
    def pool_samples(self) -> int:
        """Train samples of all clients together: the sum of the lengths of `train_of`."""

    @property
    @abstractmethod
    def train_range(self) -> tuple[int, int]:
        """Train samples of the client that has least, and of the one that has most."""

    @property
    @abstractmethod
    def tested(self) -> Tested:
        """Test samples of the clients over whom `client_accuracy` is taken: all, or a fixed sample."""

    @abstractmethod
    def train_of(self, k: int) -> Indices:
        """Train indices of client `k`, in the order in which minibatches are cut; not to be written to."""

    @abstractmethod
    def test_of(self, k: int) -> Indices:
        """Test indices of client `k`; not to be written to."""


@dataclass(frozen=True, eq=False)
class Partition(Pool):
    """Sample indices of each client: client k owns `train_indices[train_offsets[k]:train_offsets[k + 1]]`.

    The same holds for test. All arrays are int64; offsets have one entry more than there are clients. Every
    client has at least one train and one test sample.
    """

    train_indices: Indices
    train_offsets: Indices
    test_indices: Indices
    test_offsets: Indices

    @property
    def clients(self) -> int:
        """Clients that can be used: those that were left without train or test samples are not counted."""
        return len(self.train_offsets) - 1

    @property
    def pool_samples(self) -> int:
        return len(self.train_indices)

    @property
    def train_range(self) -> tuple[int, int]:
        sizes = self.train_sizes
        return int(sizes.min()), int(sizes.max())

    @property
    def tested(self) -> Tested:
        """Every client."""
        return Tested(self.test_indices, self.test_offsets)

    @property
    def train_sizes(self) -> Indices:
        """Train samples of each client, int64 (clients,)."""
        return np.diff(self.train_offsets)

    @property
    def test_sizes(self) -> Indices:
        """Test samples of each client, int64 (clients,)."""
        return np.diff(self.test_offsets)

    def train_of(self, k: int) -> Indices:
        """Train indices of client `k` (a view), in the order in which minibatches are cut."""
        return self.train_indices[self.train_offsets[k] : self.train_offsets[k + 1]]

    def test_of(self, k: int) -> Indices:
        """Test indices of client `k` (a view)."""
        return self.test_indices[self.test_offsets[k] : self.test_offsets[k + 1]]


class PartitionRule(Component, ABC):
    """How samples are divided among clients."""

    @abstractmethod
    def split(
        self, train_targets: Indices, test_targets: Indices, clients: int, rng: np.random.Generator
    ) -> Pool:
        """Divide samples with these labels (int64 (n,)) among `clients` clients.

        The same `rng` state gives the same partition. Raises `ConfigError` if the samples do not suffice.
        """


def _error(path: str, message: str) -> ConfigError:
    return ConfigError([Problem(path, message)])


def _need_samples(clients: int, samples: int, part: str) -> None:
    if clients > samples:
        raise _error(
            "federation.clients",
            f"{clients:,} clients cannot share {samples:,} {part} samples; use at most {samples:,}",
        )


def _offsets(sizes: Indices) -> Indices:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])


def _shuffled(flat: Indices, sizes: Indices, rng: np.random.Generator) -> Indices:
    """Each client's run of `flat` in an order of its own."""
    owners = np.repeat(np.arange(len(sizes)), sizes)
    return flat[np.lexsort((rng.random(len(flat)), owners))]


def _usable(train: Indices, train_sizes: Indices, test: Indices, test_sizes: Indices) -> Partition:
    """The partition without the clients that have no train or no test sample; the others move up."""
    keep = (train_sizes > 0) & (test_sizes > 0)
    if not keep.any():
        raise _error(
            "federation.clients", "no client has both train and test samples; use fewer clients or more data"
        )
    return Partition(
        train_indices=train[np.repeat(keep, train_sizes)],
        train_offsets=_offsets(train_sizes[keep]),
        test_indices=test[np.repeat(keep, test_sizes)],
        test_offsets=_offsets(test_sizes[keep]),
    )


class Iid(PartitionRule):
    """Shuffled and cut into equal parts: every client sees the same distribution.

    Sizes differ by at most one sample, of train and of test; no sample is left over.
    """

    def split(
        self, train_targets: Indices, test_targets: Indices, clients: int, rng: np.random.Generator
    ) -> Partition:
        """Needs a train and a test sample for every client."""
        _need_samples(clients, len(train_targets), "train")
        _need_samples(clients, len(test_targets), "test")
        steps = np.arange(clients + 1, dtype=np.int64)
        return Partition(
            train_indices=rng.permutation(len(train_targets)),
            train_offsets=steps * len(train_targets) // clients,
            test_indices=rng.permutation(len(test_targets)),
            test_offsets=steps * len(test_targets) // clients,
        )


def slice_by_class(
    targets: Indices, proportions: npt.NDArray[np.float64], lost_first_share: bool
) -> tuple[Indices, Indices]:
    """Cut the samples of each class among clients: flat indices, client by client, and sizes (clients,).

    `proportions` (classes, clients) has rows that sum to 1. The samples of class c, in their order, are cut
    at floor(N_c * (p_c0 + … + p_cj)) for every j. Client k gets the piece that ends at its own cut, and the
    last client ends at N_c, so that every sample is given. With `lost_first_share` every client gets the
    next piece instead, as in the FedDST code: the first piece is nobody's and the last client gets what
    rounding left.
    """
    classes, clients = proportions.shape
    counts = np.bincount(targets, minlength=classes)
    cuts = np.floor(counts[:, None] * np.cumsum(proportions, axis=1)).astype(np.int64)
    np.minimum(cuts, counts[:, None], out=cuts)  # a sum of floats may pass 1
    if not lost_first_share:
        cuts = np.concatenate([np.zeros((classes, 1), np.int64), cuts[:, :-1]], axis=1)
    # pieces of a class in order: what precedes the first client's (nobody's), then one a client
    pieces = np.diff(np.concatenate([cuts, counts[:, None]], axis=1), axis=1)
    owners = np.repeat(
        np.tile(np.arange(-1, clients), classes), np.concatenate([cuts[:, :1], pieces], axis=1).ravel()
    )
    by_class = np.argsort(targets, kind="stable")
    by_owner = np.argsort(owners, kind="stable")[int(cuts[:, 0].sum()) :]
    return by_class[by_owner], pieces.sum(axis=0)


class Dirichlet(PartitionRule):
    """Each class is shared out in proportions drawn from a Dirichlet distribution (label skew).

    One draw a class serves train and test, so that a client is tested on the labels that it trains on.
    Clients that are left without train or test samples are dropped. Source: the FedDST code's default.
    """

    alpha: float = Field(
        default=0.3,
        ge=1e-3,
        le=1e6,
        description="Concentration, 0.001 to 10^6: small gives each client few classes, large is nearly iid.",
    )
    lost_first_share: bool = Field(
        default=False,
        description="Reproduce the FedDST code's off-by-one: the first share of every class is given to "
        "nobody and the last client gets only rounding leftovers. False gives out every sample.",
    )

    def split(
        self, train_targets: Indices, test_targets: Indices, clients: int, rng: np.random.Generator
    ) -> Partition:
        """Has `clients` clients or a few less."""
        _need_samples(clients, len(train_targets), "train")
        classes = int(max(train_targets.max(), test_targets.max(initial=0))) + 1
        proportions = rng.dirichlet(np.full(clients, self.alpha), size=classes)
        train, train_sizes = slice_by_class(train_targets, proportions, self.lost_first_share)
        test, test_sizes = slice_by_class(test_targets, proportions, self.lost_first_share)
        return _usable(
            _shuffled(train, train_sizes, rng), train_sizes, _shuffled(test, test_sizes, rng), test_sizes
        )


_MOST_TEST_INDICES = 2**28
"""Overlapping test sets grow with clients times test samples a class; 2 GiB of indices is the limit."""


class Shards(PartitionRule):
    """Label-sorted samples are cut into shards and each client draws a few: about as many classes a client.

    A client that draws two shards of one class has fewer classes, and a shard may straddle two. The test
    set of a client is every test sample of the labels that it trains on, so test sets overlap between
    clients. Source: the FedDST paper's 400 clients with 2 shards of 20 images (its `lotteryfl` mode).
    """

    classes_per_client: int = Field(
        default=2, ge=1, le=10_000, description="Shards that each client draws, 1 to 10,000."
    )
    samples_per_shard: int | None = Field(
        default=None,
        ge=1,
        le=100_000_000,
        description="Train samples in a shard, 1 to 10^8; samples in shards that nobody draws are not used. "
        "Unset: clients x classes_per_client shards of equal size (to within one sample), all used.",
    )

    def split(
        self, train_targets: Indices, test_targets: Indices, clients: int, rng: np.random.Generator
    ) -> Partition:
        """Needs clients x classes_per_client shards."""
        samples = len(train_targets)
        _need_samples(clients, samples, "train")
        bounds = self._bounds(samples, clients)
        drawn = rng.permutation(len(bounds) - 1)[: clients * self.classes_per_client]
        lengths = np.diff(bounds)[drawn]
        # positions in label order, shard after shard: a running count, shifted to where each shard starts
        positions = np.arange(lengths.sum()) + np.repeat(bounds[drawn] - _offsets(lengths)[:-1], lengths)
        train = np.argsort(train_targets, kind="stable")[positions]
        train_sizes = lengths.reshape(clients, self.classes_per_client).sum(axis=1)
        train = _shuffled(train, train_sizes, rng)

        classes = int(max(train_targets.max(), test_targets.max(initial=0))) + 1
        held = np.zeros((clients, classes), dtype=bool)
        held[np.repeat(np.arange(clients), train_sizes), train_targets[train]] = True
        counts = np.bincount(test_targets, minlength=classes)
        test_sizes = held @ counts
        if test_sizes.sum() > _MOST_TEST_INDICES:
            raise _error(
                "federation.clients",
                f"the overlapping test sets of {clients:,} clients hold {test_sizes.sum():,} indices, at "
                f"most {_MOST_TEST_INDICES:,} are allowed; use fewer clients or another task.partition",
            )
        by_label = np.split(np.argsort(test_targets, kind="stable"), np.cumsum(counts)[:-1])
        test = np.concatenate([by_label[label] for label in np.nonzero(held)[1]])
        return _usable(train, train_sizes, test, test_sizes)

    def _bounds(self, samples: int, clients: int) -> Indices:
        """Where shards begin and end in the label-sorted samples, int64 (shards + 1,)."""
        wanted = clients * self.classes_per_client
        if self.samples_per_shard is None:
            if wanted > samples:
                raise _error(
                    "task.partition.classes_per_client",
                    f"{clients:,} clients with {self.classes_per_client:,} shards each need {wanted:,} "
                    f"shards, but there are {samples:,} train samples; use at most {samples // clients:,}",
                )
            return np.arange(wanted + 1, dtype=np.int64) * samples // wanted
        shards = samples // self.samples_per_shard
        if wanted > shards:
            raise _error(
                "task.partition.samples_per_shard",
                f"{clients:,} clients with {self.classes_per_client:,} shards each need {wanted:,} shards, "
                f"but {samples:,} train samples make {shards:,} of {self.samples_per_shard:,}; use smaller "
                f"shards, or fewer federation.clients",
            )
        return np.arange(shards + 1, dtype=np.int64) * self.samples_per_shard
