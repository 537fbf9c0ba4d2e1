"""The sequential executor: clients one after another, the fastest way on CPUs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import masks, rng
from ..loss import ClientLoss
from ..state import Batch, Clock, Stepped
from .exchange import Plan, Uploads
from .training import Client, Executor, cleared


class Sequential(Executor):
    """Trains one client after another."""

    def train_all(self, plan: Plan, clients: Sequence[int], uploads: Uploads) -> None:
        for number in clients:
            self.hooks.at = (plan.clock.round, number)
            with self.model_randomness(plan, number):
                client = self.download(plan, number)
                self.train_client(plan, client, uploads)
                self.upload(plan, client, uploads)

    def train_client(self, plan: Plan, client: Client, uploads: Uploads) -> None:
        """All local epochs, with the client's readjustment where it is due."""
        offered, place = self.settings(plan), self.hooks.where("local_step")
        device = self.task.device
        keys = {
            name: torch.tensor(number, device=device)
            for name, number in self.keys(plan, client.number).items()
        }
        epochs, clock, batches = self.task.federation.local_epochs, plan.clock, list[Batch]()
        checked = self.contracts is None
        metrics, sizes = list[dict[str, Tensor]](), list[int]()
        for epoch in range(epochs):
            clock = clock._replace(epoch=epoch, epochs=epochs)
            following = self.epoch(client.number, clock)
            # before the first epoch nothing has passed yet: the first minibatches stand in
            self.readjust(plan, client, clock, batches or following[: self.hooks.score_batches])
            batches = following
            for index, batch in enumerate(batches):
                own = {name: rng.fold(key, epoch, index) for name, key in keys.items()}
                offered |= {
                    "loss": ClientLoss(self.loss, client.mask, plan.state.params, own.get("dropout")),
                    "params": client.params,
                    "carry": client.carry,
                    "batch": batch,
                    "trainable": client.trainable,
                    "clock": clock,
                    "key": own.get("step"),
                }
                stepped = self.step(Stepped, place, **offered)
                if not checked and self.contracts:
                    self.contracts.parameters(place, stepped.params)
                    self.contracts.stepped(place, stepped.carry, stepped.metrics, plan.state.buffers)
                    checked = True
                client.params, client.carry = stepped.params, stepped.carry
                metrics.append(stepped.metrics)
                sizes.append(len(batch.targets))
        uploads.measure(metrics, sizes)
        if self.contracts:
            self.contracts.parameters(place, client.params)
        self.check_trained(plan, client.params, client.mask)
        self.readjust(plan, client, clock._replace(epoch=epochs), batches)
        if self.collects_score(plan):
            self.add_score(plan, client, batches, uploads)

    def readjust(self, plan: Plan, client: Client, clock: Clock, batches: Sequence[Batch]) -> None:
        """Moves the client's mask, if its part works on clients and is due now."""
        if not self.readjusts(plan, clock):
            return
        state, score = plan.state, {}
        if self.needs_score:
            score = self.score(plan, client, clock, batches)
        key = torch.tensor(self.readjust_key(clock, client.number), device=self.task.device)
        moved = self.readjusted(plan, client, clock, score, key)
        if self.contracts:
            where = self.hooks.where("readjust")
            self.contracts.parameters(where, moved.params)
            self.contracts.mask(where, moved.mask)
            self.contracts.frozen(where, state.frozen, moved.mask)
            self.contracts.values(where, moved.params, moved.mask, state.frozen, state.params)
            self.contracts.budget(where, moved.mask, plan.budget, self.hooks.promise("readjust"))
        client.carry = cleared(client, moved)
        client.params, client.mask = moved.params, moved.mask
        client.trainable = self.layout.params(masks.movable(client.mask, state.frozen))

    def upload(self, plan: Plan, client: Client, uploads: Uploads) -> None:
        """Adds the client's contribution, charges it, and keeps its row."""
        weight = torch.tensor(
            float(len(self.task.partition.train_of(client.number))), device=self.task.device
        )
        contribution = self.contribution(plan, client, weight)
        if self.contracts:
            self.contracts.summed(self.hooks.where("contribute"), contribution, uploads.sums)
        uploads.contribute(contribution)
        self.account(plan, client, contribution, uploads)
