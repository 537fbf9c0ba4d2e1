"""The sequential executor: clients one after another, the fastest way on CPUs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import masks
from ..state import Batch, Clock
from .exchange import Plan, Uploads
from .step import Given
from .training import Client, Executor, apart, cleared


class Sequential(Executor):
    """Trains one client after another."""

    def train_all(self, plan: Plan, clients: Sequence[int], uploads: Uploads) -> None:
        for numbers in apart(clients, self.size):
            self.hooks.at = (plan.clock.round, numbers[0])
            with self.model_randomness(plan, numbers[0]):
                group = []
                for number in numbers:
                    self.hooks.at = (plan.clock.round, number)
                    client = self.download(plan, number)
                    client.measured = Uploads() if plan.drop_non_finite else uploads
                    group.append(client)
                for client in self.train_group(plan, group, uploads):
                    self.hooks.at = (plan.clock.round, client.number)
                    self.upload(plan, client, uploads)

    def train_group(self, plan: Plan, group: Sequence[Client], uploads: Uploads) -> Sequence[Client]:
        """All local epochs, with each client's readjustment where it is due; who has not given up."""
        epochs, clock, batches = self.task.federation.local_epochs, plan.clock, list[list[Batch]]()
        for epoch in range(epochs):
            clock = clock._replace(epoch=epoch, epochs=epochs)
            following = [self.epoch(client.number, clock) for client in group]
            # before the first epoch nothing has passed yet: the first minibatches stand in
            first = [own[: self.hooks.score_batches] for own in following]
            self.readjust_group(plan, group, clock, batches or first)
            batches = following
            self.steps(plan, group, clock, batches)
            if plan.drop_non_finite:
                kept = [self.goes_on(plan, client, clock, uploads) for client in group]
                group = [client for client, good in zip(group, kept, strict=True) if good]
                batches = [own for own, good in zip(batches, kept, strict=True) if good]
                if not group:
                    break
        for client in group:
            self.hooks.at = (plan.clock.round, client.number)
            self.check_trained(plan, client.params, client.mask, later=True)
        self.readjust_group(plan, group, clock._replace(epoch=epochs), batches)
        if self.collects_score(plan):
            for client, own in zip(group, batches, strict=True):
                self.hooks.at = (plan.clock.round, client.number)
                self.add_score(plan, client, own, uploads)
        return group

    def goes_on(self, plan: Plan, client: Client, clock: Clock, uploads: Uploads) -> bool:
        """Whether loss and model are finite after an epoch; a client that says no has given up."""
        model = (*client.params.values(), *client.carry.buffers.values())
        if self.sound((t[None] for t in model), client.measured.metrics["loss"][None]):
            return True
        self.give_up(plan, client, clock, uploads)
        return False

    def steps(
        self, plan: Plan, group: Sequence[Client], clock: Clock, batches: Sequence[Sequence[Batch]]
    ) -> None:
        """One local epoch of the clients of a group."""
        for client, own in zip(group, batches, strict=True):
            self.hooks.at = (plan.clock.round, client.number)
            step, place = self.stepper(plan, clock), self.hooks.where("local_step")
            step = self.replayed(step, plan, clock)
            keys = self.step_keys(plan, client.number, clock, len(own))
            metrics = []
            for index, batch in enumerate(own):
                given = self.given(plan, client, batch, {name: each[index] for name, each in keys.items()})
                stepped = step(given)
                if self.contracts and not (clock.epoch or index):
                    self.contracts.parameters(place, stepped.params)
                    self.contracts.stepped(place, stepped.carry, stepped.metrics, plan.state.buffers)
                client.params, client.carry = stepped.params, stepped.carry
                metrics.append(stepped.metrics)
            client.measured.measure(metrics, [len(batch.targets) for batch in own])
            if self.contracts:
                self.contracts.parameters(place, client.params)

    def given(self, plan: Plan, client: Client, batch: Batch, keys: dict[str, Tensor]) -> Given:
        """What a client's step reads."""
        masks_ = (client.mask, client.trainable)
        return Given(client.params, client.carry, batch, *masks_, plan.state.params, keys)

    def step_keys(self, plan: Plan, number: int, clock: Clock, count: int) -> dict[str, Tensor]:
        """The keys of the steps of an epoch by purpose, (count,) each."""
        return {name: keys[0] for name, keys in self.epoch_keys(plan, [number], clock, count).items()}

    def readjust_group(
        self, plan: Plan, group: Sequence[Client], clock: Clock, batches: Sequence[Sequence[Batch]]
    ) -> None:
        """Moves the clients' masks, if their part works on clients and is due now."""
        if self.readjusts(plan, clock):
            for client, own in zip(group, batches, strict=True):
                self.hooks.at = (plan.clock.round, client.number)
                self.readjust(plan, client, clock, own)

    def readjust(self, plan: Plan, client: Client, clock: Clock, batches: Sequence[Batch]) -> None:
        """Moves the client's mask."""
        score = {}
        if self.needs_score:
            score = self.score(plan, client, clock, batches)
        key = torch.full((), self.readjust_key(clock, client.number), device=self.task.device)
        moved = self.readjusted(plan, client, clock, score, key)
        if self.contracts:
            where = self.hooks.where("readjust")
            self.contracts.parameters(where, moved.params)
            self.contracts.mask(where, moved.mask)
            self.contracts.frozen(where, plan.frozen, moved.mask)
            self.contracts.values(where, moved.params, moved.mask, plan.frozen, plan.state.params)
            self.contracts.budget(where, moved.mask, plan.budget, self.hooks.promise("readjust"))
        client.carry = cleared(client, moved)
        client.params, client.mask = moved.params, moved.mask
        client.trainable = self.layout.params(masks.movable(client.mask, plan.frozen))

    def upload(self, plan: Plan, client: Client, uploads: Uploads) -> None:
        """Adds the client's contribution, charges it, and keeps its row."""
        samples = float(len(self.task.partition.train_of(client.number)))
        weight = torch.full((), samples, device=self.task.device)
        leaving = client
        if self.hooks.has_extra("upload"):
            leaving, weight = self.leaving(plan, client, weight, self.upload_key(plan, client.number))
            self.check_leaving(plan, leaving.params, client.mask)
        arrived = self.arrive(leaving)
        contribution = self.beside(arrived, self.contribution(plan, arrived, weight))
        if self.contracts:
            self.contracts.summed(self.hooks.where("contribute"), contribution, uploads.before())
        uploads.contribute(client.number, contribution)
        if client.measured is not uploads:
            uploads.take_measured(client.measured)
        self.account(plan, client, arrived.carry.buffers, uploads)
