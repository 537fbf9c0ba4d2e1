"""`fedsparse export`: what was written, how large it is, what was checked and how fast it computes."""

from __future__ import annotations

import math
from pathlib import Path

from ..core.card import Section
from ..core.export import Exported, export
from .card import show_sections


def show_export(run: Path, formats: tuple[str, ...], out: Path | None) -> None:
    """Exports and prints the report. Raises RunError where a file does not give back the model."""
    done = export(run, formats, out)
    show_sections(f"Export of {run} into {done.folder}", [_files(done), _sizes(done), *_latencies(done)])


def _files(done: Exported) -> Section:
    rows = [(name, path.name, done.checks[name]) for name, path in done.files.items()]
    return Section(
        "Files", ("format", "file", "checked"), rows, "\n".join(f"Left out: {n}" for n in done.notes)
    )


def _sizes(done: Exported) -> Section:
    dense = done.sizes["dense"]
    rows = [
        (name, f"{size:,}", f"{size / 1e6:,.3f}", f"{dense / size:.2f}") for name, size in done.sizes.items()
    ]
    return Section("Sizes", ("", "bytes", "MB", "dense / this"), rows, "Zipped: deflate, by zipfile.")


def _latencies(done: Exported) -> list[Section]:
    rows = [
        (row.name, str(row.batch), _three_digits(row.milliseconds), f"{row.speedup:.2f}", str(row.repeats))
        for row in done.latencies
    ]
    note = (
        "A forward pass on this CPU, one thread: medians over repeats in which all take turns; the ratio is "
        "the median of the repeats' ratios. PyTorch computes convolutions channels "
        "last. Other machines, models and batches differ."
    )
    headings = ("", "batch", "ms", "dense / this", "repeats")
    return [Section("Latency", headings, rows, note)] if rows else []


def _three_digits(value: float) -> str:
    """A positive number to three significant digits, without an exponent."""
    return f"{value:,.{max(0, 2 - math.floor(math.log10(value)))}f}"
