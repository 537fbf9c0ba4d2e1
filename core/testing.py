"""The battery: every promise that a method must keep, as checks of a few tenths of a second each."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checkpoint, masks, rng, task
from .api import nested
from .compose import Hook
from .config import Layer, Tree, expand
from .contracts import Where
from .engine import Engine
from .errors import ConfigError, FedsparseError
from .functional import is_stacked
from .hookspecs import SLOTS
from .loss import ClientLoss
from .method import Method
from .part import Part
from .registry import Plugin, Registry, describe
from .resolve import DEFAULT_PLUGIN, Resolved, resolve
from .state import Batch, Carry, Masks, Params, Report, ServerState

TINY: dict[str, Any] = {
    "task.dataset.use": "synthetic",
    "task.dataset.train": 240,
    "task.dataset.test": 60,
    "task.dataset.classes": 4,
    "task.dataset.channels": 1,
    "task.dataset.height": 6,
    "task.dataset.width": 6,
    "task.model.use": "mlp",
    "task.model.hidden": [20, 12],
    "task.partition.use": "iid",
    "federation.clients": 6,
    "federation.clients_per_round": 3,
    "federation.rounds": 16,
    "federation.local_epochs": 2,
    "federation.batch_size": 16,
    "federation.learning_rate": 0.05,
    "federation.momentum": 0.0,
    "federation.weight_decay": 0.001,
    "sparsity.target": 0.8,
    "output.evaluate_every": 8,
    "execution.executor": "sequential",
    "execution.device": "cpu",
}
"""The task that the checks play: a small MLP, 6 clients, generated data."""

PERIOD = 2
"""Rounds to which a part's field `period` is shortened, so that its event comes several times in a check."""

VMAP_CLIENTS, VMAP_STEPS = 3, 2
EXECUTOR_ROUNDS = 3  # more would amplify rounding until a mask ranks two weights the other way round
SWAP_ROUNDS = 4


class BrokenError(AssertionError):
    """A promise that a method breaks; the text says which, and by how much."""


class Check(NamedTuple):
    """One check's outcome; `message` says why it failed, or what is worth knowing."""

    name: str
    passed: bool
    message: str


@dataclass(frozen=True)
class Contract:
    """A check that can be called, as often as one likes; its text is its name."""

    name: str
    play: Callable[[], str] = field(repr=False)

    def __call__(self) -> None:
        """Raises BrokenError, or whatever the plugin raised, if the promise is not kept."""
        self.play()

    def result(self) -> Check:
        """The outcome; raises nothing that the plugin does."""
        try:
            return Check(self.name, True, self.play())
        except (BrokenError, FedsparseError) as error:
            return Check(self.name, False, str(error))
        except Exception as error:
            return Check(self.name, False, describe(error))

    def __str__(self) -> str:
        return self.name


def check(plugin: str | Method, *, settings: Mapping[str, Any] | None = None) -> list[Check]:
    """Runs `checks` and returns every outcome.

    Raises ConfigError only if the plugin cannot be loaded or `settings` are wrong.
    """
    return [contract.result() for contract in checks(plugin, settings=settings)]


def checks(plugin: str | Method, *, settings: Mapping[str, Any] | None = None) -> list[Contract]:
    """The checks of an installed plugin, of a Python file by its path, or of a Method, in order.

    They play short runs of a tiny task on one CPU thread: fields named `period` are shortened to 2 rounds.
    `settings` change that by dotted path, `{"method.readjust.period": 3}`, or as tables. A plugin without a
    METHOD is checked part by part, each in its slot of FedAvg. Raises ConfigError if the plugin cannot be
    loaded, or if `settings` are wrong for a METHOD (for parts, the checks say so).
    """
    registry = Registry()
    name, found = _found(plugin, registry)
    given = _tree(settings or {})
    if found.method is None:
        uses = [f"{cls.slot()}={name}:{part}" for part, cls in found.parts.items() if cls.slot() in SLOTS]
        if not uses:
            raise ConfigError(
                f"plugin {name!r} has neither METHOD nor a part of a slot: nothing can be checked"
            )
        return [
            Contract(f"{contract} [{use}]", partial(play, Subject(registry, DEFAULT_PLUGIN, (use,), given)))
            for use in uses
            for contract, play in BATTERY.items()
        ]
    subject = Subject(registry, name, (), given)
    subject.refuse_wrong_settings()
    battery = [Contract(contract, partial(play, subject)) for contract, play in BATTERY.items()]
    default = registry.load(DEFAULT_PLUGIN).method
    own = [slot for slot in SLOTS if (part := found.method.part(slot)) and part != _part(default, slot)]
    return battery + [
        Contract(f"{slot} swaps into {DEFAULT_PLUGIN}", partial(swaps, subject, slot)) for slot in own
    ]


@dataclass(frozen=True)
class Subject:
    """What is checked, and the settings that its author wants."""

    registry: Registry
    plugin: str
    swaps: tuple[str, ...]
    settings: Tree

    def engine(self, **changes: Any) -> Engine:
        """A new engine on the tiny task; `federation__rounds=3` stands for federation.rounds."""
        made = self.resolved({}, {})
        short = {
            f"method.{slot}.period": PERIOD
            for slot in SLOTS
            if (part := made.method.part(slot)) and _can_be_shorter(part)
        }
        made = self.resolved(short, changes)
        return Engine(made, task.build(made.config))

    def refuse_wrong_settings(self) -> None:
        """Raises ConfigError for settings; parts that do not go together are a check's business."""
        try:
            self.resolved({}, {})
        except ConfigError as error:
            if any(problem.path for problem in error.problems):
                raise

    def resolved(self, short: Mapping[str, Any], changes: Mapping[str, Any]) -> Resolved:
        """Later wins: the tiny task, shorter periods, the author's settings, what the check needs."""
        layers = [
            Layer("the tiny task", _tree(TINY)),
            Layer("shorter periods", _tree(short)),
            Layer("settings", self.settings),
            Layer("the check", _tree(changes)),
        ]
        return resolve(self.plugin, swaps=self.swaps, layers=layers, registry=self.registry)

    def run(self, **changes: Any) -> list[Report]:
        """A whole run."""
        engine = self.engine(**changes)
        return list(engine.rounds(engine.start()))


def contracts(subject: Subject) -> str:
    """A run with all checks of the engine on, and every message packed, unpacked and compared."""
    reports = subject.run(ledger__encode=True, execution__contracts=True)
    for name, value in reports[-1].state.params.items():
        if not value.isfinite().all():
            raise BrokenError(f"parameter {name!r} holds NaN or infinity after {len(reports)} rounds")
    return f"{len(reports)} rounds"


def budget(subject: Subject) -> str:
    """Active weights counted after each round, without the engine's own checks."""
    engine = subject.engine(execution__contracts=False)
    state = engine.start()
    _within(engine, state, engine.hooks.promise("mask_init"), "before round 0")
    for report in engine.rounds(state):
        clock = engine.clock(report.state.round - 1)
        allowed = engine.budget(clock)
        server = engine.hooks.site == "server:end" and engine.hooks.get("readjust") is not None
        last = "readjust" if server and engine.executor.due(clock, allowed) else "aggregate"
        _within(engine, report.state, engine.hooks.promise(last), f"after round {clock.round}")
    active, weights = sum(masks.active(report.state.mask).values()), allowed.weights
    return f"ends with {active} of {weights} weights, the budget is {allowed.total}"


def _within(engine: Engine, state: ServerState, promise: str, when: str) -> None:
    allowed = engine.budget(engine.clock(max(state.round - 1, 0)))
    active = masks.active(state.mask)
    limits: Mapping[str, int] = allowed.counts or {"all layers": allowed.total}
    given = active if allowed.counts else {"all layers": sum(active.values())}
    for name, limit in limits.items():
        if promise != "none" and (given[name] > limit or (promise == "exact" and given[name] != limit)):
            raise BrokenError(
                f"{when}, {name!r} has {given[name]} active weights; the budget is {limit} "
                f"(budget_promise {promise!r})"
            )


def called(subject: Subject) -> str:
    """No hook of a slot stays untried: a check of a hook that is never called says nothing."""
    engine = subject.engine()
    watch = Watch(engine)
    for _ in engine.rounds(engine.start()):
        pass
    idle = [str(hook.where) for name, hook in engine.hooks.found.items() if name not in watch.called]
    if idle:
        raise BrokenError(
            f"never called in {engine.config.federation.rounds} rounds: {'; '.join(idle)}. Give settings "
            "that bring it about (a shorter period, more rounds: federation.rounds), or remove the hook"
        )
    return f"{len(watch.called)} hooks"


def pure(subject: Subject) -> str:
    """No hook of a slot writes into a tensor that it was given."""
    engine = subject.engine()
    watch = Watch(engine)
    for _ in engine.rounds(engine.start()):
        if watch.written:
            raise BrokenError(f"{watch.written[0]}; return a new tensor")
    return ""


def repeats(subject: Subject) -> str:
    """One seed, one result."""
    _same_run(subject.run(), subject.run(), "two runs of one seed differ", "draw from `key` by fedsparse.rng")
    return ""


def resumes(subject: Subject) -> str:
    """A run that goes on from a file ends as one that was not interrupted."""
    first, second = subject.engine(), subject.engine()
    reports = first.rounds(first.start())
    half = [next(reports) for _ in range(max(1, first.config.federation.rounds // 2))][-1].state
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(Path(folder) / "checkpoint", half, first.ledger.state(), {})
        state, ledger = checkpoint.load(Path(folder) / "checkpoint", {})
    whole = subject.run()  # in between: what a plugin keeps elsewhere is then of another round
    second.ledger.load_state(ledger)
    rest = list(second.rounds(state))
    advice = "keep in `memory` all that a part remembers, and nothing on the part or in its module"
    _same_run(whole[half.round :], rest, f"a run resumed after round {half.round - 1} differs", advice)
    return f"resumed after round {half.round - 1}"


def executors(subject: Subject) -> str:
    """Clients one after another, and stacked, end alike; sums in another order differ by rounding."""
    rounds = min(EXECUTOR_ROUNDS, subject.engine().config.federation.rounds)
    runs = [
        subject.run(federation__rounds=rounds, execution__executor=kind, execution__chunk=2)
        for kind in ("sequential", "vectorised")
    ]
    one, other = runs[0][-1], runs[1][-1]
    for name, mask in one.state.mask.items():
        if unlike := int((mask != other.state.mask[name]).sum()):
            raise BrokenError(f"the executors end with masks of {name!r} that differ in {unlike} places")
    for name, value in one.state.params.items():
        _close(f"the executors end with {name!r}", value, other.state.params[name], 1e-5, 1e-4)
    for name in ("upload_bytes_total", "download_bytes_total", "flops_total", "samples"):
        # bytes of a support can follow a weight that rounding put on the other side of a threshold
        if not math.isclose(one.metrics[name], other.metrics[name], rel_tol=0.01):
            raise BrokenError(
                f"the executors differ in {name}: {one.metrics[name]} and {other.metrics[name]}"
            )
    return f"{rounds} rounds"


def vmap(subject: Subject) -> str:
    """Three clients with masks of their own: start, two steps, readjustment, contribution, in float64."""
    engine = subject.engine()
    start = engine.start()
    drawn = [engine.task.batches(client, 0, 0) for client in range(VMAP_CLIENTS)]
    batches = []
    for index in range(min(VMAP_STEPS, *map(len, drawn))):
        size = min(len(own[index].targets) for own in drawn)
        batches.append([Batch(own[index].inputs[:size].double(), own[index].targets[:size]) for own in drawn])
    frozen = {name: torch.zeros_like(mask) for name, mask in start.mask.items()}
    first = next(iter(frozen))
    frozen[first] = start.mask[first] & (start.params[first] > 0)
    own_masks = [
        {n: m & (frozen[n] | (rng.uniform(rng.key(c, n), m.shape) < 0.8)) for n, m in start.mask.items()}
        for c in range(VMAP_CLIENTS)
    ]
    client = partial(_client, engine, start, frozen)
    stacked = {name: torch.stack([mask[name] for mask in own_masks]) for name in frozen}
    together = [Batch(*(torch.stack(part) for part in zip(*step, strict=True))) for step in batches]
    all_params, all_masks, all_sums = torch.func.vmap(client)(stacked, *together)
    for number in range(VMAP_CLIENTS):
        params, mask, sums = client(own_masks[number], *(step[number] for step in batches))
        for name, value in mask.items():
            if unlike := int((all_masks[name][number] != value).sum()):
                raise BrokenError(f"under vmap the readjusted mask of {name!r} differs in {unlike} places")
        for name, value in params.items():
            _close(f"a loop and vmap give {name!r}", value, all_params[name][number], 1e-10, 1e-8)
        for name, value in sums.items():
            _close(f"a loop and vmap contribute {name!r}", value, all_sums[name][number], 1e-8, 1e-8)
    return ""


def _client(
    engine: Engine, start: ServerState, frozen: Masks, mask: Masks, *batches: Batch
) -> tuple[Params, Masks, Params]:
    """All hooks of a client's round."""
    hooks, clock = engine.hooks, engine.clock(1)
    anchor = masks.apply({name: p.double() for name, p in start.params.items()}, mask)
    params, memory, state = anchor, dict[str, Any](), dict[str, Params]()
    if hooks.get("client_init"):
        state = hooks.call(
            "client_init", dict, params=params, mask=mask, momentum=0.0, broadcast={}, memory=memory
        )
    buffers = {name: b.double() if b.is_floating_point() else b for name, b in start.buffers.items()}
    carry = Carry(buffers, state)
    for batch in batches:
        params, carry, _ = hooks.call(
            "local_step",
            tuple,
            loss=ClientLoss(engine.loss, mask, anchor),
            params=params,
            carry=carry,
            batch=batch,
            trainable=masks.movable(mask, frozen),
            anchor=anchor,
            lr=0.05,
            momentum=0.0,
            weight_decay=0.001,
            target=engine.config.sparsity.target,
            clock=clock,
            key=rng.key(0),
        )
    moved = mask
    if hooks.site == "client" and hooks.get("readjust"):
        params, moved, _ = hooks.call(
            "readjust",
            tuple,
            params=params,
            mask=mask,
            frozen=frozen,
            score={name: params[name].sin().abs() for name in mask},
            target=engine.config.sparsity.target,
            budget=engine.budget(clock),
            clock=clock,
            key=rng.key(0),
            memory=memory,
        )
    sums = hooks.call(
        "contribute",
        dict,
        params=params,
        mask=moved,
        anchor=anchor,
        weight=torch.tensor(40.0, dtype=torch.float64),
        carry=carry,
        moved=True,
    )
    return params, moved, sums


BATTERY: dict[str, Callable[[Subject], str]] = {
    "contracts hold, messages decode": contracts,
    "budget promise kept every round": budget,
    "every hook is called": called,
    "no hook writes into its arguments": pure,
    "same seed, same run": repeats,
    "resumed run equals uninterrupted": resumes,
    "client hooks under vmap equal a loop": vmap,
    "executors agree": executors,
}
"""Checks of every plugin, by name."""


def swaps(subject: Subject, slot: str) -> str:
    """The part alone in the default method runs, or is refused with a reason."""
    settings = {name: table for name, table in subject.settings.items() if name != "method"}
    if own := subject.settings.get("method", {}).get(slot):
        settings["method"] = {slot: own}
    swapped = Subject(subject.registry, DEFAULT_PLUGIN, (f"{slot}={subject.plugin}",), settings)
    try:
        engine = swapped.engine(federation__rounds=SWAP_ROUNDS)
    except ConfigError as error:
        if any(problem.path for problem in error.problems):
            raise  # settings that are wrong, and no refusal of the composition
        return f"refused: {error}"
    for _ in engine.rounds(engine.start()):
        pass
    return ""


class Watch:
    """Notes which hooks an engine calls, and which tensors of their arguments they write into."""

    def __init__(self, engine: Engine) -> None:
        self.called: set[str] = set()
        self.written: list[str] = []
        found = engine.hooks.found
        for name, hook in found.items():
            found[name] = replace(hook, function=self.watched(name, hook, engine))
        engine.executor.step, engine.executor.replays = found["local_step"], None

    def watched(self, name: str, hook: Hook, engine: Engine) -> Callable[..., Any]:
        """The hook's function, watched."""

        def function(**arguments: Any) -> Any:
            self.called.add(name)
            before = list(_tensors(arguments))
            versions = [tensor._version for _, tensor in before]
            result = hook.function(**arguments)
            where: Where = engine.hooks.where(name)
            self.written += [
                f"{where}: wrote into its argument {path}"
                for (path, tensor), version in zip(before, versions, strict=True)
                if tensor._version != version
            ]
            return result

        return function


def _tensors(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested dicts and tuples with its place, but those of functorch."""
    if isinstance(value, Tensor):
        if not is_stacked({path: value}):
            yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors(item, f"{path}[{key!r}]" if path else str(key))
    elif isinstance(value, tuple):
        for key, item in zip(getattr(value, "_fields", range(len(value))), value, strict=True):
            yield from _tensors(item, f"{path}.{key}")


def _found(plugin: str | Method, registry: Registry) -> tuple[str, Plugin]:
    """The plugin, known to the registry; a Method under its own name."""
    if isinstance(plugin, str):
        return plugin, registry.load(plugin)
    if plugin.name in registry.names() and registry.load(plugin.name).method == plugin:
        return plugin.name, registry.load(plugin.name)
    parts = {type(part).__name__: type(part) for part in plugin.parts()}
    made = Plugin(plugin.name, "given", "", plugin, parts)
    registry.loaded[plugin.name] = made
    return plugin.name, made


def _part(method: Method | None, slot: str) -> Part | None:
    return method.part(slot) if method else None


def _can_be_shorter(part: Part) -> bool:
    period = getattr(part, "period", None)
    if not isinstance(period, int) or period <= PERIOD or "period" not in type(part).model_fields:
        return False
    try:
        type(part).model_validate({**part.model_dump(), "period": PERIOD})
    except ValueError:
        return False
    return True


def _tree(values: Mapping[str, Any]) -> Tree:
    return expand(nested({path.replace(".", "__"): value for path, value in values.items()}))


def _same_run(one: Sequence[Report], other: Sequence[Report], what: str, advice: str) -> None:
    """Metrics equal but for seconds, and final weights and masks bit for bit."""
    for first, second in zip(one, other, strict=True):
        for name, value in first.metrics.items():
            again = second.metrics.get(name)
            both_nan = value != value and again != again
            if name != "seconds" and again != value and not both_nan:
                number = first.metrics["round"]
                raise BrokenError(f"{what} in round {number}: {name} is {value} and {again}; {advice}")
    for name, tensor in one[-1].state.params.items():
        if not torch.equal(tensor, other[-1].state.params[name]):
            raise BrokenError(f"{what} in the final values of {name!r}; {advice}")
    for name, mask in one[-1].state.mask.items():
        if not torch.equal(mask, other[-1].state.mask[name]):
            raise BrokenError(f"{what} in the final mask of {name!r}; {advice}")


def _close(what: str, one: Tensor, other: Tensor, absolute: float, relative: float) -> None:
    if one.shape != other.shape or one.dtype != other.dtype:
        raise BrokenError(
            f"{what} as {one.dtype} of shape {tuple(one.shape)}, and as {other.dtype} of {tuple(other.shape)}"
        )
    if not torch.allclose(one, other, atol=absolute, rtol=relative):
        gap = (one.double() - other.double()).abs().max().item()
        raise BrokenError(f"{what} with differences of up to {gap:.2g}; allowed: {absolute:g} (rounding)")
