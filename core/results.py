"""What a finished or interrupted run left in its folder, read back; imports no torch."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .errors import RunError
from .provenance import written_sources

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class Result:
    """A run: its folder, resolved settings, summary, and the lines of `metrics.jsonl`.

    `summary` is empty if the run did not end by itself or by Ctrl-C.
    """

    path: Path
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    rounds: Sequence[Mapping[str, Any]]

    @classmethod
    def load(cls, path: str | Path) -> Result:
        """Reads a run's folder. Raises RunError if it is none, or is damaged."""
        path = Path(path)
        # not Path's, which raises for a name that is too long and a folder that is not to be looked into
        if not all(os.path.isfile(path / name) for name in ("config.toml", "metrics.jsonl")):
            raise RunError(f"{path} is no run: a run's folder holds config.toml and metrics.jsonl")
        reading = path / "config.toml"
        try:
            config = tomllib.loads(reading.read_text(encoding="utf-8"))
            reading = path / "metrics.jsonl"
            lines = reading.read_bytes().splitlines(keepends=True)
            if lines and not lines[-1].endswith((b"\n", b"}")):
                lines.pop()  # a full disk, or a kill, left half of it
            rounds = [json.loads(line) for line in lines]
            reading = path / "summary.json"
            summary = json.loads(reading.read_text(encoding="utf-8")) if reading.exists() else {}
        except (OSError, ValueError) as error:
            raise RunError(f"cannot read {reading}: {error}") from None
        if not isinstance(summary, dict):
            raise RunError(f"{reading} is damaged: it holds no table")
        if [line.get("round") if isinstance(line, dict) else None for line in rounds] != [
            *range(len(rounds))
        ]:
            raise RunError(f"{path / 'metrics.jsonl'} is damaged: its lines are not the rounds from 0 on")
        return cls(path, config, summary, rounds)

    @property
    def sources(self) -> dict[str, str]:
        """Where each setting came from, by dotted path; empty if its `config.toml` does not say."""
        try:
            return written_sources((self.path / "config.toml").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunError(f"cannot read {self.path / 'config.toml'}: {error}") from None

    @property
    def finished(self) -> bool:
        """Whether all of its rounds were played."""
        return bool(self.summary) and not self.summary.get("interrupted", True)

    @property
    def metrics(self) -> dict[str, NDArray[np.float64]]:
        """Every number of `metrics.jsonl` by name, one value a round; NaN where a round has none.

        What a line holds by layer is `density/fc1.weight`.
        """
        rounds = [dict(numbers(line)) for line in self.rounds]
        names = dict.fromkeys(name for line in rounds for name in line)
        return {name: np.array([line.get(name, np.nan) for line in rounds], dtype=float) for name in names}

    def frame(self) -> pandas.DataFrame:
        """The same as a pandas frame, a row a round. Raises RunError where pandas is not installed."""
        try:
            import pandas
        except ImportError:
            raise RunError("Result.frame needs pandas: pip install pandas") from None
        return pandas.DataFrame(self.metrics)

    def __repr__(self) -> str:
        method, final = self.summary.get("method", "?"), self.summary.get("final", {})
        accuracy = final.get("test_accuracy")
        shown = "" if accuracy is None else f", test_accuracy={accuracy:.4f}"
        return f"Result({str(self.path)!r}, method={method!r}, rounds={len(self.rounds)}{shown})"


def numbers(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers among a round's metrics by name; those of a table as `table/name`."""
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield from numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix + name, value
