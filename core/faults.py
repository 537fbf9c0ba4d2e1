"""Faults of a round: which sampled clients are lost, and what they cost all the same.

All but "non_finite" are drawn before anybody trains, from streams keyed by seed, round and client: methods
with one seed lose the same clients, whatever the executor and the number of workers.

| reason | what happened | charged |
| --- | --- | --- |
| "dropout" | the client left after its download | download |
| "late" | it was still training at the deadline | download, the FLOPs until then |
| "upload_failure" | it trained and sent, and nothing arrived | all that one which reports is charged |
| "non_finite" | its loss or model became NaN or infinite, and it gave up | download, FLOPs until then |

A model counts as infinite, too, where it would be sent as such: beyond float16, if `ledger.values` says so.
None of them keeps anything of the round: its row is that of its last report. It does hold what it downloaded.
A paper's own formula counts a client's whole round, so it is charged to who uploads.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from . import rng
from .config import FaultsConfig
from .execution.exchange import Plan, Uploads
from .execution.training import Executor
from .task import Task

Fate = Literal["dropout", "late", "upload_failure", "non_finite"]


class Faults:
    """What `[faults]` does to a run's clients."""

    def __init__(self, config: FaultsConfig, task: Task) -> None:
        self.config, self.task = config, task
        self.any = config != FaultsConfig()

    def fate(self, round_: int, client: int) -> Fate | None:
        """Why the client is lost in this round, as far as it can be known before; None: it is not."""
        if self._chance("dropout", round_, client) < self.config.dropout:
            return "dropout"
        if self._until_deadline(client) < 1:
            return "late"
        if self._chance("upload", round_, client) < self.config.upload_failure:
            return "upload_failure"
        return None

    def time(self, client: int) -> float:
        """How long a client trains a round, in times of one of mean data at median speed.

        Samples over speed: local epochs are the same for all, and FLOPs of a sample do not enter, or methods
        would lose other clients. Speeds are lognormal with median 1, and a client's stays the same.
        """
        mean = self.task.partition.pool_samples / self.task.partition.clients
        samples = len(self.task.partition.train_of(client))
        if not self.config.speed_spread:
            return samples / mean
        drawn = rng.generator(self.task.seed, "faults", "speed", client).standard_normal()
        return float(samples / mean / math.exp(self.config.speed_spread * drawn))

    def work(self, round_: int, clients: Iterable[int]) -> dict[int, int]:
        """Samples that each client has to train on here: none for one that will not get to its upload."""
        idle = ("dropout", "late")
        return {
            client: 0
            if self.any and self.fate(round_, client) in idle
            else len(self.task.partition.train_of(client))
            for client in clients
        }

    def train(self, executor: Executor, plan: Plan, clients: Sequence[int]) -> Uploads:
        """One round of local training: what those send who report. All are charged."""
        if not self.any:
            return executor.train(plan, clients)
        fates = {client: self.fate(plan.clock.round, client) for client in clients}
        by_fate = {fate: [c for c in clients if fates[c] == fate] for fate in fates.values()}
        uploads = executor.train(plan, by_fate.pop(None, []))
        for fate, lost in by_fate.items():
            if fate == "upload_failure":
                # trained, because what the upload costs can depend on it; into sums and rows that are lost
                gone = executor.train(replace(plan, state=plan.state.copy()), lost)
                given_up = gone.lost.get("non_finite", [])
                for client in given_up:
                    lost.remove(client)
                uploads.lose("non_finite", *given_up)
            else:
                for client in lost:
                    self._charge(executor, plan, client, trained=fate == "late")
            uploads.lose(str(fate), *lost)
        return uploads

    def _charge(self, executor: Executor, plan: Plan, client: int, trained: bool) -> None:
        """The download of a client that sends nothing, and its training up to the deadline."""
        ledger = executor.ledger
        ledger.download(client)
        ledger.beside(plan.broadcast, "download", client)
        if trained:
            epochs = self.task.federation.local_epochs
            samples = epochs * len(self.task.partition.train_of(client))
            ledger.train(math.floor(samples * self._until_deadline(client)))

    def _until_deadline(self, client: int) -> float:
        """The part of its training that a client has done at the deadline; 1 or more: all of it."""
        return math.inf if self.config.deadline is None else self.config.deadline / self.time(client)

    def _chance(self, what: str, round_: int, client: int) -> float:
        """Uniform in [0, 1)."""
        return rng.number(self.task.seed, "faults", what, round_, client) % 2**53 / 2**53


def merged(parts: Iterable[Mapping[str, Sequence[int]]], clients: Sequence[int]) -> dict[str, list[int]]:
    """The lost clients of all workers by reason, each list in the order in which they were sampled."""
    lost: dict[str, list[int]] = {}
    for part in parts:
        for reason, some in part.items():
            lost.setdefault(reason, []).extend(some)
    return {reason: sorted(lost[reason], key=clients.index) for reason in sorted(lost)}
