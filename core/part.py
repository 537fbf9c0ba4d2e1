"""Part: what fills a slot."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from .component import Component
from .hookspecs import PROJECT, SLOTS, Extras, hooks_of


class Part(Component):
    """A frozen pydantic model whose `@hookimpl` methods implement the hooks of one slot.

    Fields are the hyper-parameters (description, unit and range belong in each `Field`). The slot follows
    from the hooks. Parts are final: use another part's functions, do not inherit from it.

    Class attributes that the engine reads, where they apply:
    `budget_promise` — active counts after the part's hook are "exact"ly the budget, "at most" it, or "none";
    `site` (readjust) — "client", "server:start" or "server:end" (may be a field);
    `score_batches` (readjust) — minibatches behind `score`.
    """

    budget_promise: ClassVar[Literal["exact", "at most", "none"]] = "at most"

    @classmethod
    def hooks(cls) -> frozenset[str]:
        """Names of the hooks that this part implements."""
        return frozenset(name for name in dir(cls) if is_hook(cls, name))

    @classmethod
    def slot(cls) -> str:
        """The slot that the hooks belong to; "extras" for a part that only brings extras.

        Raises TypeError for a part without hooks, or with hooks of two slots.
        """
        hooks = cls.hooks()
        slots = [slot for slot, spec in SLOTS.items() if hooks & set(hooks_of(spec))]
        if len(slots) == 1:
            return slots[0]
        if slots:
            raise TypeError(
                f"part {cls.__name__} implements hooks of {len(slots)} slots ({', '.join(slots)}); "
                "a part fills one slot: split it"
            )
        if hooks & set(hooks_of(Extras)):
            return "extras"
        known = [hook for spec in [*SLOTS.values(), Extras] for hook in hooks_of(spec)]
        raise TypeError(
            f"part {cls.__name__} implements no known hook (found: {', '.join(sorted(hooks)) or 'none'}); "
            f"mark methods with @hookimpl; hooks are {', '.join(known)}"
        )


def is_hook(cls: type, name: str) -> bool:
    """Whether `@hookimpl` marked the class attribute `name`."""
    if name.startswith("_") or name.startswith("model_"):
        return False  # pydantic's own names; some warn when touched
    attribute: Any = getattr(cls, name, None)
    return hasattr(attribute, f"{PROJECT}_impl")
