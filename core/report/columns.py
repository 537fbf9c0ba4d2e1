"""A run's columns, and runs in groups that differ only in the seed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import leaves
from ..errors import ConfigError, Problem
from ..results import Result

NO_DIFFERENCE = ("seed", "output", "execution", "ledger", "task.data_root", "task.download")
"""Settings that change no result of a run, or, the seed, only by chance."""

Settings = Mapping[str, Any]


def column(run: Result, name: str) -> NDArray[np.float64]:
    """A number of `metrics.jsonl`, one value a round; NaN where a round, or the run, has none."""
    values = (line.get(name) for line in run.rounds)  # not run.metrics, which makes all of them
    return np.array([value if isinstance(value, int | float) else np.nan for value in values], dtype=float)


def traffic(run: Result) -> NDArray[np.float64]:
    """Bytes sent up and down since the start, by the end of each round."""
    return column(run, "upload_bytes_total") + column(run, "download_bytes_total")


@dataclass(frozen=True)
class Group:
    """Runs that differ only in the seed, ordered by it; `settings` are those that they share."""

    name: str
    runs: tuple[Result, ...]
    settings: Settings

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(_seed(run) for run in self.runs)


def grouped(runs: Sequence[Result]) -> tuple[Group, ...]:
    """Groups with telling names, in the order in which they were given.

    Raises ConfigError if two runs have the same settings and seed: the second tells nothing new.
    """
    together: dict[str, list[Result]] = {}
    problems = []
    for run in runs:
        same = together.setdefault(json.dumps(settings(run), sort_keys=True, default=str), [])
        twin = next((other for other in same if _seed(other) == _seed(run)), None)
        if twin is not None:
            message = f"{run.path} repeats {twin.path}: same settings, same seed; give one of them"
            problems.append(Problem("", message))
        same.append(run)
    if problems:
        raise ConfigError(problems)
    members = [tuple(sorted(same, key=_seed)) for same in together.values()]
    return tuple(
        Group(name, same, settings(same[0])) for name, same in zip(_names(members), members, strict=True)
    )


def settings(run: Result) -> dict[str, Any]:
    """Dotted paths and values of what decides a run's results, the seed left out."""
    return {path: value for path, value in leaves(run.config) if not _within(path, NO_DIFFERENCE)}


def differing(several: Sequence[Settings]) -> tuple[str, ...]:
    """Paths of the settings that are not the same in all, in the order of the files."""
    paths = dict.fromkeys(path for one in several for path in one)
    return tuple(path for path in paths if any(one.get(path) != several[0].get(path) for one in several))


def shown(value: Any) -> str:
    """A setting's value in a name or a note."""
    return "unset" if value is None else json.dumps(value) if isinstance(value, list | bool) else str(value)


def _names(members: Sequence[Sequence[Result]]) -> list[str]:
    """The method with its swaps, and as many differing settings as it takes to tell groups apart."""
    bases = [_method(runs) for runs in members]
    flat = [settings(runs[0]) for runs in members]
    names = list(bases)
    for base in dict.fromkeys(bases):
        alike = [index for index, other in enumerate(bases) if other == base]
        if len(alike) == 1:
            continue
        paths = differing([flat[index] for index in alike])
        chosen = [path.removesuffix(".use") for path in paths if path.endswith(".use")]
        short = [path for path in paths if path.endswith(".use") or not _within(path, chosen)]
        for tried in (short, paths):  # settings of a part say nothing where the part itself differs
            said = [_told(base, flat[index], tried) for index in alike]
            if len(set(said)) == len(said):
                break
        for index, name in zip(alike, said, strict=True):
            names[index] = name
    return names


def _told(base: str, flat: Settings, paths: Sequence[str]) -> str:
    return f"{base} ({', '.join(f'{path}={shown(flat.get(path))}' for path in paths)})"


def _method(runs: Sequence[Result]) -> str:
    plugin = str(runs[0].config.get("method", {}).get("plugin", "?"))
    swaps: Mapping[str, str] = next((r.summary["swaps"] for r in runs if r.summary.get("swaps")), {})
    name = Path(plugin).stem if plugin.endswith(".py") else plugin
    return name + "".join(f" + {slot}={use.rpartition('/')[2]}" for slot, use in swaps.items())


def _seed(run: Result) -> int:
    return int(run.config.get("seed", 0))


def _within(path: str, tables: Sequence[str]) -> bool:
    return any(path == table or path.startswith(f"{table}.") for table in tables)
