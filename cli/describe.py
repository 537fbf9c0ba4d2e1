"""Tables about plugins, drawn from the parts' own fields."""

from __future__ import annotations

import inspect

from pydantic.fields import FieldInfo
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..core.errors import ConfigError
from ..core.hookspecs import SLOTS
from ..core.part import Part
from ..core.registry import Plugin, Registry


def show_plugins() -> None:
    """One row a plugin: what its method puts in each slot; failures in red."""
    registry, console = Registry(), Console()
    table = Table(title="Installed plugins")
    table.add_column("plugin", style="bold", no_wrap=True)
    for slot in SLOTS:
        table.add_column(slot, overflow="fold")
    table.add_column("source", overflow="fold")
    failures = []
    for name, found in registry.all():
        if isinstance(found, ConfigError):
            table.add_row(f"[red]{name}[/red]", *["[red]✗[/red]"] * len(SLOTS), registry.source(name))
            failures.append(str(found))
        else:
            table.add_row(name, *[_cell(found, slot) for slot in SLOTS], found.source)
    console.print(table)
    console.print("· takes fedavg's part; (parts in brackets are not in the method)", style="dim")
    for failure in failures:
        console.print(f"[red]{escape(failure)}[/red]", soft_wrap=True)


def show_plugin(reference: str) -> None:
    """A plugin's reference, then each part with its fields."""
    console, plugin = Console(), Registry().load(reference)
    console.print(f"[bold]{escape(plugin.name)}[/bold]  ({escape(plugin.source)})")
    if plugin.method and plugin.method.paper:
        console.print(escape(plugin.method.paper))
    module = inspect.getmodule(next(iter(plugin.parts.values()))) if not plugin.method else None
    doc = inspect.getdoc(module) if module else _method_doc(plugin)
    if doc:
        console.print("\n" + escape(doc))
    for slot in [*SLOTS, "extras"]:
        parts = [part for part in plugin.parts.values() if part.slot() == slot]
        for part in parts:
            console.print(f"\n[bold]{slot}[/bold]  {plugin.name}:{part.__name__}  {escape(part.summary())}")
            if part.model_fields:
                console.print(_fields(part, plugin))
        if not parts and plugin.method:
            console.print(f"\n[bold]{slot}[/bold]  " + ("none" if slot == "extras" else "fedavg's part"))


def _cell(plugin: Plugin, slot: str) -> str:
    own = plugin.method.part(slot) if plugin.method else None
    others = [p.__name__ for p in plugin.parts.values() if p.slot() == slot and p is not type(own)]
    names = [type(own).__name__] if own else []
    return ", ".join(names + [f"({name})" for name in others]) or "·"


def _method_doc(plugin: Plugin) -> str:
    """The docstring of the module that holds METHOD: of a part defined there."""
    parts = list(plugin.method.parts()) if plugin.method else []
    for part in reversed(parts):
        module = inspect.getmodule(type(part))
        if module is not None and getattr(module, "METHOD", None) is plugin.method:
            return inspect.getdoc(module) or ""
    return ""


def _fields(part: type[Part], plugin: Plugin) -> Table:
    table = Table(show_edge=False, pad_edge=False)
    for heading in ("field", "default", "allowed", "description"):
        table.add_column(heading, overflow="fold")
    for name, field in part.model_fields.items():
        table.add_row(name, _default(field), escape(_allowed(field)), escape(field.description or ""))
    return table


def _default(field: FieldInfo) -> str:
    return "required" if field.is_required() else str(field.get_default(call_default_factory=True))


def _allowed(field: FieldInfo) -> str:
    """Type and range, as in `float in [0, 1)`."""
    annotation = field.annotation
    kind = (
        annotation.__name__ if isinstance(annotation, type) and not _generic(annotation) else str(annotation)
    )
    kind = kind.replace("typing.", "").replace("Literal", "one of ")
    bounds = {type(item).__name__: item for item in field.metadata}
    low = bounds.get("Ge") or bounds.get("Gt")
    high = bounds.get("Le") or bounds.get("Lt")
    if not low and not high:
        return kind
    left = f"[{low.ge}" if "Ge" in bounds else f"({low.gt}" if low else "(-∞"  # type: ignore[union-attr]
    right = f"{high.le}]" if "Le" in bounds else f"{high.lt})" if high else "∞)"  # type: ignore[union-attr]
    return f"{kind} in {left}, {right}"


def _generic(annotation: object) -> bool:
    return bool(getattr(annotation, "__args__", ()))
