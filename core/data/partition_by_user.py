"""A natural partition: who made each sample is read from files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import Field

from .partition import Indices, Partition, PartitionRule, _error, _need_samples, _shuffled, _usable


class ByUser(PartitionRule):
    """A client is one user: all train samples with one id, as a file lists ids (writers, speakers, …).

    Fewer federation.clients than users draws that many users. A client's test samples are those with its
    id; one without any (the ids of the test set may all be others, or not be given) is tested on an equal
    share, one of as many as there are clients, of the shuffled test set. Clients are in the order of their
    ids.
    """

    train_ids: Path = Field(
        description="File with an integer id for each train sample, in the data set's order: .npy, or text "
        "with one id a line."
    )
    test_ids: Path | None = Field(
        default=None, description="The same for the test samples; unset gives every client an equal share."
    )

    def split(
        self, train_targets: Indices, test_targets: Indices, clients: int, rng: np.random.Generator
    ) -> Partition:
        """Needs as many users as clients."""
        _need_samples(clients, len(train_targets), "train")
        ids = _read("train_ids", self.train_ids, len(train_targets), "train")
        users = np.unique(ids)
        if clients > len(users):
            raise _error(
                "federation.clients",
                f"{clients:,} clients, but {self.train_ids} names {len(users):,} users; "
                f"use at most {len(users):,}",
            )
        chosen = np.sort(rng.choice(users, clients, replace=False))
        train, train_sizes = _grouped(ids, chosen)

        steps = np.arange(clients + 1, dtype=np.int64) * len(test_targets) // clients
        test, test_sizes = rng.permutation(len(test_targets)), np.diff(steps)
        if self.test_ids is not None:
            own, own_sizes = _grouped(_read("test_ids", self.test_ids, len(test), "test"), chosen)
            without = own_sizes == 0
            shares = test[np.repeat(without, test_sizes)]
            owners = [np.repeat(np.arange(clients), own_sizes)]
            owners.append(np.repeat(np.flatnonzero(without), test_sizes[without]))
            order = np.argsort(np.concatenate(owners), kind="stable")
            test = np.concatenate([own, shares])[order]
            test_sizes = np.where(without, test_sizes, own_sizes)
        return _usable(_shuffled(train, train_sizes, rng), train_sizes, test, test_sizes)


def _grouped(ids: Indices, users: Indices) -> tuple[Indices, Indices]:
    """Samples of each of the (sorted) users, user by user: flat indices and sizes."""
    samples = np.flatnonzero(np.isin(ids, users))
    owners = np.searchsorted(users, ids[samples])
    return samples[np.argsort(owners, kind="stable")], np.bincount(owners, minlength=len(users))


def _read(setting: str, path: Path, samples: int, part: str) -> Indices:
    """The ids of a file, int64 (samples,). Raises `ConfigError` at the setting for anything else."""
    place = f"task.partition.{setting}"
    try:
        ids: npt.NDArray[np.generic]
        if path.suffix == ".npy":
            loaded = np.load(path, allow_pickle=False)
            if not isinstance(loaded, np.ndarray):
                raise ValueError("an archive of arrays, not one array")
            ids = loaded
        else:
            ids = np.array(
                [int(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
            )
    except (OSError, ValueError, EOFError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise _error(place, f"cannot read {path}: {reason}") from None
    if ids.ndim != 1 or (len(ids) and not np.issubdtype(ids.dtype, np.integer)):
        raise _error(
            place, f"{path} holds {ids.dtype} of shape {ids.shape}; expected one integer for each sample"
        )
    if len(ids) != samples:
        raise _error(place, f"{path} holds {len(ids):,} ids, but the data set has {samples:,} {part} samples")
    return ids.astype(np.int64)
