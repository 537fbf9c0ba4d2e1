"""What differs between two runs, read from their folders; imports no torch."""

from __future__ import annotations

import filecmp
from collections.abc import Mapping
from typing import Any

from .card import UNKNOWN, Section
from .config import leaves, toml_value
from .results import Result

FIGURES = {
    "round": "last round (from 0)",
    "test_accuracy": "test accuracy (pooled)",
    "client_accuracy": "client accuracy (mean)",
    "test_loss": "test loss",
    "train_loss": "training loss",
    "sparsity": "sparsity",
    "upload_bytes_total": "bytes uploaded",
    "download_bytes_total": "bytes downloaded",
    "paper_bytes_total": "bytes, by the paper's formula",
    "flops_total": "training FLOPs",
}


def differences(a: Result, b: Result) -> list[Section]:
    """Settings, conditions and figures in which two runs differ; empty if there are none.

    Times are no difference: no two runs take the same.
    """
    sections = [_settings(a, b), _conditions(a, b), _figures(a, b), _course(a, b)]
    return [section for section in sections if section.rows]


def _settings(a: Result, b: Result) -> Section:
    mine, theirs = dict(leaves(a.config)), dict(leaves(b.config))
    sources = a.sources, b.sources
    rows = []
    for path in dict.fromkeys([*mine, *theirs]):
        if mine.get(path) != theirs.get(path) or (path in mine) != (path in theirs):
            values = ["unset" if path not in side else toml_value(side[path]) for side in (mine, theirs)]
            came = [
                ("" if path not in side else source.get(path, UNKNOWN))
                for side, source in zip((mine, theirs), sources, strict=True)
            ]
            rows.append((path, values[0], values[1], came[0], came[1]))
    return Section("Settings", ("setting", "A", "B", "A from", "B from"), rows)


def _conditions(a: Result, b: Result) -> Section:
    """The seed is a setting."""

    def conditions(result: Result) -> dict[str, str]:
        summary = result.summary
        known = {name: str(summary[name]) for name in ("device", "workers") if name in summary}
        versions = {f"{name} version": str(v) for name, v in summary.get("versions", {}).items()}
        state = "ended" if result.finished else "interrupted" if summary else "did not end"
        return {"state": state, **known, **versions}

    return Section("Conditions", ("", "A", "B"), _unequal(conditions(a), conditions(b)))


def _figures(a: Result, b: Result) -> Section:
    def figures(result: Result) -> dict[str, str]:
        rows: dict[str, str] = {}
        for kind in ("final", "best"):
            found: Mapping[str, Any] = result.summary.get(kind, {})
            rows |= {
                f"{kind} {label}": _number(found[name]) for name, label in FIGURES.items() if name in found
            }
        return rows

    return Section("Figures", ("", "A", "B"), _unequal(figures(a), figures(b)))


def _course(a: Result, b: Result) -> Section:
    """Where the runs part, and whether they end in the same weights."""
    rows: list[tuple[str, str]] = []
    untimed = [[{**line, "seconds": 0} for line in result.rounds] for result in (a, b)]
    pairs = zip(*untimed, strict=False)
    parted = next((number for number, (mine, theirs) in enumerate(pairs) if mine != theirs), None)
    if parted is not None:
        mine, theirs = untimed[0][parted], untimed[1][parted]
        names = [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
        rows.append(("first round whose metrics differ", f"{parted + 1}, in {', '.join(names)}"))
    if len(a.rounds) != len(b.rounds):
        rows.append(("rounds recorded", f"{len(a.rounds)} in A, {len(b.rounds)} in B"))
    for name in ("model.safetensors", "mask.safetensors"):
        mine_is, theirs_is = (a.path / name).is_file(), (b.path / name).is_file()
        if mine_is != theirs_is:
            rows.append((name, f"only in {'A' if mine_is else 'B'}"))
        elif mine_is and not filecmp.cmp(a.path / name, b.path / name, shallow=False):
            rows.append((name, "not the same bits"))
    return Section("Course", ("", "what"), rows)


def _unequal(a: Mapping[str, str], b: Mapping[str, str]) -> list[tuple[str, str, str]]:
    return [
        (name, a.get(name, UNKNOWN), b.get(name, UNKNOWN))
        for name in dict.fromkeys([*a, *b])
        if a.get(name) != b.get(name)
    ]


def _number(value: Any) -> str:
    """All digits: two values that differ must not look equal."""
    return f"{value:,.0f}" if float(value).is_integer() else repr(value)
