"""Method: a named record of five parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .hookspecs import SLOTS
from .part import Part


@dataclass(frozen=True)
class Method:
    """A federated sparse training method; a slot left out takes FedAvg's part.

    `extras` are parts that bring hooks of no slot (penalties, cost formulas). `paper` is the reference.
    `preset` holds the configuration that the method prefers, as nested tables, for methods that ship no
    preset file. Raises TypeError for a part in the wrong slot.
    """

    name: str
    mask_init: Part | None = None
    local_step: Part | None = None
    freeze_policy: Part | None = None
    readjust: Part | None = None
    aggregate: Part | None = None
    extras: tuple[Part, ...] = ()
    paper: str = ""
    preset: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise TypeError(f"a method's name is a text; given {self.name!r}")
        if not isinstance(self.preset, Mapping):
            raise TypeError(f"method {self.name}: preset holds {self.preset!r}; expected nested tables")
        if not isinstance(self.extras, tuple):
            raise TypeError(f"method {self.name}: extras holds {self.extras!r}; expected a tuple of parts")
        for slot in SLOTS:
            self._check(slot, getattr(self, slot))
        for part in self.extras:
            self._check("extras", part)
        if len({type(part) for part in self.extras}) < len(self.extras):
            raise TypeError(
                f"method {self.name}: two extras of one class; their settings could not be told apart"
            )

    def _check(self, slot: str, part: Part | None) -> None:
        if part is None:
            return
        if not isinstance(part, Part):
            raise TypeError(
                f"method {self.name}: {slot} holds {part!r}; expected an instance of a Part, such as MyPart()"
            )
        if part.slot() != slot:
            raise TypeError(
                f"method {self.name}: {slot} holds {type(part).__name__}, which fills {part.slot()}"
            )

    def part(self, slot: str) -> Part | None:
        """The part in a slot, or None if the method leaves it to FedAvg's."""
        found: Part | None = getattr(self, slot)
        return found

    def parts(self) -> Iterator[Part]:
        """Every part of the method, slots first."""
        yield from (part for slot in SLOTS if (part := self.part(slot)) is not None)
        yield from self.extras

    def with_parts(self, **parts: Part | None) -> Method:
        """This method with some slots filled otherwise."""
        return replace(self, **parts)  # type: ignore[arg-type]
