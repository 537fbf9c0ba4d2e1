"""The sequential executor: clients one after another, their uploads summed as they come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import masks, rng
from ..budget import Budget
from ..compose import Hooks
from ..contracts import Contracts, versions
from ..ledger import Ledger
from ..loss import ClientLoss, ModelLoss
from ..state import (
    Batch,
    Carry,
    Clock,
    Masks,
    Memory,
    Params,
    Readjusted,
    Scores,
    ServerState,
    Stepped,
    Sums,
    moved_to,
)
from ..task import Task


@dataclass(frozen=True)
class Plan:
    """What the server sends to this round's clients, and the settings of their training."""

    state: ServerState
    budget: Budget
    clock: Clock
    trainable: Masks
    target: float
    lr: float
    broadcast: Params = field(default_factory=dict)


@dataclass
class Uploads:
    """The cohort's contributions, summed; every tensor has the size of the model once."""

    sums: Sums = field(default_factory=dict)
    buffers: Params = field(default_factory=dict)
    score: Scores = field(default_factory=dict)
    metrics: dict[str, Tensor] = field(default_factory=dict)
    samples: int = 0
    steps_weight: int = 0

    def add(self, into: dict[str, Tensor], entries: dict[str, Tensor]) -> None:
        """Adds entries by name; the first is copied, because it may be the caller's own tensor."""
        for name, value in entries.items():
            if name in into:
                into[name] += value
            else:
                into[name] = value.clone()


@dataclass
class Client:
    """One client's model while it trains."""

    number: int
    params: Params
    mask: Masks
    carry: Carry
    loss: ClientLoss
    trainable: Masks
    score_samples: int = 0
    score_bytes: int = 0


class Sequential:
    """Trains one client after another on one device."""

    def __init__(
        self, task: Task, hooks: Hooks, loss: ModelLoss, ledger: Ledger, contracts: Contracts | None
    ) -> None:
        self.task, self.hooks, self.loss = task, hooks, loss
        self.ledger, self.contracts = ledger, contracts
        self.step = hooks.found["local_step"]
        self.needs_score = hooks.takes("readjust", "score")
        self.needs_key = hooks.takes("local_step", "key")

    def train(self, plan: Plan, clients: Sequence[int]) -> Uploads:
        """One round of local training of these clients."""
        uploads = Uploads()
        self.task.model.train()
        for number in clients:
            self.hooks.at = (plan.clock.round, number)
            server = (plan.state.params, plan.state.mask, plan.state.frozen, plan.state.buffers)
            before = versions(*server)
            with self.model_randomness(plan, number):
                client = self.download(plan, number)
                self.train_client(plan, client, uploads)
                self.upload(plan, client, uploads)
            if versions(*server) != before:
                raise self.hooks.where("local_step").breach(
                    "wrote into a tensor it was given; return new ones"
                )
        self.hooks.at = (plan.clock.round, None)
        return uploads

    @contextmanager
    def model_randomness(self, plan: Plan, number: int) -> Iterator[None]:
        """Seeds what layers draw themselves (dropout) from this client's stream, and leaves no trace."""
        device = self.task.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(int(rng.key(self.task.seed, "model", plan.clock.round, number)))
            yield

    def sent(self, client: Client) -> Masks:
        """The mask of the values that a client sends."""
        return masks.support(client.params, client.mask) if self.hooks.sends == "support" else client.mask

    def download(self, plan: Plan, number: int) -> Client:
        """The client's state is the server's; its optimiser starts fresh."""
        state = plan.state
        self.ledger.download(number, extra=self.ledger.sidecar(plan.broadcast))
        fresh: dict[str, Params] = {}
        if self.hooks.get("client_init"):
            fresh = self.hooks.call(
                "client_init",
                dict,
                params=state.params,
                mask=state.mask,
                momentum=self.task.federation.momentum,
                broadcast=plan.broadcast,
                memory=moved_to(state.rows.get(number, {}), self.task.device),
            )
        loss = ClientLoss(self.loss, state.mask, state.params)
        params, mask = dict(state.params), dict(state.mask)
        return Client(number, params, mask, Carry(dict(state.buffers), fresh), loss, plan.trainable)

    def train_client(self, plan: Plan, client: Client, uploads: Uploads) -> None:
        """All local epochs, with the client's readjustment where it is due."""
        federation, clock = self.task.federation, plan.clock
        offered: dict[str, Any] = {
            "anchor": plan.state.params,
            "lr": plan.lr,
            "momentum": federation.momentum,
            "weight_decay": federation.weight_decay,
            "target": plan.target,
        }
        place = self.hooks.where("local_step")
        number_of_step, batches = 0, list[Batch]()
        for epoch in range(federation.local_epochs):
            clock = clock._replace(epoch=epoch, epochs=federation.local_epochs)
            following = self.task.batches(client.number, clock.round, epoch)
            # before the first epoch nothing has passed yet: the first minibatches stand in
            self.readjust_client(plan, client, clock, batches or following[: self.hooks.score_batches])
            batches = following
            for batch in batches:
                offered |= {
                    "loss": client.loss,
                    "params": client.params,
                    "carry": client.carry,
                    "batch": batch,
                    "trainable": client.trainable,
                    "clock": clock,
                }
                if self.needs_key:
                    path = (self.task.seed, "step", clock.round, client.number, number_of_step)
                    offered["key"] = rng.key(*path, device=self.task.device)
                stepped = self.step(Stepped, place, **offered)
                if not number_of_step and self.contracts:
                    self.contracts.parameters(place, stepped.params)
                    self.contracts.stepped(place, stepped.carry, stepped.metrics, plan.state.buffers)
                client.params, client.carry = stepped.params, stepped.carry
                size = len(batch.targets)
                uploads.add(uploads.metrics, {name: m * size for name, m in stepped.metrics.items()})
                uploads.steps_weight += size
                number_of_step += 1
        clock = clock._replace(epoch=federation.local_epochs)
        if self.contracts:
            self.contracts.parameters(place, client.params)
            self.contracts.values(place, client.params, client.mask, plan.state.frozen, plan.state.params)
        self.readjust_client(plan, client, clock, batches)
        self.collect_score(plan, client, batches, uploads)

    def readjust_client(self, plan: Plan, client: Client, clock: Clock, batches: Sequence[Batch]) -> None:
        """Moves the client's mask, if its part works on clients and is due now."""
        if self.hooks.site != "client" or not self.hooks.get("readjust") or not self.due(clock, plan.budget):
            return
        state = plan.state
        score = self.score(client, batches) if self.needs_score else {}
        moved = self.hooks.call(
            "readjust",
            Readjusted,
            params=client.params,
            mask=client.mask,
            frozen=state.frozen,
            score=score,
            target=plan.target,
            budget=plan.budget,
            clock=clock,
            key=rng.key(
                self.task.seed, "readjust", clock.round, client.number, clock.epoch, device=self.task.device
            ),
            memory={},
        )
        if self.contracts:
            where = self.hooks.where("readjust")
            self.contracts.parameters(where, moved.params)
            self.contracts.mask(where, moved.mask)
            self.contracts.frozen(where, state.frozen, moved.mask)
            self.contracts.values(where, moved.params, moved.mask, state.frozen, state.params)
            self.contracts.budget(where, moved.mask, plan.budget, self.hooks.promise("readjust"))
        client.carry = _cleared(client, moved)
        client.params, client.mask = moved.params, moved.mask
        client.loss = ClientLoss(self.loss, client.mask, state.params)
        client.trainable = masks.movable(client.mask, state.frozen)

    def due(self, clock: Clock, budget: Budget) -> bool:
        """Whether the readjustment runs now."""
        if not self.hooks.get("due"):
            return self.hooks.site != "client" or clock.epoch == clock.epochs
        return self.hooks.call("due", bool, clock=clock, budget=budget)

    def score(self, client: Client, batches: Sequence[Batch]) -> Scores:
        """The growth score of this client's dense gradient on its last minibatches."""
        used = batches[-self.hooks.score_batches :]
        gradient = client.loss.dense_grad(client.params, client.carry, used)
        client.score_samples += sum(len(batch.targets) for batch in used)
        gradient = {name: gradient[name] for name in client.mask}
        if not self.hooks.get("grow_score"):
            return {name: g.abs() for name, g in gradient.items()}
        score = self.hooks.call("grow_score", dict, params=client.params, dense_grad=gradient)
        if self.contracts:
            self.contracts.scores(self.hooks.where("grow_score"), score)
        return score

    def collect_score(self, plan: Plan, client: Client, batches: Sequence[Batch], uploads: Uploads) -> None:
        """Adds this client's score to the server's, in rounds in which the server will readjust by it."""
        if self.hooks.site == "server:end" and self.needs_score and self.due(plan.clock, plan.budget):
            weight = len(self.task.partition.train_of(client.number))
            score = self.score(client, batches)
            client.score_bytes += sum(s.numel() * s.element_size() for s in score.values())
            uploads.add(uploads.score, {name: weight * value for name, value in score.items()})

    def upload(self, plan: Plan, client: Client, uploads: Uploads) -> None:
        """Adds the client's contribution and keeps its row."""
        state, samples = plan.state, len(self.task.partition.train_of(client.number))
        weight = torch.tensor(float(samples), device=self.task.device)
        contribution = self.hooks.call(
            "contribute",
            dict,
            params=client.params,
            mask=client.mask,
            anchor=state.params,
            weight=weight,
            carry=client.carry,
        )
        if self.contracts:
            self.contracts.summed(self.hooks.where("contribute"), contribution, uploads.sums)
        beside = {name: value for name, value in contribution.items() if name.startswith("extra/")}
        extra = client.score_bytes + self.ledger.sidecar(beside)
        self.ledger.train(samples * self.task.federation.local_epochs, client.score_samples)
        self.ledger.upload(client.number, self.sent(client), client.params, client.carry.buffers, extra)
        uploads.add(uploads.sums, contribution)
        buffers = {name: samples * b.to(torch.float64) for name, b in client.carry.buffers.items()}
        uploads.add(uploads.buffers, buffers)
        uploads.samples += samples
        if self.hooks.get("client_final"):
            row: Memory = self.hooks.call(
                "client_final",
                dict,
                params=client.params,
                anchor=state.params,
                carry=client.carry,
                memory=moved_to(state.rows.get(client.number, {}), self.task.device),
            )
            if self.contracts:
                self.contracts.memory(self.hooks.where("client_final"), row)
            state.rows[client.number] = moved_to(row, "cpu")


def _cleared(client: Client, moved: Readjusted) -> Carry:
    """The carry with optimiser state zero wherever the client's mask or value changed."""
    changed = {
        name: (moved.mask[name] != client.mask[name]) | (moved.params[name] != client.params[name])
        for name in client.mask
    }
    state = {
        kind: {
            name: torch.where(changed[name], 0, value)
            if name in changed and value.shape == changed[name].shape
            else value
            for name, value in entries.items()
        }
        for kind, entries in client.carry.state.items()
    }
    return Carry(client.carry.buffers, state)
