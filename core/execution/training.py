"""What every executor does for one client: download, readjustment, score, upload."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from .. import masks, rng
from ..budget import Budget
from ..compose import Hooks
from ..contracts import Contracts, versions
from ..dropout import drops
from ..errors import RunError
from ..ledger import Ledger, on_wire
from ..loss import ClientLoss, ModelLoss
from ..memory import out_of_memory
from ..state import (
    Batch,
    Carry,
    Clock,
    Masks,
    Memory,
    Params,
    Readjusted,
    Scores,
    Stepped,
    Sums,
    Uploaded,
    row_on,
)
from ..task import Task
from .exchange import Plan, Uploads
from .replay import Replays
from .step import Settings, Step, offered


@dataclass
class Client:
    """One client's model while it trains (or, in the vectorised executor, those of a chunk, stacked)."""

    number: int
    params: Params
    mask: Masks
    carry: Carry
    trainable: Masks
    score_samples: int = 0
    measured: Uploads = field(default_factory=Uploads)
    """where its metrics go: to the round's, or to its own as long as it may be dropped"""


class Executor(ABC):
    """Trains a round's clients on one device. What they compute does not depend on the kind of executor."""

    size = 1  # clients at once
    say: Callable[[str], object] = staticmethod(lambda text: None)
    """where news go, such as that fewer clients fit into memory than was thought"""

    def __init__(
        self,
        task: Task,
        hooks: Hooks,
        loss: ModelLoss,
        ledger: Ledger,
        contracts: Contracts | None,
    ) -> None:
        self.task, self.hooks, self.loss = task, hooks, loss
        self.ledger, self.contracts, self.layout = ledger, contracts, task.layout
        self.step = hooks.found["local_step"]
        self.replays: Replays | None = None
        self.own_start = any(hooks.takes("client_init", own) for own in ("memory", "broadcast"))
        self.needs_score = hooks.takes("readjust", "score")
        self.needs_key = hooks.takes("local_step", "key")
        self.drops = drops(task.model, task.dataset.input_shape)

    def train(self, plan: Plan, clients: Sequence[int]) -> Uploads:
        """One round of local training of these clients. The server's tensors come back as they were."""
        self.task.model.train()
        params, buffers = (
            self.ledger.rounded(t, "download") for t in (plan.state.params, plan.state.buffers)
        )
        state = replace(plan.state, params=self.layout.params(params), buffers=buffers)
        plan = replace(plan, state=state, trainable=self.layout.params(plan.trainable))
        given = (state.params, state.mask, state.frozen, state.buffers)
        before = versions(*given)
        uploads = Uploads(self.hooks.gathered)
        try:
            self.train_all(plan, clients, uploads)
            if self.contracts:
                self.contracts.settle()
        except Exception as error:
            if out_of_memory(error):
                raise RunError(self.too_large()) from error
            if self.contracts:
                self.contracts.settle()  # an earlier breach may be why
            raise
        finally:
            if self.contracts:
                self.contracts.open.clear()
        if versions(*given) != before:
            raise self.hooks.where("local_step").breach("wrote into a tensor it was given; return new ones")
        self.hooks.at = (plan.clock.round, None)
        return uploads

    def too_large(self) -> str:
        """What to say of clients that do not fit into memory."""
        clients = f"{self.size} clients at once do" if self.size > 1 else "one client alone does"
        fewer = f"execution.chunk below {self.size}, " if self.size > 1 else ""
        return (
            f"out of memory: {clients} not fit into that of {self.task.device}. Set {fewer}a smaller "
            f"federation.batch_size (now {self.task.federation.batch_size}), a smaller task.model, or on a "
            "GPU execution.precision = 'bfloat16'"
        )

    @abstractmethod
    def train_all(self, plan: Plan, clients: Sequence[int], uploads: Uploads) -> None:
        """Trains the clients and adds up what they send."""

    def stepper(self, plan: Plan, clock: Clock) -> Step:
        """The local step of an epoch as a function of tensors alone."""
        numbers, place = self.settings(plan, clock)._asdict(), self.hooks.where("local_step")
        return lambda given: self.step(Stepped, place, **offered(given, self.loss, numbers))

    def replayed(self, step: Step, plan: Plan, clock: Clock, stacked: bool = False) -> Step:
        """The step of an epoch, from recordings where the run makes any. `stacked`: with masks, too."""
        if self.replays is None:
            return step
        numbers = self.settings(plan, clock).taken(self.hooks.found["local_step"])
        return self.replays.of(step, numbers, plan.clock.round, stacked)

    def settings(self, plan: Plan, clock: Clock) -> Settings:
        """The numbers that a step reads."""
        federation = self.task.federation
        return Settings(plan.lr, federation.momentum, federation.weight_decay, plan.target, clock)

    def whole_batches(self) -> bool:
        """Whether all samples of a minibatch act on each other, so that none may fill it up."""
        normalises = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.task.model.modules())
        return normalises or getattr(self.hooks.method.local_step, "whole_batches", False)

    def keys(self, plan: Plan, number: int) -> dict[str, int]:
        """The streams of a client's steps in this round, those that are needed; each step has its own."""
        wanted = {"step": self.needs_key, "dropout": self.drops}
        path = (plan.clock.round, number)
        return {name: rng.number(self.task.seed, name, *path) for name, needed in wanted.items() if needed}

    def epoch_keys(self, plan: Plan, numbers: Sequence[int], clock: Clock, steps: int) -> dict[str, Tensor]:
        """The keys of the steps of an epoch by purpose, (clients, steps) each."""
        paths = [(clock.epoch, index) for index in range(steps)]
        every = [self.keys(plan, number) for number in numbers]
        return {name: rng.folded([own[name] for own in every], paths, self.task.device) for name in every[0]}

    @contextmanager
    def model_randomness(self, plan: Plan, number: int) -> Iterator[None]:
        """Seeds what layers other than dropout draw themselves, and leaves no trace."""
        device = self.task.device
        if device.type == "cuda":
            torch.cuda.init()  # type: ignore[no-untyped-call]
            index = torch.cuda.current_device() if device.index is None else device.index
            generator = torch.cuda.default_generators[index]
        else:
            generator = torch.default_generator
        before = generator.get_state()
        generator.manual_seed(rng.number(self.task.seed, "model", plan.clock.round, number) % 2**63)
        try:
            yield
        finally:
            generator.set_state(before)

    def sent(self, client: Client) -> Masks:
        """The mask of the values that a client sends."""
        return masks.support(client.params, client.mask) if self.hooks.sends == "support" else client.mask

    def download(self, plan: Plan, number: int, first: Client | None = None) -> Client:
        """The client's state is the server's; its optimiser starts fresh, if it may as `first`'s did."""
        state = plan.state
        got = self.ledger.download(number).got
        broadcast = self.ledger.beside(plan.broadcast, "download", number)
        params, buffers = (state.params, state.buffers) if got is None else (got.params, got.buffers)
        params = params if got is None else self.layout.params(params)
        fresh: dict[str, Params] = {}
        if first is not None and got is None and not self.own_start:
            fresh = first.carry.state
        elif self.hooks.get("client_init"):
            fresh = self.hooks.call(
                "client_init",
                dict,
                params=params,
                mask=state.mask,
                momentum=self.task.federation.momentum,
                broadcast=broadcast,
                memory=row_on(self.task.device, state.rows.get(number, {})),
            )
        carry = Carry(dict(buffers), fresh)
        return Client(number, dict(params), dict(state.mask), carry, plan.trainable)

    def epoch(self, number: int, clock: Clock) -> list[Batch]:
        """A client's minibatches of one local epoch, in the run's layout."""
        batches = self.task.batches(number, clock.round, clock.epoch)
        return [batch._replace(inputs=self.layout.arrange(batch.inputs)) for batch in batches]

    def due(self, clock: Clock, budget: Budget) -> bool:
        """Whether the readjustment runs now."""
        if not self.hooks.get("due"):
            return self.hooks.site != "client" or clock.epoch == clock.epochs
        return self.hooks.call("due", bool, clock=clock, budget=budget)

    def readjusts(self, plan: Plan, clock: Clock) -> bool:
        """Whether clients move their masks now."""
        on_clients = self.hooks.site == "client" and self.hooks.get("readjust") is not None
        return on_clients and self.due(clock, plan.budget)

    def moves(self, plan: Plan) -> bool:
        """Whether clients move their masks at any time of this round."""
        epochs = self.task.federation.local_epochs
        clocks = (plan.clock._replace(epoch=epoch, epochs=epochs) for epoch in range(epochs + 1))
        return any(self.readjusts(plan, clock) for clock in clocks)

    def readjusted(self, plan: Plan, client: Client, clock: Clock, score: Scores, key: Tensor) -> Readjusted:
        """What the client's readjustment returns."""
        return self.hooks.call(
            "readjust",
            Readjusted,
            params=client.params,
            mask=client.mask,
            frozen=plan.state.frozen,
            score=score,
            target=plan.target,
            budget=plan.budget,
            clock=clock,
            key=key,
            memory={},
        )

    def readjust_key(self, clock: Clock, number: int) -> int:
        """The stream of a client's readjustment."""
        return rng.number(self.task.seed, "readjust", clock.round, number, clock.epoch)

    def score(self, plan: Plan, client: Client, clock: Clock, batches: Sequence[Batch]) -> Scores:
        """The growth score of one client's dense gradient on its last minibatches."""
        used, key = batches[-self.hooks.score_batches :], None
        if self.drops:
            path = (clock.round, client.number, clock.epoch)
            key = rng.key(self.task.seed, "dropout", "score", *path, device=self.task.device)
        loss = ClientLoss(self.loss, client.mask, plan.state.params, key)
        client.score_samples += sum(len(batch.targets) for batch in used)
        gradient = loss.dense_grad(client.params, client.carry, used)
        gradient = {name: gradient[name] for name in client.mask}
        if not self.hooks.get("grow_score"):
            return {name: g.abs() for name, g in gradient.items()}
        score = self.hooks.call("grow_score", dict, params=client.params, dense_grad=gradient)
        if self.contracts:
            self.contracts.scores(self.hooks.where("grow_score"), score)
        return score

    def collects_score(self, plan: Plan) -> bool:
        """Whether the server will readjust by the clients' scores in this round."""
        return self.hooks.site == "server:end" and self.needs_score and self.due(plan.clock, plan.budget)

    def add_score(self, plan: Plan, client: Client, batches: Sequence[Batch], uploads: Uploads) -> None:
        """Adds one client's score to the server's."""
        score = self.score(plan, client, plan.clock, batches)
        score = self.ledger.beside(score, "upload", client.number, whole=True)
        weight = len(self.task.partition.train_of(client.number))
        uploads.add(uploads.score, {name: weight * value for name, value in score.items()})

    def check_trained(self, plan: Plan, params: Params, mask: Masks, later: bool = False) -> None:
        """The contract of local training, for one client or for stacked ones.

        `later`: a device need not be waited for client by client; on a CPU there is nothing to wait for.
        """
        if self.contracts:
            where, state = self.hooks.where("local_step"), plan.state
            # tensors that train whole have nothing to hold still
            bound = {n: m for n, m in mask.items() if n in plan.trainable or m is not state.mask[n]}
            later = later and self.task.device.type != "cpu"
            self.contracts.values(where, params, bound, plan.frozen, state.params, later)

    def sound(self, model: Iterable[Tensor], loss: Tensor) -> Tensor:
        """Whether loss and model are finite, as in `finite`; the model as it would be sent."""
        return finite(*(t.to(on_wire(t.dtype, self.ledger.values)) for t in model), loss)

    def give_up(self, plan: Plan, client: Client, clock: Clock, uploads: Uploads) -> None:
        """Charges a client that became NaN or infinite in this epoch, and drops it."""
        samples = len(self.task.partition.train_of(client.number))
        self.ledger.train(samples * (clock.epoch + 1), client.score_samples)
        uploads.lose("non_finite", client.number)

    def upload_key(self, plan: Plan, number: int) -> Tensor:
        """The stream of what a client's upload draws, 0-d."""
        return rng.key(self.task.seed, "upload", plan.clock.round, number, device=self.task.device)

    def leaving(self, plan: Plan, client: Client, weight: Tensor, key: Tensor) -> tuple[Client, Tensor]:
        """What the client sends and what it counts: its model through every part that changes uploads."""
        params, state = client.params, plan.state
        for hook in self.hooks.each("upload"):
            made = self.hooks.ask(
                hook,
                Uploaded,
                params=params,
                anchor=state.params,
                mask=client.mask,
                frozen=state.frozen,
                weight=weight,
                cohort=self.task.federation.clients_per_round,
                key=rng.fold(key, hook.where.part),
            )
            params, weight = made
        return replace(client, params=params), weight

    def check_leaving(self, plan: Plan, params: Params, mask: Masks) -> None:
        """The contract of parts that change uploads, for one client or for stacked ones."""
        if self.contracts and self.hooks.has_extra("upload"):
            where, state = self.hooks.where_extra("upload"), plan.state
            self.contracts.values(where, params, mask, plan.frozen, state.params)

    def contribution(self, plan: Plan, client: Client, weight: Tensor) -> Sums:
        """What the client adds to the sums."""
        return self.hooks.call(
            "contribute",
            dict,
            params=client.params,
            mask=client.mask,
            anchor=plan.state.params,
            weight=weight,
            carry=client.carry,
            moved=self.moves(plan),
        )

    def arrive(self, client: Client) -> Client:
        """Charges the upload of a client's model; the client as the server then knows it."""
        ledger, number, mask = self.ledger, client.number, client.mask
        params = ledger.rounded(client.params, "upload", number)
        buffers = ledger.rounded(client.carry.buffers, "upload", number)
        got = ledger.upload(number, self.sent(replace(client, params=params)), params, buffers).got
        if got is not None:
            params, buffers = self.layout.params(got.params), got.buffers
            mask = got.mask if self.hooks.sends == "mask" else mask
        return replace(client, params=params, mask=mask, carry=client.carry._replace(buffers=buffers))

    def beside(self, client: Client, contribution: Sums) -> Sums:
        """The contribution with what travels beside the model as the server receives it; charged."""
        extra = {name: value for name, value in contribution.items() if name.startswith("extra/")}
        if not extra:
            return contribution
        return contribution | self.ledger.beside(extra, "upload", client.number, self.sent(client))

    def account(self, plan: Plan, client: Client, received: Params, uploads: Uploads) -> None:
        """Charges one client's training, adds the buffers that it sent, and keeps its row."""
        state, samples = plan.state, len(self.task.partition.train_of(client.number))
        self.ledger.train(samples * self.task.federation.local_epochs, client.score_samples)
        buffers = {name: samples * b.to(torch.float64) for name, b in received.items()}
        uploads.add(uploads.buffers, buffers)
        uploads.samples += samples
        if self.hooks.get("client_final"):
            row: Memory = self.hooks.call(
                "client_final",
                dict,
                params=client.params,
                anchor=state.params,
                carry=client.carry,
                memory=row_on(self.task.device, state.rows.get(client.number, {})),
            )
            if self.contracts:
                self.contracts.memory(self.hooks.where("client_final"), row)
            state.rows[client.number] = row_on("cpu", row, copy=True)  # no view of a chunk's tensors


def finite(*tensors: Tensor) -> Tensor:
    """Whether all entries are finite, of every client: tensors have it as first dimension. bool (clients,).

    By sums of magnitudes, as the contracts do.
    """
    sums = [t.reshape(len(t), -1).abs().sum(1, dtype=torch.float32) for t in tensors]
    return torch.stack(sums).isfinite().all(0)


def apart(clients: Sequence[int], size: int) -> Iterator[list[int]]:
    """The clients in groups of at most `size`; one that was sampled twice is in two of them."""
    groups: list[list[int]] = []
    following: dict[int, int] = {}  # the first group that may take the client once more
    opened = 0  # the first group that is not full
    for number in clients:
        at = max(following.get(number, 0), opened)
        while at < len(groups) and len(groups[at]) == size:
            at += 1
        if at == len(groups):
            groups.append([])
        groups[at].append(number)
        following[number] = at + 1
        while opened < len(groups) and len(groups[opened]) == size:
            opened += 1
    return iter(groups)


def cleared(client: Client, moved: Readjusted) -> Carry:
    """The carry with optimiser state zero wherever the client's mask or value changed."""
    found: Masks = {}

    def changed(name: str) -> Tensor:
        if name not in found:
            found[name] = moved.mask[name] != client.mask[name]
            found[name] |= moved.params[name] != client.params[name]
        return found[name]

    state = {
        kind: {
            name: masks.where(~changed(name), value, 0)
            if name in client.mask and value.shape == client.mask[name].shape
            else value
            for name, value in entries.items()
        }
        for kind, entries in client.carry.state.items()
    }
    return Carry(client.carry.buffers, state)
