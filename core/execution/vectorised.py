"""The vectorised executor: clients stacked and stepped together by `torch.func.vmap`.

Clients are sorted by their number of minibatches, so that those which still train are a prefix of the
stack. A short minibatch is filled up with samples that do not count; where a model or a step looks at the
whole minibatch (BatchNorm, pruned activations), clients are stepped in groups of equal size instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .. import masks, rng
from ..state import Batch, Carry, Clock, Masks, Params, Scores
from .exchange import Plan, Uploads
from .step import IGNORED, Given, Step, filled, stacked
from .training import Client, Executor, apart, cleared


@dataclass
class Chunk:
    """Clients that train together, most minibatches first; tensors have the client as first dimension.

    `mask` and `trainable` are the server's, without that dimension, until clients readjust.
    """

    clients: list[Client]
    params: Params
    carry: Carry
    mask: Masks
    trainable: Masks
    readjusted: bool = False

    def one(self, at: int) -> Client:
        """A client, with views of its own tensors."""
        client = self.clients[at]
        client.params = _pick(self.params, at)
        client.carry = Carry(
            _pick(self.carry.buffers, at), {k: _pick(v, at) for k, v in self.carry.state.items()}
        )
        client.mask = _pick(self.mask, at) if self.readjusted else self.mask
        return client


class Vectorised(Executor):
    """Trains up to `size` clients at once."""

    size = 1

    def train_all(self, plan: Plan, clients: Sequence[int], uploads: Uploads) -> None:
        by_samples = sorted(clients, key=lambda c: (-len(self.task.partition.train_of(c)), c))
        for numbers in apart(by_samples, self.size):
            self.hooks.at = (plan.clock.round, None)
            # what layers other than dropout draw repeats, but is not what they draw one after another
            with self.model_randomness(plan, numbers[0]):
                self.train_chunk(plan, numbers, uploads)

    def stack(self, plan: Plan, numbers: Sequence[int]) -> Chunk:
        """The chunk as it downloads."""
        clients = [self.download(plan, number) for number in numbers]
        # all of them downloaded the same
        params = {name: p.expand(len(clients), *p.shape) for name, p in clients[0].params.items()}
        carry: Carry = pytree.tree_map(lambda *each: torch.stack(each), *(c.carry for c in clients))
        return Chunk(clients, params, carry, plan.state.mask, plan.trainable)

    def train_chunk(self, plan: Plan, numbers: Sequence[int], uploads: Uploads) -> None:
        """All local epochs of a chunk, its readjustments, and its upload."""
        chunk, device = self.stack(plan, numbers), self.task.device
        every = [self.keys(plan, number) for number in numbers]
        keys = {name: torch.tensor([own[name] for own in every], device=device) for name in every[0]}
        epochs, clock = self.task.federation.local_epochs, plan.clock
        batches: list[list[Batch]] = []
        for epoch in range(epochs):
            clock = clock._replace(epoch=epoch, epochs=epochs)
            following = [self.epoch(number, clock) for number in numbers]
            first = [each[: self.hooks.score_batches] for each in following]
            self.readjust(plan, chunk, clock, batches or first)
            batches = following
            step = stacked(self.stepper(plan, clock), chunk.readjusted)
            for index in range(len(batches[0])):
                for begin, end, batch in self.groups(batches, index):
                    self.step_clients(plan, chunk, step, (begin, end), batch, keys, clock, index, uploads)
        self.check_trained(plan, chunk.params, chunk.mask)
        self.readjust(plan, chunk, clock._replace(epoch=epochs), batches)
        if self.collects_score(plan):
            for at, own_batches in enumerate(batches):
                self.add_score(plan, chunk.one(at), own_batches, uploads)
        self.upload(plan, chunk, uploads)

    def groups(self, batches: Sequence[Sequence[Batch]], index: int) -> Iterator[tuple[int, int, Batch]]:
        """The stacked minibatches of a step, with the range of the clients that they belong to."""
        active = [own[index] for own in batches if len(own) > index]
        sizes = [len(batch.targets) for batch in active]
        if not self.whole_batches():
            yield 0, len(active), _stacked(active, max(sizes))
            return
        begin = 0
        for size, group in groupby(sizes):  # sizes fall, because clients are sorted
            end = begin + len(list(group))
            yield begin, end, _stacked(active[begin:end], size)
            begin = end

    def step_clients(
        self,
        plan: Plan,
        chunk: Chunk,
        step: Step,
        range_: tuple[int, int],
        batch: Batch,
        keys: dict[str, Tensor],
        clock: Clock,
        index: int,
        uploads: Uploads,
    ) -> None:
        """One step of the clients of a range."""
        place, first = self.hooks.where("local_step"), slice(*range_)
        everybody = range_ == (0, len(chunk.clients))
        own_masks = (chunk.mask, chunk.trainable)
        own_params, own_carry = chunk.params, chunk.carry
        if not everybody:
            own_params, own_carry = pytree.tree_map(lambda t: t[first], (own_params, own_carry))
            own_masks = pytree.tree_map(lambda t: t[first], own_masks) if chunk.readjusted else own_masks
        own_keys = {name: rng.fold(key[first], clock.epoch, index) for name, key in keys.items()}
        stepped = step(Given(own_params, own_carry, batch, *own_masks, plan.state.params, own_keys))
        if self.contracts and not (clock.epoch or index):
            shown = pytree.tree_map(lambda t: t[0], stepped)
            self.contracts.parameters(place, shown.params)
            self.contracts.stepped(place, shown.carry, shown.metrics, plan.state.buffers)
        if everybody:
            chunk.params, chunk.carry = stepped.params, stepped.carry
        else:
            chunk.params, chunk.carry = pytree.tree_map(
                lambda held, new: torch.cat([held[: range_[0]], new, held[range_[1] :]]),
                (chunk.params, chunk.carry),
                (stepped.params, stepped.carry),
            )
        sizes = (batch.targets != IGNORED).sum(1)
        sums = {name: (value.double() * sizes).sum() for name, value in stepped.metrics.items()}
        uploads.add(uploads.metrics, sums)
        uploads.steps_weight += sum(self.batch_size(client.number, index) for client in chunk.clients[first])

    def batch_size(self, number: int, index: int) -> int:
        """Samples of a client's minibatch, known without asking the device."""
        size = self.task.federation.batch_size
        return min(size, len(self.task.partition.train_of(number)) - index * size)

    def readjust(self, plan: Plan, chunk: Chunk, clock: Clock, batches: Sequence[Sequence[Batch]]) -> None:
        """Moves the clients' masks, if their part works on clients and is due now."""
        if not self.readjusts(plan, clock):
            return
        state, scores = plan.state, Scores()
        if self.needs_score:
            each = [self.score(plan, chunk.one(at), clock, own) for at, own in enumerate(batches)]
            scores = pytree.tree_map(lambda *own: torch.stack(own), *each)
        numbers = [self.readjust_key(clock, client.number) for client in chunk.clients]
        keys = torch.tensor(numbers, device=self.task.device)
        stacked = chunk.mask if chunk.readjusted else _spread(chunk.mask, len(chunk.clients))

        def one(params: Params, mask: Masks, carry: Carry, score: Scores, key: Tensor) -> Any:
            client = Client(-1, params, mask, carry, {})
            moved = self.readjusted(plan, client, clock, score, key)
            return moved.params, moved.mask, cleared(client, moved)

        params, mask, carry = torch.func.vmap(one)(chunk.params, stacked, chunk.carry, scores, keys)
        chunk.params, chunk.mask, chunk.carry, chunk.readjusted = params, mask, carry, True
        chunk.trainable = masks.movable(mask, state.frozen)
        self.check_readjusted(plan, chunk)

    def check_readjusted(self, plan: Plan, chunk: Chunk) -> None:
        """The contract of a readjustment, client by client."""
        if not self.contracts:
            return
        for at, client in enumerate(chunk.clients):
            self.hooks.at = (plan.clock.round, client.number)
            where, own = self.hooks.where("readjust"), chunk.one(at)
            self.contracts.parameters(where, own.params)
            self.contracts.mask(where, own.mask)
            self.contracts.frozen(where, plan.state.frozen, own.mask)
            self.contracts.values(where, own.params, own.mask, plan.state.frozen, plan.state.params)
            self.contracts.budget(where, own.mask, plan.budget, self.hooks.promise("readjust"))
        self.hooks.at = (plan.clock.round, None)

    def upload(self, plan: Plan, chunk: Chunk, uploads: Uploads) -> None:
        """Adds the clients' contributions, charges them, and keeps their rows."""
        self.arrive_all(chunk)
        sizes = [float(len(self.task.partition.train_of(client.number))) for client in chunk.clients]
        weights = torch.tensor(sizes, device=self.task.device)

        def one(params: Params, mask: Masks, carry: Carry, weight: Tensor) -> dict[str, Tensor]:
            return self.contribution(plan, Client(-1, params, mask, carry, {}), weight)

        owned = 0 if chunk.readjusted else None
        contributions = torch.func.vmap(one, in_dims=(0, owned, 0, 0))(
            chunk.params, chunk.mask, chunk.carry, weights
        )
        if any(name.startswith("extra/") for name in contributions):
            arrived = [self.beside(chunk.one(at), _pick(contributions, at)) for at in range(len(sizes))]
            contributions = _stacked_as(contributions, arrived)
        uploads.dtypes |= {name: value.dtype for name, value in contributions.items()}
        sums = {name: value.sum(0, dtype=torch.float64) for name, value in contributions.items()}
        if self.contracts:
            self.contracts.summed(self.hooks.where("contribute"), sums, uploads.sums)
        uploads.add(uploads.sums, sums)
        for at in range(len(chunk.clients)):
            self.account(plan, chunk.one(at), uploads)

    def arrive_all(self, chunk: Chunk) -> None:
        """Charges the uploads; the chunk becomes what the server receives."""
        clients = []
        for at in range(len(chunk.clients)):
            client = replace(chunk.one(at))
            self.arrive(client)
            clients.append(client)
        if self.ledger.alters:
            chunk.params = _stacked_as(chunk.params, [client.params for client in clients])
            buffers = _stacked_as(chunk.carry.buffers, [client.carry.buffers for client in clients])
            chunk.carry = chunk.carry._replace(buffers=buffers)
            if chunk.readjusted:
                chunk.mask = _stacked_as(chunk.mask, [client.mask for client in clients])


def _pick(tensors: Params, at: int) -> Params:
    return {name: tensor[at] for name, tensor in tensors.items()}


def _stacked_as(old: Params, each: Sequence[Params]) -> Params:
    """Each client's tensors stacked, in memory as `old` lies."""
    made = {name: torch.empty_like(tensor) for name, tensor in old.items()}
    for name, tensor in made.items():
        torch.stack([own[name] for own in each], out=tensor)
    return made


def _spread(tensors: Masks, clients: int) -> Masks:
    return {name: tensor.expand(clients, *tensor.shape) for name, tensor in tensors.items()}


def _stacked(batches: Sequence[Batch], size: int) -> Batch:
    """Inputs (clients, size, …) and targets (clients, size), filled up where a minibatch is short."""
    full = [filled(batch, size) for batch in batches]
    return Batch(torch.stack([x for x, _ in full]), torch.stack([y for _, y in full]))
