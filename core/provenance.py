"""Where settings came from, as a run's `config.toml` says in comments, and what a run was; no torch."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .resolve import Resolved


CONDITIONS = ("task.data_root", "task.download", "execution.", "output.")
"""Settings that say where and how a run is computed; but `output.evaluate_every` decides its best round."""


def matters(path: str) -> bool:
    """Whether a run's figures depend on the setting, but for the seed."""
    return path == "output.evaluate_every" or not (path == "seed" or path.startswith(CONDITIONS))


def written_sources(text: str) -> dict[str, str]:
    """The source of each setting by dotted path, from the comment behind its value.

    Reads what `to_toml` writes, a setting a line; a line that it cannot read has no source.
    """
    sources: dict[str, str] = {}
    table: tuple[str, ...] = ()
    for line in text.splitlines():
        if line.startswith("["):
            table = _only_path(line)
        elif "=" in line and (found := _commented(line)):
            path, source = found
            sources[".".join((*table, *path))] = source
    return sources


def _commented(line: str) -> tuple[tuple[str, ...], str] | None:
    """The key and the comment of `key = value # comment`; a # inside the value is none."""
    end = line.find(" # ")
    while end >= 0:
        path = _only_path(line[:end])
        if path:
            return path, line[end + 3 :].strip()
        end = line.find(" # ", end + 1)
    return None


def _only_path(text: str) -> tuple[str, ...]:
    """The keys that lead to the only thing in a piece of TOML; empty if it is not valid."""
    try:
        tree: Any = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return ()
    path: list[str] = []
    while isinstance(tree, Mapping) and len(tree) == 1:
        ((key, tree),) = tree.items()
        path.append(key)
    return tuple(path)


def about(resolved: Resolved) -> dict[str, Any]:
    """What a summary says of the method beyond its name, so that no plugin need be loaded to read it."""
    from .config import leaves
    from .hookspecs import SLOTS
    from .ledger import paper_bytes

    method = resolved.method
    parts = {slot: part.summary() for slot in SLOTS if (part := method.part(slot)) is not None}
    parts |= {type(part).__name__: part.summary() for part in method.extras}
    counting = [part for part in method.parts() if "paper_bytes" in type(part).hooks()]
    formula = " ".join((paper_bytes.__doc__ or "").split())
    if counting:
        formula = f"{type(counting[0]).__name__}: {counting[0].summary()}"
    settings = {path: value for path, value in leaves(resolved.tree()) if matters(path)}
    return {"paper": method.paper, "paper_formula": formula, "parts": parts, "settings": settings}
