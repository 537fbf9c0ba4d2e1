"""Part: what fills a slot."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar, Literal, get_args

from .component import Component
from .errors import nearest
from .hookspecs import PROJECT, SLOTS, Extras, hooks_of

Promise = Literal["exact", "at most", "none"]
PROMISES: tuple[str, ...] = get_args(Promise)
KNOWN: dict[str, str] = {
    hook: slot for slot, spec in {**SLOTS, "extras": Extras}.items() for hook in hooks_of(spec)
}
"""Slot of each hook."""


class Part(Component):
    """A frozen pydantic model whose `@hookimpl` methods implement the hooks of one slot.

    Fields are the hyper-parameters (description, unit and range belong in each `Field`). The slot follows
    from the hooks; a part may bring extras (a penalty) besides, which then travel with it in a swap. Parts
    are final: use another part's functions, do not inherit from it.

    Class attributes that the engine reads, where they apply:
    `budget_promise` — active counts after the part's hook are "exact"ly the budget, "at most" it, or "none";
    `needs` — parts that must fill other slots, {slot: class name}, where this one alone would be wrong;
    `agrees` — fields or properties that must be as in the part of another slot, {slot: fields},
    if it has them;
    `grows` — it activates weights at the value 0, which a local step must then be able to move;
    `whole_batches` (local_step, False by default) — what a step does to a sample depends on the others of its
    minibatch, which therefore may not be filled up with samples that do not count;
    `moves_zeros` (local_step, a property or class attribute, True by default) — whether it can;
    `from_key` (mask_init, False by default) — the mask follows from `budget` and `key` alone, not from values
    of `params`, so that a client can draw it itself and is charged a seed in its place;
    `site` (readjust) — "client", "server:start" or "server:end" (the default); may be a field;
    `sends` (aggregate) — "mask" (the default) or "support", see the hook `contribute`;
    `gathered` (aggregate, False by default) — it gets clients' contributions stacked, not added;
    `linear` (aggregate, False by default) — clients contribute nothing but their weight, and their params
    times it, and masks: sums of these are all that the server sees;
    `score_batches` (readjust) — minibatches behind `score`, 1 or more (the default is 1); may be a field.
    """

    budget_promise: ClassVar[Promise] = "at most"
    needs: ClassVar[dict[str, str]] = {}
    agrees: ClassVar[dict[str, tuple[str, ...]]] = {}
    grows: ClassVar[bool] = False

    @classmethod
    def hooks(cls) -> frozenset[str]:
        """Names of the methods that are marked as hooks."""
        return frozenset(name for name in dir(cls) if is_hook(cls, name))

    @classmethod
    def takes(cls, hook: str) -> tuple[str, ...]:
        """The arguments that its implementation of a hook asks for; () without one."""
        return tuple(inspect.signature(getattr(cls, hook)).parameters)[1:] if hook in cls.hooks() else ()

    @classmethod
    def slot(cls) -> str:
        """The slot that the hooks belong to; "extras" for a part that only brings extras.

        Raises TypeError for a part without hooks or with hooks of two slots, for an unknown hook, and for a
        method that is named like a hook but not marked.
        """
        hooks = cls.hooks()
        for name in sorted(hooks - KNOWN.keys()):
            raise TypeError(f"part {cls.__name__}: unknown hook {name!r}. {nearest(name, KNOWN)}")
        for name, attribute in vars(cls).items():
            if name in KNOWN and name not in hooks and inspect.isroutine(attribute):
                raise TypeError(
                    f"part {cls.__name__}: {name} has the name of a hook; write @hookimpl above it"
                )
        slots = [slot for slot in SLOTS if any(KNOWN[hook] == slot for hook in hooks)]
        if len(slots) > 1:
            raise TypeError(
                f"part {cls.__name__} implements hooks of {len(slots)} slots ({', '.join(slots)}); "
                "a part fills one slot: split it"
            )
        if not hooks:
            raise TypeError(
                f"part {cls.__name__} implements no hook; mark some with @hookimpl: {', '.join(KNOWN)}"
            )
        return slots[0] if slots else "extras"


def is_hook(cls: type, name: str) -> bool:
    """Whether `@hookimpl` marked the class attribute `name`."""
    if name.startswith(("_", "model_")):
        return False  # pydantic's own names; some warn when touched
    attribute: Any = getattr(cls, name, None)
    return hasattr(attribute, f"{PROJECT}_impl")
