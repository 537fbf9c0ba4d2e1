"""Tables about plugins, drawn from the parts' own fields."""

from __future__ import annotations

import inspect
import sys
from typing import Literal, get_args, get_origin

from pydantic.fields import FieldInfo
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..core.config import toml_value
from ..core.errors import ConfigError
from ..core.hookspecs import SLOTS
from ..core.part import Part
from ..core.registry import Plugin, Registry


def show_plugins() -> None:
    """Each plugin's parts by slot, and where it comes from; failures in red."""
    registry, console = Registry(), Console()
    table = Table(title="Installed plugins")
    for heading in ("plugin", "slot", "part", "source"):
        table.add_column(heading, overflow="fold", no_wrap=heading in ("plugin", "slot"))
    failures = []
    for name, found in registry.all():
        if isinstance(found, ConfigError):
            failures.append(str(found))
            table.add_row(
                f"[red]{escape(name)}[/red]", "", "[red]cannot be loaded[/red]", registry.source(name)
            )
        else:
            for number, (slot, parts) in enumerate(_by_slot(found)):
                first = (f"[bold]{escape(name)}[/bold]", found.source) if number == 0 else ("", "")
                table.add_row(first[0], slot, ", ".join(parts), first[1])
        table.add_section()
    console.print(table)
    console.print("Slots that a plugin does not name take fedavg's part.", style="dim")
    for failure in failures:
        console.print(f"[red]{escape(failure)}[/red]", soft_wrap=True)


def show_plugin(reference: str) -> None:
    """A plugin's reference, then each part with its fields."""
    console, plugin = Console(highlight=False), Registry().load(reference)
    console.print(f"[bold]{escape(plugin.name)}[/bold]  ({escape(plugin.source)})")
    if plugin.method and plugin.method.paper:
        console.print(escape(plugin.method.paper))
    doc = inspect.getdoc(sys.modules[plugin.module]) or ""
    for paragraph in doc.split("\n\n"):
        console.print("\n" + escape(" ".join(paragraph.split())))
    for slot in [*SLOTS, "extras"]:
        parts = [part for part in plugin.parts.values() if part.slot() == slot]
        for part in parts:
            heading = f"{plugin.name}:{part.__name__}  {part.summary()}"
            console.print(f"\n[bold]{slot}[/bold]  {escape(heading)}")
            if part.model_fields:
                console.print(_fields(part))
        if not parts and plugin.method:
            console.print(f"\n[bold]{slot}[/bold]  " + ("none" if slot == "extras" else "fedavg's part"))


def _by_slot(plugin: Plugin) -> list[tuple[str, list[str]]]:
    """The slots that a plugin has parts for; parts that its method does not use are in brackets."""
    used = {type(part) for part in plugin.method.parts()} if plugin.method else set()
    slots: dict[str, list[str]] = {}
    for slot in [*SLOTS, "extras"]:
        for part in plugin.parts.values():
            if part.slot() == slot:
                slots.setdefault(slot, []).append(part.__name__ if part in used else f"({part.__name__})")
    return list(slots.items())


def _fields(part: type[Part]) -> Table:
    table = Table(show_edge=False, pad_edge=False)
    for heading in ("field", "default", "allowed", "description"):
        table.add_column(heading, overflow="fold")
    for name, field in part.model_fields.items():
        table.add_row(name, *map(escape, (_default(field), _allowed(field), field.description or "")))
    return table


def _default(field: FieldInfo) -> str:
    """As TOML writes it."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return "unset" if value is None else toml_value(value)


def _allowed(field: FieldInfo) -> str:
    """Type and range, as in `float in [0, 1)`."""
    annotation = field.annotation
    if get_origin(annotation) is Literal:
        return " | ".join(map(toml_value, get_args(annotation)))
    named = isinstance(annotation, type) and not get_args(annotation)
    kind = annotation.__name__ if isinstance(annotation, type) and named else str(annotation)
    low, high = "(-∞", "∞)"
    for item in field.metadata:
        low = f"[{item.ge}" if hasattr(item, "ge") else f"({item.gt}" if hasattr(item, "gt") else low
        high = f"{item.le}]" if hasattr(item, "le") else f"{item.lt})" if hasattr(item, "lt") else high
    return kind if (low, high) == ("(-∞", "∞)") else f"{kind} in {low}, {high}"
