"""Partitions by label that give every client as many samples as the next: LDA and disjoint classes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from pydantic import Field

from .partition import (
    Indices,
    Partition,
    PartitionRule,
    _error,
    _need_samples,
    _shuffled,
    _usable,
)

Probabilities = npt.NDArray[np.float64]

_AT_ONCE = 2**14
"""Samples dealt between two looks at which classes have run out."""


class Lda(PartitionRule):
    """Every client draws as many samples as the others, of classes by its own Dirichlet proportions.

    Clients draw in turn and without replacement; one for whom a class has run out spreads its draws over
    the other classes, so late clients get what is left. Proportions serve train and test. Sizes differ by at
    most one sample, and no sample is left over. Source: the SparsyFed code's latent Dirichlet allocation,
    all of it drawn from the run's seed here.
    """

    alpha: float = Field(
        default=0.1,
        ge=1e-3,
        le=1e6,
        description="Concentration, 0.001 to 10^6: small gives each client few classes, large is nearly iid.",
    )

    def split(
        self, train_targets: Indices, test_targets: Indices, clients: int, rng: np.random.Generator
    ) -> Partition:
        """Needs a train and a test sample for every client."""
        _need_samples(clients, len(train_targets), "train")
        _need_samples(clients, len(test_targets), "test")
        classes = int(max(train_targets.max(), test_targets.max())) + 1
        proportions = rng.dirichlet(np.full(classes, self.alpha), size=clients)
        steps = np.arange(clients + 1, dtype=np.int64)
        offsets = [steps * len(targets) // clients for targets in (train_targets, test_targets)]
        return Partition(
            train_indices=draw_by_proportions(train_targets, proportions, np.diff(offsets[0]), rng),
            train_offsets=offsets[0],
            test_indices=draw_by_proportions(test_targets, proportions, np.diff(offsets[1]), rng),
            test_offsets=offsets[1],
        )


def renormalised(p: Probabilities, left: npt.NDArray[np.bool_]) -> Probabilities:
    """Rows of class probabilities: 10^-5 more for each class that is left, none for the others, sum 1."""
    raised = np.where(left, p + 1e-5, 0.0)
    total: Probabilities = raised.sum(axis=-1, keepdims=True) + np.finfo(np.float64).eps
    return raised / total


def draw_by_proportions(
    targets: Indices, proportions: Probabilities, sizes: Indices, rng: np.random.Generator
) -> Indices:
    """Flat indices, client by client: client k draws `sizes[k]` samples (all together: every one).

    Each draw picks a class by the client's row of `proportions` (clients, classes), renormalised when the
    client starts and whenever a class runs out, and takes the next of that class's shuffled stack.
    """
    left = np.bincount(targets, minlength=proportions.shape[1])
    owners = np.repeat(np.arange(len(sizes)), sizes)
    uniform = rng.random(len(targets))
    drawn = np.empty(len(targets), dtype=np.int64)
    p, done = renormalised(proportions, left > 0), 0
    while done < len(targets):
        ahead = slice(done, done + _AT_ONCE)
        guessed = _categorical(p, left > 0, owners[ahead], uniform[ahead])
        # draws are as if made one by one up to the first that empties a class
        dry = np.flatnonzero((np.bincount(guessed, minlength=len(left)) >= left) & (left > 0))
        ends = [int(np.flatnonzero(guessed == label)[left[label] - 1]) + 1 for label in dry]
        taken = guessed[: min(ends, default=len(guessed))]
        drawn[done : done + len(taken)] = taken
        left = left - np.bincount(taken, minlength=len(left))
        done += len(taken)
        if len(dry):
            current = owners[done - 1]
            p[current] = renormalised(p[current], left > 0)
            p[current + 1 :] = renormalised(proportions[current + 1 :], left > 0)
    shuffled = rng.permutation(len(targets))
    stacks = shuffled[np.argsort(targets[shuffled], kind="stable")]
    flat = np.empty(len(targets), dtype=np.int64)
    flat[np.argsort(drawn, kind="stable")] = stacks
    return flat


def _categorical(
    p: Probabilities, left: npt.NDArray[np.bool_], owners: Indices, uniform: Probabilities
) -> Indices:
    """One class a draw, by the rows of `p` that `owners` names; never one that is not `left`."""
    bounds = np.cumsum(p[owners[0] : owners[-1] + 1], axis=1)
    bounds[:, np.flatnonzero(left)[-1] :] = np.inf  # whatever rounding left of the sum
    picked = np.zeros(len(owners), dtype=np.int64)
    for column in bounds.T[:-1]:
        picked += uniform >= column[owners - owners[0]]
    return picked


class ClassDisjoint(PartitionRule):
    """Label-sorted samples are cut into chunks; each client takes the first ones that share no class.

    With equal classes the federation falls into blocks of clients that have the same classes and share none
    with other blocks. All clients have the same number of samples; what is left after the last chunk (fewer
    samples than chunks) is not used. The test samples of a class are dealt evenly to the clients that train
    on it; clients that get none are dropped. Source: the FedSparsify code's non-IID split.
    """

    classes_per_client: int = Field(
        default=2, ge=1, le=10_000, description="Chunks, none of a class of another, that each client takes."
    )

    def split(
        self, train_targets: Indices, test_targets: Indices, clients: int, rng: np.random.Generator
    ) -> Partition:
        """Needs classes that come out even: a whole number of chunks each, as many as clients can share."""
        _need_samples(clients, len(train_targets), "train")
        chunks = clients * self.classes_per_client
        size = len(train_targets) // chunks
        if not size:
            raise _error(
                "task.partition.classes_per_client",
                f"{clients:,} clients with {self.classes_per_client:,} chunks each need {chunks:,} chunks, "
                f"but there are {len(train_targets):,} train samples; use at most "
                f"{len(train_targets) // clients:,}",
            )
        by_label = np.argsort(train_targets, kind="stable")[: chunks * size].reshape(chunks, size)
        taken = by_label[self._choose(train_targets[by_label], clients)]
        train_sizes = np.full(clients, self.classes_per_client * size)
        train = _shuffled(taken.ravel(), train_sizes, rng)

        classes = int(max(train_targets.max(), test_targets.max(initial=0))) + 1
        held = np.zeros((clients, classes), dtype=bool)
        held[np.repeat(np.arange(clients), train_sizes), train_targets[train]] = True
        test, test_sizes = _dealt_by_class(test_targets, held)
        return _usable(train, train_sizes, test, test_sizes)

    def _choose(self, labels: Indices, clients: int) -> Indices:
        """Numbers of the chunks (rows of sorted labels) that each client takes (clients, classes_per_client).

        The scan is over runs of chunks with the same classes: of a run no client can take two.
        """
        first, last = labels[:, 0], labels[:, -1]
        starts = np.flatnonzero(np.diff(first, prepend=-1) | np.diff(last, prepend=-1)).tolist()
        ends = [*starts[1:], len(labels)]
        classes = [set(labels[start].tolist()) for start in starts]
        following, runs = list(starts), list(range(len(starts)))
        chosen: list[list[int]] = []
        for client in range(clients):
            chunks: list[int] = []
            seen: set[int] = set()
            for run in runs:
                if len(chunks) == self.classes_per_client:
                    break
                if seen.isdisjoint(classes[run]):
                    chunks.append(following[run])
                    seen |= classes[run]
                    following[run] += 1
            if len(chunks) < self.classes_per_client:
                raise _error(
                    "task.partition.classes_per_client",
                    f"client {client} of {clients:,} finds only {len(chunks)} of {self.classes_per_client} "
                    f"chunks that share no class; classes should be a whole number of chunks each "
                    f"({labels.shape[1]:,} samples), or use the partition shards",
                )
            runs = [run for run in runs if following[run] < ends[run]]
            chosen.append(chunks)
        return np.array(chosen, dtype=np.int64)


def _dealt_by_class(targets: Indices, held: npt.NDArray[np.bool_]) -> tuple[Indices, Indices]:
    """Samples of each class dealt evenly to its holders (clients, classes): flat indices and sizes."""
    anybodys: npt.NDArray[np.bool_] = np.any(held, axis=0)
    samples = np.argsort(targets, kind="stable")
    samples = samples[anybodys[targets[samples]]]
    labels, counts = np.unique(targets[samples], return_counts=True)
    owners = [np.zeros(0, dtype=np.int64)]
    for label, count in zip(labels, counts, strict=True):
        holders = np.flatnonzero(held[:, label])
        owners.append(np.repeat(holders, np.diff(np.arange(len(holders) + 1) * count // len(holders))))
    owner = np.concatenate(owners)
    return samples[np.argsort(owner, kind="stable")], np.bincount(owner, minlength=len(held))
