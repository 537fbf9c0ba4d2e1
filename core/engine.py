"""The engine: the federated round, and nothing of any method."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch

from . import masks, rng
from .accounting import open_ledger
from .budget import Budget
from .compose import compose
from .contracts import Contracts
from .evaluation import evaluate
from .execution import workers
from .execution.choose import choose
from .execution.exchange import Plan, Uploads
from .execution.host_memory import keep_freed_memory
from .faults import Faults, merged
from .ledger import forward_macs
from .loss import Probe
from .metrics import measured
from .resolve import Resolved
from .schedule import learning_rate
from .state import Aggregated, Best, Clock, Frozen, Masks, Readjusted, Report, ServerState
from .task import Task

PROBE_SAMPLES = 256  # behind masks that need gradients at initialisation


class Engine:
    """Runs a composed method on a task."""

    def __init__(self, resolved: Resolved, task: Task) -> None:
        self.config, self.task = resolved.config, task
        self.hooks = compose(resolved.method)
        if task.device.type == "cpu":
            torch.set_num_threads(self.config.execution.threads)
            keep_freed_memory()
        self.params, self.buffers = task.initial()
        self.hooks.object(self.config, self.buffers)
        self.prunable = tuple(layer.name for layer in task.layers)
        self.contracts = Contracts(self.params, self.prunable) if self.config.execution.contracts else None
        execution = self.config.execution
        self.loss = self.hooks.loss(
            task.model,
            self.config.sparsity.target,
            torch.bfloat16 if execution.precision == "bfloat16" else None,
        )
        macs = forward_macs(task.model, task.dataset.input_shape, self.prunable)
        model = (self.params, self.buffers, macs)
        self.ledger = open_ledger(self.config, task, self.hooks, *model, lambda: self.budget(self.clock(0)))
        macs_a_sample, parts = sum(macs.values()), (self.hooks, self.loss, self.ledger, self.contracts)
        self.executor, self.why = choose(execution, task, *parts, macs_a_sample)
        self.faults = Faults(self.config.faults, task)
        self.workers = workers.join(self.config.federation.clients_per_round, execution.device)
        self.stop = False  # set from outside: the run ends after this round

    def start(self) -> ServerState:
        """The state before round 0: initial weights under the initial mask."""
        params = self.params
        if self.hooks.get("initial_params"):
            params = self.hooks.call("initial_params", dict, params=params)
            if self.contracts:
                self.contracts.parameters(self.hooks.where("initial_params"), params)
        budget = self.budget(self.clock(0))
        self.task.model.train()
        sample = self.task.sample(PROBE_SAMPLES)
        mask = self.hooks.call(
            "mask_init",
            dict,
            params={name: p.clone() for name, p in params.items()},
            budget=budget,
            probe=Probe(self.loss, self.buffers, sample, self.key("probe")),
            key=self.key("mask_init"),
        )
        if self.contracts:
            where = self.hooks.where("mask_init")
            self.contracts.mask(where, mask)
            self.contracts.budget(where, mask, budget, self.hooks.promise("mask_init"))
        if self.hooks.takes("mask_init", "probe"):
            mask = self.workers.same(mask)  # gradients of two GPUs may differ in the last bit
        masked = masks.apply(params, mask)
        if self.config.sparsity.rescale_init:
            masked |= {name: masks.rescaled(params[name], masked[name]) for name in mask}
        none = {name: torch.zeros_like(m) for name, m in mask.items()}
        return ServerState(0, masked, self.buffers, mask, none)

    def rounds(self, state: ServerState) -> Iterator[Report]:
        """Plays the rounds that are left; each report holds a state of its own."""
        while state.round < self.config.federation.rounds:
            report = self.play(state)
            state = report.state
            if self.hooks.has_extra("on_round_end") and self.workers.rank == 0:
                self.hooks.extra("on_round_end", report=report)
            yield report

    def play(self, state: ServerState) -> Report:
        """One round."""
        started, clock, before = time.perf_counter(), self.clock(state.round), self.sent(state)
        state = state.copy()  # an interrupted round leaves the last one whole
        self.hooks.at = (clock.round, None)
        budget = self.budget(clock)
        self.freeze(state, budget, clock)
        self.readjust(state, "server:start", budget, clock)
        clients = self.task.clients(clock.round)
        sent = self.sent(state)
        self.ledger.begin_round(state.params, state.buffers, sent, state.frozen, trained=state.mask)
        mine = self.workers.deal(clients, self.faults.work(clock.round, clients))
        uploads = self.faults.train(self.executor, self.plan(state, budget, clock), mine)
        stop = self.gather(state, uploads, mine, clients)
        if uploads.samples:  # else nobody reported, and the model stays as it is
            self.aggregate(state, uploads, budget)
            self.readjust(state, "server:end", budget, clock, uploads)
        metrics = self.record(state, before, clients, uploads, clock)
        state.round += 1
        return Report({**metrics, "seconds": round(time.perf_counter() - started, 4)}, state, stop)

    def gather(self, state: ServerState, uploads: Uploads, mine: list[int], clients: list[int]) -> bool:
        """Adds up what all workers have; whether one of them was asked to end the run."""
        numbers = [uploads.samples, uploads.steps_weight, *self.ledger.round, float(self.stop)]
        self.workers.same_form(uploads, idle=self.faults.any or len(set(clients)) < self.workers.size)
        self.workers.gather(uploads, clients)
        samples, steps, *tally, stop = self.workers.add(uploads.tensors(), numbers)
        uploads.samples, uploads.steps_weight = round(samples), round(steps)
        self.ledger.end_round(tally, clients)
        if self.hooks.get("client_final"):
            state.rows |= self.workers.rows({c: state.rows[c] for c in mine if c in state.rows})
        if self.faults.any:
            uploads.lost = merged(self.workers.gathered(uploads.lost), clients)
        return stop > 0

    def freeze(self, state: ServerState, budget: Budget, clock: Clock) -> None:
        """The freeze policy's decision at the start of the round."""
        if not self.hooks.get("freeze"):
            return
        decided = self.hooks.call(
            "freeze",
            object,  # None or Frozen
            params=state.params,
            mask=state.mask,
            frozen=state.frozen,
            target=self.config.sparsity.target,
            budget=budget,
            clock=clock,
            key=self.key("freeze", clock.round),
            memory=state.memory.get("freeze_policy", {}),
            best=Best(**state.memory["best"]) if "best" in state.memory else None,
        )
        if decided is None:
            return
        if not isinstance(decided, Frozen):
            raise self.hooks.where("freeze").breach(
                f"returned {type(decided).__name__}; expected Frozen or None"
            )
        params = state.params if decided.params is None else decided.params
        if self.contracts:
            where, promise = self.hooks.where("freeze"), self.hooks.promise("freeze_policy")
            self.contracts.decided(where, decided._replace(params=params), state, budget, promise)
        none = {name: torch.zeros_like(m) for name, m in decided.mask.items()}
        state.frozen, state.mask, state.params = {**none, **decided.frozen}, decided.mask, params
        state.buffers = state.buffers if decided.buffers is None else decided.buffers
        state.memory["freeze_policy"] = decided.memory

    def readjust(
        self, state: ServerState, site: str, budget: Budget, clock: Clock, uploads: Uploads | None = None
    ) -> None:
        """The server's readjustment, if its part works at this site and is due."""
        if self.hooks.site != site or not self.hooks.get("readjust") or not self.executor.due(clock, budget):
            return
        moved = self.hooks.call(
            "readjust",
            Readjusted,
            params=state.params,
            mask=state.mask,
            frozen=state.frozen,
            score=uploads.mean_score() if uploads else {},
            target=self.config.sparsity.target,
            budget=budget,
            clock=clock,
            key=self.key("readjust", clock.round),
            memory=state.memory.get("readjust", {}),
        )
        self.adopt(state, "readjust", moved, budget)

    def plan(self, state: ServerState, budget: Budget, clock: Clock) -> Plan:
        """What clients receive this round."""
        federation = self.config.federation
        rate = learning_rate(
            federation.learning_rate_schedule,
            federation.learning_rate,
            federation.learning_rate_final,
            clock.round,
            clock.rounds,
        )
        free = masks.movable(state.mask, state.frozen)
        counts, still = masks.counted(free, state.frozen)
        free = {name: m for name, m in free.items() if counts[name] < m.numel()}
        frozen = {name: f for name, f in state.frozen.items() if still[name]}
        broadcast = state.memory.get("aggregate", {}).get("broadcast", {})
        drop = self.config.faults.non_finite == "drop"
        return Plan(state, budget, clock, free, frozen, self.config.sparsity.target, rate, broadcast, drop)

    def aggregate(self, state: ServerState, uploads: Uploads, budget: Budget) -> None:
        """The next global model; buffers are averaged, frozen values kept to the bit."""
        made = self.hooks.call(
            "aggregate",
            Aggregated,
            sums=uploads.contributions(),
            params=state.params,
            mask=state.mask,
            frozen=state.frozen,
            budget=budget,
            pool_samples=self.task.partition.pool_samples,
            key=self.key("aggregate", state.round),
            memory=state.memory.get("aggregate", {}),
        )
        if self.contracts:
            self.contracts.parameters(self.hooks.where("aggregate"), made.params)
        params = {
            name: torch.where(state.frozen[name], state.params[name], p) if name in state.frozen else p
            for name, p in made.params.items()
        }
        self.adopt(state, "aggregate", made._replace(params=params), budget)
        state.buffers = {
            name: (total / uploads.samples).to(state.buffers[name].dtype).contiguous()
            for name, total in uploads.buffers.items()
        }

    def adopt(self, state: ServerState, slot: str, made: Aggregated | Readjusted, budget: Budget) -> None:
        """Checks what a server hook made and makes it the state."""
        if self.contracts:
            self.contracts.made(self.hooks.where(slot), made, state, budget, self.hooks.promise(slot))
        state.params, state.mask, state.memory[slot] = made.params, made.mask, made.memory

    def budget(self, clock: Clock) -> Budget:
        """This round's budget: the target through the freeze policy and the readjustment."""
        target = sparsity = self.config.sparsity.target
        for name in ("base_sparsity", "target_sparsity"):
            if self.hooks.get(name):
                sparsity = self.hooks.call(name, float, base=sparsity, target=target, clock=clock)
                if not 0 <= sparsity < 1:
                    raise self.hooks.where(name).breach(f"returned sparsity {sparsity}; allowed: [0, 1)")
        return Budget(self.task.layers, self.config.sparsity.allocation, sparsity)

    def record(
        self, state: ServerState, before: Masks, clients: list[int], uploads: Uploads, clock: Clock
    ) -> dict[str, Any]:
        """The round's line of `metrics.jsonl`, without its seconds."""
        line = measured(state, before, self.sent(state), self.prunable, uploads, clock)
        line |= {**self.ledger.metrics(), "clients": clients, "samples": uploads.samples}
        line |= {"lost": uploads.lost} if uploads.lost else {}
        cohort, lost = self.config.federation.clients_per_round, sum(map(len, uploads.lost.values()))
        counts = {"cohort": cohort, "arrived": len(clients) - lost}
        line |= self.hooks.measure(state, clock, **counts, pool=self.task.partition.clients)
        every = self.config.output.evaluate_every
        if (clock.round + 1) % every == 0 or clock.round + 1 == clock.rounds:
            line |= evaluate(self.task, self.loss, state.params, state.buffers, state.mask)
            self.keep_best(state, line["client_accuracy"])
        return line

    def keep_best(self, state: ServerState, accuracy: float) -> None:
        """Remembers the evaluated model, if it is the best and the freeze policy may go back to it."""
        if not self.hooks.takes("freeze", "best"):
            return
        accuracy = self.workers.from_first(accuracy)  # as with `same` masks
        if accuracy > state.memory.get("best", {"accuracy": -1.0})["accuracy"]:
            best = Best(state.round, accuracy, state.params, state.buffers, state.mask)
            state.memory["best"] = best._asdict()

    def sent(self, state: ServerState) -> Masks:
        """The weights that the global model has: its mask, or its support if that is what is sent."""
        return state.mask if self.hooks.sends == "mask" else masks.support(state.params, state.mask)

    def clock(self, round_: int) -> Clock:
        """Server time."""
        epochs = self.config.federation.local_epochs
        return Clock(round_, self.config.federation.rounds, 0, epochs)

    def key(self, *path: str | int) -> torch.Tensor:
        """The key of a server stream."""
        return rng.key(self.config.seed, *path, device=self.task.device)
