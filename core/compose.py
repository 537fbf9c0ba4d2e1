"""Composition: the parts of a method registered in a fresh pluggy manager, each hook resolved once."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import pluggy
import torch
from torch import Tensor, nn

from .contracts import Where, versions
from .errors import ConfigError, FedsparseError, Problem, RunError, nearest
from .hookspecs import PROJECT, SLOTS, Extras, hooks_of
from .ledger import PassDensities, PassDensity, Traffic
from .loss import ModelLoss
from .method import Method
from .part import KNOWN, PROMISES, Part, is_hook
from .registry import describe
from .state import Clock, Masks, Measured, Params, ServerState

if TYPE_CHECKING:
    from .config import RunConfig


def copied(value: Any) -> Any:
    """A copy of nested dicts; tensors are shared."""
    return {key: copied(item) for key, item in value.items()} if type(value) is dict else value


SENDS = ("mask", "support")
SITES = ("client", "server:start", "server:end")
Result = TypeVar("Result")


class PluginError(RunError):
    """A hook raised, or returned the wrong type."""


class PartManager(pluggy.PluginManager):
    """pluggy over pydantic models: looks for hooks on the class, where pydantic's own names are silent."""

    def parse_hookimpl_opts(self, plugin: object, name: str) -> Any:
        if isinstance(plugin, Part) and not is_hook(type(plugin), name):
            return None
        return super().parse_hookimpl_opts(plugin, name)


@dataclass(frozen=True)
class Hook:
    """One implementation of a hook, called with those of the offered arguments that it takes."""

    where: Where
    function: Callable[..., Any]
    takes: tuple[str, ...]

    def __call__(self, expected: type[Result], place: Where | None = None, /, **offered: Any) -> Result:
        """Calls it. Raises PluginError if it raises or returns something else than `expected`."""
        try:
            result = self.function(**{name: offered[name] for name in self.takes})
        except FedsparseError:
            raise
        except (Exception, SystemExit) as error:
            raise PluginError(f"{place or self.where}: raised {describe(error)}") from error
        if isinstance(result, expected):
            return result
        if expected is float and isinstance(result, int):
            return result  # type: ignore[return-value]  # 0 is a fine sparsity
        raise PluginError(
            f"{place or self.where}: returned {type(result).__name__}; expected {expected.__name__}"
        )


@dataclass
class Hooks:
    """The hooks of a composed method. `at` is where the run is, for messages."""

    method: Method
    manager: pluggy.PluginManager
    found: dict[str, Hook]
    extras: dict[str, tuple[Hook, ...]]
    site: str
    score_batches: int
    sends: str
    gathered: bool
    at: tuple[int | None, int | None] = field(default=(None, None))

    def get(self, name: str) -> Hook | None:
        """The implementation of a slot's hook; None where the part leaves it to the default."""
        return self.found.get(name)

    def takes(self, name: str, argument: str) -> bool:
        """Whether a hook is implemented and asks for an argument."""
        return name in self.found and argument in self.found[name].takes

    def where(self, name: str) -> Where:
        """The place of a call now."""
        hook = self.found[name]
        return hook.where._replace(round=self.at[0], client=self.at[1])

    def call(self, name: str, expected: type[Result], **offered: Any) -> Result:
        """Calls an implemented hook with copies of the dicts; it may write into no tensor."""
        return self.ask(self.found[name], expected, **offered)

    def each(self, name: str) -> tuple[Hook, ...]:
        """Every implementation of an extra hook, in the order of the parts."""
        return self.extras.get(name, ())

    def ask(self, hook: Hook, expected: type[Result], **offered: Any) -> Result:
        """`call` of one implementation."""
        where = hook.where._replace(round=self.at[0], client=self.at[1])
        offered = {key: copied(value) for key, value in offered.items()}
        given = {key: offered[key] for key in ("params", "mask", "frozen", "anchor") if key in offered}
        before = versions(*given.values())
        result = hook(expected, where, **offered)
        if versions(*given.values()) != before:
            raise where.breach(f"wrote into a tensor of its arguments ({', '.join(given)}); return new ones")
        return result

    def promise(self, slot: str) -> str:
        """The budget promise of the part in a slot."""
        part = self.method.part(slot)
        return part.budget_promise if part else "none"

    def extra(self, name: str, **offered: Any) -> Any:
        """Calls every implementation of an extra hook."""
        try:
            return getattr(self.manager.hook, name)(**offered)
        except FedsparseError:
            raise
        except (Exception, SystemExit) as error:
            raise PluginError(f"{self.where_extra(name)}: raised {describe(error)}") from error

    def where_extra(self, name: str) -> Where:
        """The place of an extra hook, with the parts that implement it."""
        impls = getattr(self.manager.hook, name).get_hookimpls()
        parts = ", ".join(type(impl.plugin).__name__ for impl in impls)
        return Where(self.method.name, parts, "extras", name, *self.at)

    def loss(self, model: nn.Module, target: float, autocast: torch.dtype | None = None) -> ModelLoss:
        """The training loss of a model through this method's effective parameters and penalties."""

        def weights(params: Params, mask: Masks) -> Params:
            found = self.call("effective_params", dict, params=params, mask=mask, target=target)
            if found.keys() != params.keys():
                raise self.where("effective_params").breach("left out parameters, or named unknown ones")
            return found

        def penalty(params: Params, anchor: Params) -> Tensor:
            terms = self.extra("penalty", params=params, anchor=anchor)
            for term in terms:
                if not isinstance(term, Tensor) or term.dim():
                    raise self.where_extra("penalty").breach("returned something else than a 0-d tensor")
            return torch.stack(terms).sum()

        return ModelLoss(
            model,
            weights if self.get("effective_params") else None,
            penalty if self.has_extra("penalty") else None,
            autocast,
        )

    def paper_bytes(self, traffic: Traffic) -> float:
        """A client's round by the method's own formula."""
        count = self.extra("paper_bytes", traffic=traffic)
        if not isinstance(count, int | float) or not math.isfinite(count):
            raise self.where_extra("paper_bytes").breach(f"returned {count!r}; expected a number")
        return float(count)

    def pass_densities(self, params: Params, target: float) -> PassDensities | None:
        """What a step computes of each layer, by the densities of the mask; None: all that the mask has."""
        if not self.get("pass_densities"):
            return None

        def asked(density: Mapping[str, float]) -> Mapping[str, PassDensity]:
            found = self.call("pass_densities", dict, params=params, density=dict(density), target=target)
            for name, each in found.items():
                sound = isinstance(each, PassDensity) and all(isinstance(f, int | float) for f in each)
                if (
                    name not in density
                    or not sound
                    or not (0 <= each.weights <= density[name] and 0 <= each.inputs <= 1)
                ):
                    raise self.where("pass_densities").breach(
                        f"returned {each!r} for {name!r}; expected a PassDensity, of weights at most "
                        f"{density.get(name, 1):g} and of inputs at most 1, for some of {', '.join(density)}"
                    )
            return found

        return asked

    def has_extra(self, name: str) -> bool:
        """Whether any part implements an extra hook."""
        return name in self.extras

    def object(self, config: RunConfig, buffers: Iterable[str] | None = None) -> None:
        """Asks every part that may object to a run. Raises ConfigError with all that they say."""
        names = None if buffers is None else tuple(buffers)
        problems = [
            Problem(f"method.extras.{hook.where.part}", text)
            for hook in self.each("objections")
            for text in self.ask(hook, list, method=self.method, config=config, buffers=names)
        ]
        if problems:
            raise ConfigError(problems)

    def measure(self, state: ServerState, clock: Clock, **counts: int) -> dict[str, float]:
        """The numbers that parts add to a round's record; their memory goes into the state."""
        metrics: dict[str, float] = {}
        for hook in self.each("round_metrics"):
            kept = state.memory.get("extras", {})
            name = hook.where.part
            made = self.ask(hook, Measured, clock=clock, memory=kept.get(name, {}), **counts)
            wrong = [key for key, value in made.metrics.items() if not isinstance(value, int | float)]
            if wrong or metrics.keys() & made.metrics.keys():
                names = wrong or sorted(metrics.keys() & made.metrics.keys())
                raise hook.where.breach(f"returned {names}; expected numbers, by names that no part has yet")
            metrics |= made.metrics
            state.memory["extras"] = {**kept, name: made.memory}
        return metrics


def _check_arguments(part: Part) -> None:
    """Raises ValueError for an argument that a hook's specification does not have."""
    specs = {name: getattr(spec, name) for spec in (*SLOTS.values(), Extras) for name in hooks_of(spec)}
    for hook in sorted(part.hooks()):
        allowed = tuple(inspect.signature(specs[hook]).parameters)[1:]
        for argument in part.takes(hook):
            if argument not in allowed:
                raise ValueError(f"hook {hook} has no argument {argument!r}. {nearest(argument, allowed)}")


def compose(method: Method) -> Hooks:
    """Registers the five parts and the extras, and checks their hooks against the specifications.

    Raises ConfigError for an unknown hook or argument, and for parts that cannot work together.
    """
    manager = PartManager(PROJECT)
    for spec in [*SLOTS.values(), Extras]:
        manager.add_hookspecs(spec())
    for part in method.parts():
        try:
            if part.budget_promise not in PROMISES:
                raise ValueError(
                    f"budget_promise is {part.budget_promise!r}. {nearest(part.budget_promise, PROMISES)}"
                )
            _check_arguments(part)
            # equal parts are equal objects to pluggy: a name keeps them apart
            manager.register(part, name=f"{part.slot()}:{type(part).__name__}")
        except (pluggy.PluginValidationError, ValueError) as error:
            raise ConfigError(f"method {method.name}, part {type(part).__name__}: {error}") from None
    found, extras = dict[str, Hook](), dict[str, tuple[Hook, ...]]()
    for slot, spec in {**SLOTS, "extras": Extras}.items():
        for name in hooks_of(spec):
            for impl in getattr(manager.hook, name).get_hookimpls():
                where = Where(method.name, type(impl.plugin).__name__, slot, name)
                hook = Hook(where, impl.function, tuple(impl.argnames))
                if slot == "extras":
                    extras[name] = (*extras.get(name, ()), hook)
                else:
                    found[name] = hook
    try:
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise ConfigError(f"method {method.name}: {error}") from None
    batches = getattr(method.readjust, "score_batches", 1)
    if not isinstance(batches, int) or batches < 1:
        raise ConfigError(f"method {method.name}: score_batches is {batches!r}; expected 1 or more")
    sends = getattr(method.aggregate, "sends", "mask")
    if sends not in SENDS:
        raise ConfigError(f"method {method.name}: sends is {sends!r}. Allowed: {', '.join(SENDS)}")
    gathered = getattr(method.aggregate, "gathered", False)
    if not isinstance(gathered, bool):
        raise ConfigError(f"method {method.name}: gathered is {gathered!r}; expected True or False")
    for part in method.parts():
        for slot, partner in part.needs.items():
            other = type(method.part(slot)).__name__
            if other != partner:
                raise ConfigError(
                    f"method {method.name}: part {type(part).__name__} works only with {partner} in the slot "
                    f"{slot}, which holds {other}; swap both"
                )
        for slot, fields in part.agrees.items():
            other_part = method.part(slot)
            shared = [name for name in fields if hasattr(other_part, name)]
            for name in shared:
                ours, theirs = getattr(part, name), getattr(other_part, name)
                if ours != theirs:
                    raise ConfigError(
                        f"method {method.name}: {name} is {ours} in {type(part).__name__}, but {theirs} in "
                        f"the slot {slot}; set both alike"
                    )
    growing = [type(part).__name__ for part in method.parts() if part.grows]
    if growing and not getattr(method.local_step, "moves_zeros", True):
        raise ConfigError(
            f"method {method.name}: {', '.join(growing)} grows weights at 0, which the local step of "
            f"{type(method.local_step).__name__} can never move; swap one of them"
        )
    hooks = Hooks(method, manager, found, extras, _site(method), batches, sends, gathered)
    for needed in ("mask_init", "local_step", "contribute", "aggregate"):
        if needed not in found:
            filling = method.part(KNOWN[needed])
            raise ConfigError(
                f"method {method.name}, slot {KNOWN[needed]}: {type(filling).__name__} needs {needed}"
            )
    if hooks.site == "server:start" and hooks.takes("readjust", "score"):
        raise ConfigError(
            f"method {method.name}: readjust at the start of a round asks for `score`, which clients "
            'collect during it; use site "server:end" or "client"'
        )
    return hooks


def _site(method: Method) -> str:
    site = getattr(method.readjust, "site", "server:end")
    if site not in SITES:
        raise ConfigError(
            f"method {method.name}, part {type(method.readjust).__name__}: site is {site!r}. "
            f"Allowed: {', '.join(SITES)}"
        )
    return str(site)
