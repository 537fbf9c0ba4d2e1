"""The vectorised executor: clients stacked and stepped together by `torch.func.vmap`.

Clients are sorted by their number of minibatches, so that those which still train are a prefix of the
stack. A short minibatch is filled up with samples that do not count; where a model or a step looks at the
whole minibatch (BatchNorm, pruned activations), clients are stepped in groups of equal size instead.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .. import masks
from ..contracts import ContractError
from ..memory import out_of_memory
from ..state import Carry, Clock, Masks, Params, Scores
from ..transfer import to_device
from .exchange import Plan, Totals, Uploads
from .stacked_batches import StackedBatches
from .step import IGNORED, Given, Step, stacked
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
    measured: Totals = field(default_factory=dict)
    """each client's own sums of metrics, (clients,), as long as it may be dropped"""
    received: Params = field(default_factory=dict)
    """buffers as the server knows them"""
    contributions: Params = field(default_factory=dict)
    sums: Params = field(default_factory=dict)

    def measure(self, clients: slice, sums: Totals) -> None:
        """Adds the metrics of a step of some clients, float64."""
        for name, value in sums.items():
            if name not in self.measured:
                self.measured[name] = value.new_zeros(len(self.clients))
            self.measured[name][clients] += value

    def only(self, places: Sequence[int]) -> Chunk:
        """The chunk of some of its clients."""
        at = to_device(places, next(iter(self.params.values())).device)
        params, carry, measured = pytree.tree_map(lambda t: t[at], (self.params, self.carry, self.measured))
        mask, trainable = self.mask, self.trainable
        if self.readjusted:
            mask, trainable = pytree.tree_map(lambda t: t[at], (mask, trainable))
        clients = [self.clients[place] for place in places]
        return Chunk(clients, params, carry, mask, trainable, self.readjusted, measured)

    def one(self, at: int) -> Client:
        """A client, with views of its own tensors."""
        state = {kind: _pick(own, at) for kind, own in self.carry.state.items()}
        carry = Carry(_pick(self.carry.buffers, at), state)
        return self._with(at, _pick(self.params, at), carry, self.mask_of(at))

    def each(self) -> Iterator[Client]:
        """`one` of each client, in a third of the time: views of all clients are made at once."""
        count = len(self.clients)
        params, buffers = _apart(self.params, count), _apart(self.carry.buffers, count)
        state = {kind: _apart(own, count) for kind, own in self.carry.state.items()}
        own_masks = _apart(self.mask, count) if self.readjusted else [self.mask] * count
        for at, mask in enumerate(own_masks):
            carry = Carry(buffers[at], {kind: own[at] for kind, own in state.items()})
            yield self._with(at, params[at], carry, mask)

    def _with(self, at: int, params: Params, carry: Carry, mask: Masks) -> Client:
        client = self.clients[at]
        client.params, client.carry, client.mask = params, carry, mask
        return client

    def mask_of(self, at: int) -> Masks:
        """A client's mask: the very server's until it readjusts."""
        return _pick(self.mask, at) if self.readjusted else self.mask


class Vectorised(Executor):
    """Trains up to `size` clients at once; fewer from the moment on in which they do not fit into memory."""

    def train_all(self, plan: Plan, clients: Sequence[int], uploads: Uploads) -> None:
        waiting = sorted(clients, key=lambda c: (-len(self.task.partition.train_of(c)), c))
        while waiting:
            trained = list[int]()
            for numbers in apart(waiting, self.size):
                self.hooks.at = (plan.clock.round, None)
                if not self.fits(plan, numbers, uploads):
                    break
                trained += numbers
            waiting = [*(Counter(waiting) - Counter(trained)).elements()]

    def fits(self, plan: Plan, numbers: Sequence[int], uploads: Uploads) -> bool:
        """Trains a chunk. False, nothing done, and half as many from now on, if memory does not hold it."""
        kept, charged = uploads.measured(self.collects_score(plan)), self.ledger.mark(numbers)
        try:
            # what layers other than dropout draw repeats, but is not what they draw one after another
            with self.model_randomness(plan, numbers[0]):
                chunk = self.train_chunk(plan, numbers, uploads)
                if chunk:
                    self.contribute(plan, chunk)
        except Exception as error:
            if not out_of_memory(error) or len(numbers) == 1:
                raise
        else:
            if chunk:
                self.upload(plan, chunk, uploads)
            return True
        # here, where the error and with it the tensors of its frames are gone
        chunk = None
        uploads.back_to(kept)
        self.ledger.back_to(charged)
        if self.task.device.type == "cuda":
            torch.cuda.empty_cache()
        self.size = len(numbers) // 2
        self.say(
            f"{len(numbers)} clients at once do not fit into the memory of {self.task.device}: {self.size} "
            "at once from now on (execution.chunk); the results are those of that setting"
        )
        return False

    def stack(self, plan: Plan, numbers: Sequence[int]) -> Chunk:
        """The chunk as it downloads."""
        clients = [self.download(plan, numbers[0])]
        clients += [self.download(plan, number, clients[0]) for number in numbers[1:]]
        # all of them downloaded the same; copies, so that the first step is of the form of all others
        params = {name: _copies(p, len(clients)) for name, p in clients[0].params.items()}
        carry: Carry = pytree.tree_map(lambda *each: torch.stack(each), *(c.carry for c in clients))
        return Chunk(clients, params, carry, plan.state.mask, plan.trainable)

    def train_chunk(self, plan: Plan, numbers: Sequence[int], uploads: Uploads) -> Chunk | None:
        """All local epochs of a chunk and its readjustments; None if every client has given up."""
        chunk = self.stack(plan, numbers)
        epochs, clock, passed = self.task.federation.local_epochs, plan.clock, None
        for epoch in range(epochs):
            clock = clock._replace(epoch=epoch, epochs=epochs)
            batches = self.stacked_epoch([client.number for client in chunk.clients], clock)
            # before the first epoch nothing has passed yet: the first minibatches stand in
            self.readjust(plan, chunk, clock, passed or batches, first=passed is None)
            self.steps(plan, chunk, clock, batches, uploads)
            passed = batches
            if plan.drop_non_finite and (lost := self.unsound(plan, chunk, clock, uploads)):
                places = [at for at in range(len(chunk.clients)) if at not in lost]
                if not places:
                    return None
                chunk, passed = chunk.only(places), passed.only(places)
        assert passed is not None  # local_epochs >= 1
        self.check_chunk(plan, chunk)
        self.readjust(plan, chunk, clock._replace(epoch=epochs), passed)
        if self.collects_score(plan):
            for at in range(len(chunk.clients)):
                self.add_score(plan, chunk.one(at), passed.one(at), uploads)
        return chunk

    def stacked_epoch(self, numbers: Sequence[int], clock: Clock) -> StackedBatches:
        """The minibatches of one local epoch of a chunk."""
        samples = self.task.samples(numbers, clock.round, clock.epoch)
        counts = [len(self.task.partition.train_of(number)) for number in numbers]
        return StackedBatches.of(samples, counts, self.task.federation.batch_size, self.layout)

    def steps(
        self, plan: Plan, chunk: Chunk, clock: Clock, batches: StackedBatches, uploads: Uploads
    ) -> None:
        """One local epoch of a chunk."""
        step = stacked(self.stepper(plan, clock), chunk.readjusted)
        step = self.replayed(step, plan, clock, stacked=chunk.readjusted)
        keys = self.epoch_keys(plan, [client.number for client in chunk.clients], clock, batches.steps)
        for index in range(batches.steps):
            now = {name: each[:, index] for name, each in keys.items()}
            for range_ in self.groups(batches.sizes(index)):
                self.step_clients(plan, chunk, step, range_, batches, now, clock, index, uploads)

    def unsound(self, plan: Plan, chunk: Chunk, clock: Clock, uploads: Uploads) -> set[int]:
        """Places of clients whose loss or model is not finite after an epoch; they have given up."""
        sound = self.sound((*chunk.params.values(), *chunk.carry.buffers.values()), chunk.measured["loss"])
        lost = {at for at, good in enumerate(sound.tolist()) if not good}
        for at in sorted(lost):
            self.give_up(plan, chunk.clients[at], clock, uploads)
        return lost

    def check_chunk(self, plan: Plan, chunk: Chunk) -> None:
        """The contract of local training; a breach names the client."""
        try:
            self.check_trained(plan, chunk.params, chunk.mask)
        except ContractError:
            for at, client in enumerate(chunk.clients):
                self.hooks.at, own = (plan.clock.round, client.number), chunk.one(at)
                self.check_trained(plan, own.params, own.mask)
            raise

    def groups(self, sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
        """The ranges of clients that step together, by the sizes of their minibatches."""
        if not self.whole_batches():
            yield 0, len(sizes)
            return
        begin = 0
        for _, group in groupby(sizes):  # sizes fall, because clients are sorted
            end = begin + len(list(group))
            yield begin, end
            begin = end

    def step_clients(
        self,
        plan: Plan,
        chunk: Chunk,
        step: Step,
        range_: tuple[int, int],
        batches: StackedBatches,
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
        own_keys, batch = {name: key[first] for name, key in keys.items()}, batches.stacked(index, *range_)
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
        sums = {name: value.double() * sizes for name, value in stepped.metrics.items()}
        if plan.drop_non_finite:
            chunk.measure(first, sums)
            return
        uploads.add(uploads.metrics, {name: value.sum() for name, value in sums.items()})
        uploads.steps_weight += sum(batches.sizes(index)[first])

    def readjust(
        self, plan: Plan, chunk: Chunk, clock: Clock, batches: StackedBatches, first: bool = False
    ) -> None:
        """Moves the clients' masks, if their part works on clients and is due now.

        A score is taken on the last minibatches, or on the `first` ones.
        """
        if not self.readjusts(plan, clock):
            return
        scores = Scores()
        if self.needs_score:
            part = slice(self.hooks.score_batches if first else None)
            places = range(len(chunk.clients))
            each = [self.score(plan, chunk.one(at), clock, batches.one(at)[part]) for at in places]
            scores = pytree.tree_map(lambda *own: torch.stack(own), *each)
        numbers = [self.readjust_key(clock, client.number) for client in chunk.clients]
        keys = to_device(numbers, self.task.device)
        stacked = chunk.mask if chunk.readjusted else _spread(chunk.mask, len(chunk.clients))

        def one(params: Params, mask: Masks, carry: Carry, score: Scores, key: Tensor) -> Any:
            client = Client(-1, params, mask, carry, {})
            moved = self.readjusted(plan, client, clock, score, key)
            return moved.params, moved.mask, cleared(client, moved)

        params, mask, carry = torch.func.vmap(one)(chunk.params, stacked, chunk.carry, scores, keys)
        chunk.params, chunk.mask, chunk.carry, chunk.readjusted = params, mask, carry, True
        free = masks.movable(mask, plan.frozen)
        # what has no mask is frozen for all clients alike
        shared = {name: t for name, t in free.items() if name not in mask}
        chunk.trainable = free | _spread(shared, len(chunk.clients))
        self.check_readjusted(plan, chunk)

    def check_readjusted(self, plan: Plan, chunk: Chunk) -> None:
        """The contract of a readjustment, of all clients at once; a breach names the client."""
        if not self.contracts:
            return
        where, state, shown = self.hooks.where("readjust"), plan.state, chunk.one(0)
        self.contracts.parameters(where, shown.params)
        self.contracts.mask(where, shown.mask)
        try:
            self.contracts.frozen(where, plan.frozen, chunk.mask)
            self.contracts.values(where, chunk.params, chunk.mask, plan.frozen, state.params)
        except ContractError:
            for at, client in enumerate(chunk.clients):
                self.hooks.at, own = (plan.clock.round, client.number), chunk.one(at)
                where = self.hooks.where("readjust")
                self.contracts.frozen(where, plan.frozen, own.mask)
                self.contracts.values(where, own.params, own.mask, plan.frozen, state.params)
            raise
        promise = self.hooks.promise("readjust")
        if promise == "none":
            return
        counts = torch.stack([mask.reshape(len(mask), -1).sum(1) for mask in chunk.mask.values()], 1).tolist()
        for client, own_counts in zip(chunk.clients, counts, strict=True):
            self.hooks.at = (plan.clock.round, client.number)
            named = dict(zip(chunk.mask, own_counts, strict=True))
            self.contracts.budget_of(self.hooks.where("readjust"), named, plan.budget, promise)
        self.hooks.at = (plan.clock.round, None)

    def contribute(self, plan: Plan, chunk: Chunk) -> None:
        """Charges what the clients send; what they contribute as the server knows them, and its sum."""
        sizes = [float(len(self.task.partition.train_of(client.number))) for client in chunk.clients]
        weights, owned = to_device(sizes, self.task.device), 0 if chunk.readjusted else None
        leaving = chunk
        if self.hooks.has_extra("upload"):
            keys = torch.stack([self.upload_key(plan, client.number) for client in chunk.clients])

            def leave(params: Params, mask: Masks, weight: Tensor, key: Tensor) -> tuple[Params, Tensor]:
                client = Client(-1, params, mask, Carry({}, {}), {})
                leaving, weight = self.leaving(plan, client, weight, key)
                return leaving.params, weight

            sent, weights = torch.func.vmap(leave, in_dims=(0, owned, 0, 0))(
                chunk.params, chunk.mask, weights, keys
            )
            self.check_leaving(plan, sent, chunk.mask)
            leaving = replace(chunk, params=sent)
        arrived = self.arrive_all(leaving)

        def one(params: Params, mask: Masks, carry: Carry, weight: Tensor) -> dict[str, Tensor]:
            return self.contribution(plan, Client(-1, params, mask, carry, {}), weight)

        made = torch.func.vmap(one, in_dims=(0, owned, 0, 0))(
            arrived.params, arrived.mask, arrived.carry, weights
        )
        extra = {name: value for name, value in made.items() if name.startswith("extra/")}
        if extra:
            own_extra = _apart(extra, len(sizes))
            each = [self.beside(client, own) for client, own in zip(arrived.each(), own_extra, strict=True)]
            made |= _stacked_as(extra, each)
        chunk.received, chunk.contributions = arrived.carry.buffers, made
        if not self.hooks.gathered:
            chunk.sums = {name: value.sum(0, dtype=torch.float64) for name, value in made.items()}

    def arrive_all(self, leaving: Chunk) -> Chunk:
        """Charges the uploads; the chunk as the server then knows it."""
        if not self.ledger.alters:
            mask, support = leaving.mask, self.hooks.sends == "support"
            sent = masks.support(leaving.params, mask) if support else mask
            own = self.ledger.own_masks(sent) if mask and (support or leaving.readjusted) else []
            for at, client in enumerate(leaving.clients):
                self.ledger.upload(client.number, mask, own=own[at] if own else None)
            return leaving
        clients = [self.arrive(client) for client in leaving.each()]
        buffers = _stacked_as(leaving.carry.buffers, [client.carry.buffers for client in clients])
        mask = leaving.mask
        if leaving.readjusted:
            mask = _stacked_as(mask, [client.mask for client in clients])
        params = _stacked_as(leaving.params, [client.params for client in clients])
        return replace(leaving, params=params, mask=mask, carry=leaving.carry._replace(buffers=buffers))

    def upload(self, plan: Plan, chunk: Chunk, uploads: Uploads) -> None:
        """Adds the clients' contributions and buffers, charges their training, and keeps their rows."""
        made = chunk.contributions
        if self.contracts:
            self.contracts.summed(self.hooks.where("contribute"), _pick(made, 0), uploads.before())
        if uploads.gathered:
            for at, client in enumerate(chunk.clients):
                uploads.contribute(client.number, _pick(made, at))
        else:
            uploads.dtypes |= {name: value.dtype for name, value in made.items()}
            uploads.add(uploads.sums, chunk.sums)
        if plan.drop_non_finite:
            uploads.add(uploads.metrics, {name: value.sum() for name, value in chunk.measured.items()})
            samples = sum(len(self.task.partition.train_of(client.number)) for client in chunk.clients)
            uploads.steps_weight += samples * self.task.federation.local_epochs
        received = _apart(chunk.received, len(chunk.clients))
        clients = chunk.each() if self.hooks.get("client_final") else chunk.clients
        for client, buffers in zip(clients, received, strict=True):
            self.account(plan, client, buffers, uploads)


def _pick(tensors: Params, at: int) -> Params:
    return {name: tensor[at] for name, tensor in tensors.items()}


def _apart(tensors: Params, clients: int) -> list[Params]:
    """Each client's tensors, which are views."""
    rows = {name: tensor.unbind() for name, tensor in tensors.items()}
    return [{name: own[at] for name, own in rows.items()} for at in range(clients)]


def _copies(tensor: Tensor, count: int) -> Tensor:
    """So many in a stack, each in memory as the tensor lies."""
    strides = (tensor.numel(), *torch.empty_like(tensor).stride())  # without gaps, if it has any
    stack = torch.empty_strided((count, *tensor.shape), strides, dtype=tensor.dtype, device=tensor.device)
    return stack.copy_(tensor)


def _stacked_as(old: Params, each: Sequence[Params]) -> Params:
    """Each client's tensors stacked, in memory as `old` lies."""
    made = {name: torch.empty_like(tensor) for name, tensor in old.items()}
    for name, tensor in made.items():
        torch.stack([own[name] for own in each], out=tensor)
    return made


def _spread(tensors: Masks, clients: int) -> Masks:
    return {name: tensor.expand(clients, *tensor.shape) for name, tensor in tensors.items()}
