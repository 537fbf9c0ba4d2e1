"""What an ablation shows: its plan, a line a run, and the table; and its table as CSV."""

from __future__ import annotations

import csv
import itertools
import signal
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ..core import ablation
from ..core.ablation import Interval, Plan, Row, Spread
from ..core.disk import replace
from .tables import print_table
from .trials import Lines, carry_out, counted, number, raise_failed, refuse_launcher, short_paths

CSV = "ablation.csv"
MEGABYTE = 1e6


def ablate(plan: Plan, out: Path, count: int, quiet: bool) -> signal.Signals | None:
    """Plays an ablation with so many workers, shows and writes its table; the signal that ended it, if any.

    Raises RunError at the end if runs failed.
    """
    refuse_launcher("ablate")
    console = Console(highlight=False)
    lines = Lines(console, plan.trials, plan.metric, quiet)
    outcome, ended = carry_out(
        lines,
        out,
        count,
        lambda play: ablation.carry_out(plan, out, play, lines.tell, lambda: begin(lines, plan)),
    )
    if ended:
        return ended
    rows = ablation.table(plan, out)
    if rows:
        show(console, plan, rows)
        write(out / CSV, plan, rows)
        console.print(f"Results: {out}, the table in {out / CSV}", soft_wrap=True, markup=False)
    raise_failed(outcome, out, len(plan.trials))
    return None


def begin(lines: Lines, plan: Plan) -> None:
    """What is planned."""
    for name, why in plan.refused.items():
        lines.say(f"left out  {name}: {why}")
    if lines.quiet:
        return
    points = f", {len(plan.points)} settings" if plan.grid else ""
    lines.say(
        f"{plan.method}: {', '.join(plan.variants)}{points}, seeds {', '.join(map(str, plan.seeds))}: "
        f"{counted(len(plan.trials), 'run')} of "
        f"{counted(plan.trials[0].resolved.config.federation.rounds, 'round')}"
    )
    lines.notes()


def show(console: Console, plan: Plan, rows: Sequence[Row]) -> None:
    """The table, a group of rows a point of the grid; as two if a terminal is too narrow for one."""
    metric, seeds = plan.metric, len(plan.seeds)
    names = {"variant": [row.variant for row in rows]}
    for path, short in short_paths(plan.grid).items():
        names[short] = [ablation.shown(row.point[path]) for row in rows]
    counts = {"seeds": [f"{row.n}" if row.n == seeds else f"{row.n} of {seeds}" for row in rows]}
    compared = {_words(metric): [_spread(row.figures[metric], metric) for row in rows]}
    if len(plan.variants) > 1:
        compared["difference to base [95 %]"] = [_interval(row.difference, metric) for row in rows]
    others = {
        _words(name): [_spread(row.figures[name], name) for row in rows]
        for name in rows[0].figures
        if name != metric
    }
    others["MB up+down"] = [f"{(row.upload_bytes + row.download_bytes) / MEGABYTE:,.2f}" for row in rows]
    others["FLOPs"] = [f"{row.flops:.3g}" for row in rows]
    others["seconds"] = [f"{row.seconds:,.2f}" for row in rows]
    ends = [row.point != after.point for row, after in itertools.pairwise(rows)]
    print_table(console, names, counts | compared, others, ends)
    console.print()
    notes = ["Mean ± standard deviation over seeds."] if seeds > 1 else []
    if seeds > 1 and len(plan.variants) > 1:
        figure = _words(metric)
        notes.append(
            f"Differences of the {figure} are paired by seed, with Student's 95 % confidence interval."
        )
    notes.append("MB, FLOPs and seconds are means a run.")
    console.print(" ".join(notes), soft_wrap=not console.is_terminal, markup=False)


def write(path: Path, plan: Plan, rows: Sequence[Row]) -> None:
    """The table as CSV, in full digits; bytes, FLOPs and seconds are means a run. Raises DiskError."""
    replace(path, lambda fresh: _write(fresh, plan, rows))


def _write(path: Path, plan: Plan, rows: Sequence[Row]) -> None:
    names = list(rows[0].figures)
    with path.open("w", encoding="utf-8", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(
            [
                *("variant", *plan.grid, "seeds"),
                *(f"{name}_{what}" for name in names for what in ("mean", "sd")),
                *(f"{plan.metric}_difference{end}" for end in ("", "_low", "_high")),
                *("upload_bytes", "download_bytes", "flops", "seconds"),
            ]
        )
        for row in rows:
            found = row.difference
            lines.writerow(
                [
                    *(row.variant, *map(ablation.shown, row.point.values()), row.n),
                    *(v for name in names for v in (row.figures[name].mean, row.figures[name].deviation)),
                    *((found.mean, found.low, found.high) if found else (None, None, None)),
                    *(row.upload_bytes, row.download_bytes, row.flops, row.seconds),
                ]
            )


def _words(name: str) -> str:
    return name.replace("_", " ")


def _spread(found: Spread, metric: str) -> str:
    mean = number(found.mean, metric)
    return mean if found.deviation is None else f"{mean} ± {number(found.deviation, metric)}"


def _interval(found: Interval | None, metric: str) -> str:
    if found is None:
        return ""
    mean = number(found.mean, metric, "+")
    if found.n == 1:
        return f"{mean} (one seed)"
    if found.low is None or found.high is None:
        return mean
    return f"{mean} [{number(found.low, metric, '+')}, {number(found.high, metric, '+')}]"
