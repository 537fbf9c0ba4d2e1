"""`fedsparse.run`: a run from Python, the same as on the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import Layer, expand
from .errors import ConfigError, Problem
from .resolve import Resolved, resolve
from .results import Result

if TYPE_CHECKING:
    from .state import Report


def run(
    plugin: str = "",
    *,
    swaps: Mapping[str, str] | None = None,
    extras: Sequence[str] = (),
    configs: Sequence[str | Path] = (),
    out: str | Path | None = None,
    progress: bool | Callable[[Mapping[str, Any]], object] = False,
    **settings: Any,
) -> Result:
    """Trains with a method in this process and returns what the run wrote.

    `plugin` is a name or a file's path, `swaps` are by slot, as `{"readjust": "feddst"}`, `extras` parts
    beside the slots, as `["privacy"]`, `configs` presets or TOML files. A setting's dotted path is written
    with two underscores, or given as a table: `federation__rounds=20`, `seed=1`, `sparsity={"target": 0.9}`.
    `out` is a new or empty folder; None makes one under `runs/`. `progress` shows a bar (True), or is called
    with each round's metrics.

    Ctrl-C (interrupting the kernel of a notebook) ends the run after its round; what was recorded stays.
    Raises ConfigError for wrong settings, all at once, and RunError for what goes wrong in the run.
    """
    from . import runner

    given = Layer("fedsparse.run", expand(nested(settings)))
    swapped = [f"{slot}={use}" for slot, use in (swaps or {}).items()]
    resolved = resolve(
        plugin or None, [str(config) for config in configs], swapped, extras=extras, layers=[given]
    )
    folder: list[Path] = []
    with _watching(progress, resolved) as watch:
        runner.run(
            resolved,
            None if out is None else Path(out),
            begun=lambda engine, made: folder.append(made.path),
            watch=watch,
        )
    return Result.load(folder[0])


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`{"a__b": 1, "a": {"c": 2}}` as `{"a": {"b": 1, "c": 2}}`. Raises ConfigError if two are one."""
    tree: dict[str, Any] = {}
    for name, value in settings.items():
        *path, last = name.split("__")
        table = tree
        for key in path:
            table = table.setdefault(key, {})
            if not isinstance(table, dict):
                raise ConfigError([Problem(name.replace("__", "."), f"{key!r} was given a value, too")])
        own = nested(value) if isinstance(value, Mapping) else {}
        held = table.setdefault(last, {}) if isinstance(value, Mapping) else None
        if (held is None and last in table) or (held is not None and set(held) & set(own)):
            raise ConfigError(
                [Problem(name.replace("__", "."), f"given both ways: {', '.join(own) or last}")]
            )
        if held is None:
            table[last] = str(value) if isinstance(value, Path) else value
        else:
            held.update(own)
    return tree


@contextmanager
def _watching(
    progress: bool | Callable[[Mapping[str, Any]], object], resolved: Resolved
) -> Iterator[Callable[[Report], None]]:
    """Who is told of each round."""
    if callable(progress):
        told = progress

        def tell(report: Report) -> None:
            told(report.metrics)

        yield tell
        return
    if not progress:
        yield lambda report: None
        return
    from rich.progress import Progress

    with Progress() as bars:
        bar = bars.add_task(resolved.method.name, total=resolved.config.federation.rounds)
        yield lambda report: bars.advance(bar)
