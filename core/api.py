"""`fedsparse.run` and `resume`: runs from Python, the same as on the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .config import Layer, expand
from .errors import ConfigError, Problem
from .resolve import Resolved, resolve
from .results import Result

MOST_WORKERS = 1024


def run(
    plugin: str = "",
    *,
    swaps: Mapping[str, str] | None = None,
    extras: Sequence[str] = (),
    configs: Sequence[str | Path] = (),
    out: str | Path | None = None,
    progress: bool | Callable[[Mapping[str, Any]], object] = False,
    workers: int = 1,
    track: Sequence[str] = (),
    **settings: Any,
) -> Result:
    """Trains with a method and returns what the run wrote.

    `plugin` is a name or a file's path, `swaps` are by slot, as `{"readjust": "feddst"}`, `extras` parts
    beside the slots, as `["privacy"]`, `configs` presets or TOML files. A setting's dotted path is written
    with two underscores, or given as a table: `federation__rounds=20`, `seed=1`, `sparsity={"target": 0.9}`.
    `out` is a new or empty folder; None makes one under `runs/`. `progress` shows a bar (True), or is called
    with each round's metrics. `workers`, from 1 to 1024, is the number of processes that share each round's
    clients: 1 trains in this one, more are forked from it, which a process that has used a GPU cannot do.
    `track` names trackers: "csv", "tensorboard", "wandb", "mlflow".

    Ctrl-C (interrupting the kernel of a notebook) ends the run after its round; what was recorded stays.
    Raises ConfigError for wrong settings, all at once, and RunError for what goes wrong in the run.
    """
    for name in ("swap", "extra", "config"):
        if name in settings:
            raise ConfigError([Problem(name, f"no such setting; the argument is called {name}s")])
    if swaps is not None and not isinstance(swaps, Mapping):
        message = f"given {swaps!r}; expected plugins by slot, such as {{'readjust': PLUGIN}}"
        raise ConfigError([Problem("swaps", message)])
    configs = [configs] if isinstance(configs, str | Path) else configs
    resolved = resolve(
        plugin or None,
        [str(config) for config in configs],
        [f"{slot}={use}" for slot, use in (swaps or {}).items()],
        extras=[extras] if isinstance(extras, str) else extras,
        layers=[Layer("fedsparse.run", expand(nested(settings)))],
    )
    return _watched(resolved, None if out is None else Path(out), progress, workers, track)


def resume(
    folder: str | Path,
    *,
    progress: bool | Callable[[Mapping[str, Any]], object] = False,
    workers: int = 1,
    track: Sequence[str] = (),
) -> Result:
    """Goes on with the interrupted run in a folder, from its last checkpoint, and returns the whole run.

    The other arguments are those of `run`. Raises ConfigError if no run was begun there, and RunError if it
    has played all of its rounds, or if settings, code or versions are not those of the checkpoint.
    """
    resolved = resolve(configs=[str(begun(folder))])
    return _watched(resolved, Path(folder), progress, workers, track, resume=True)


def begun(folder: str | Path) -> Path:
    """The configuration of the run that was begun in a folder. Raises ConfigError if none was."""
    path = Path(folder) / "config.toml"
    if not path.is_file():
        raise ConfigError(f"{folder} is no run's folder: it has no config.toml; nothing to go on with")
    return path


def _watched(
    resolved: Resolved,
    out: Path | None,
    progress: bool | Callable[[Mapping[str, Any]], object],
    workers: int,
    track: Sequence[str],
    resume: bool = False,
) -> Result:
    from .playing import played_alone
    from .progress import watching
    from .trackers import tracked

    if isinstance(workers, bool) or not isinstance(workers, int) or not 1 <= workers <= MOST_WORKERS:
        raise ConfigError([Problem("workers", f"given {workers!r}; allowed: 1 to {MOST_WORKERS}")])
    names = [track] if isinstance(track, str) else track
    with watching(progress, resolved, workers) as view:
        return played_alone(tracked(resolved, names), out, view, workers, resume)


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
