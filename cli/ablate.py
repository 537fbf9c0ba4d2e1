"""What an ablation shows: its plan, a line a run, and the table; and its table as CSV."""

from __future__ import annotations

import csv
import itertools
import signal
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ..core import ablation
from ..core.ablation import Interval, Plan, Row, Spread, Trial
from ..core.disk import replace
from ..core.engine import Engine
from ..core.errors import RunError
from ..core.execution import workers
from ..core.playing import View
from ..core.playing import play as play_run
from ..core.results import Result
from ..core.state import Report
from ..core.tracking import RunFolder

CSV = "ablation.csv"
WIDEST = 1000  # of a table, in characters
MEGABYTE = 1e6


def ablate(plan: Plan, out: Path, count: int, quiet: bool) -> signal.Signals | None:
    """Plays an ablation with so many workers, shows and writes its table; the signal that ended it, if any.

    Raises RunError at the end if runs failed.
    """
    if workers.started_by_launcher():
        raise RunError("ablate starts its own workers: run it without torchrun, with --workers N")
    console = Console(highlight=False)
    lines, ended = _Lines(console, plan, quiet), signal.SIGINT

    def play(trial: Trial, folder: Path, resume: bool) -> bool:
        nonlocal ended
        view = _Bar(console, "" if quiet else lines.name(trial))
        result = play_run(trial.resolved, folder, view, count, resume)
        assert result is not None  # the first of its workers
        ended = signal.Signals[result.summary.get("signal", ended.name)]
        return bool(result.summary["interrupted"])

    outcome = ablation.carry_out(plan, out, play, lines.tell, lambda: lines.begin(plan))
    if outcome.interrupted:
        done = len(lines.told) - len(outcome.failed)
        console.print(
            f"Interrupted; {done} of {len(plan.trials)} runs are finished. The same command with --out {out} "
            "goes on and repeats none of them.",
            soft_wrap=True,
            markup=False,
        )
        return ended
    rows = ablation.table(plan, out)
    if rows:
        show(console, plan, rows)
        write(out / CSV, plan, rows)
        console.print(f"Results: {out}, the table in {out / CSV}", soft_wrap=True, markup=False)
    if outcome.failed:
        said = "".join(f"\n  {out / name}: {why}" for name, why in outcome.failed.items())
        number = f"{len(outcome.failed)} of {len(plan.trials)} runs"
        raise RunError(f"{number} failed; the same command tries them again:{said}")
    return None


class _Lines:
    """What is planned, then a line a run."""

    def __init__(self, console: Console, plan: Plan, quiet: bool) -> None:
        self.console, self.metric, self.quiet = console, plan.metric, quiet
        self.told: list[str] = []
        self.widths = [
            max(len(piece) for piece in column) for column in zip(*map(_pieces, plan.trials), strict=True)
        ]

    def begin(self, plan: Plan) -> None:
        """What is planned."""
        for name, why in plan.refused.items():
            self.say(f"left out  {name}: {why}")
        if self.quiet:
            return
        points = f", {len(plan.points)} settings" if plan.grid else ""
        self.say(
            f"{plan.method}: {', '.join(plan.variants)}{points}, seeds {', '.join(map(str, plan.seeds))}: "
            f"{_counted(len(plan.trials), 'run')} of "
            f"{_counted(plan.trials[0].resolved.config.federation.rounds, 'round')}"
        )
        for note in dict.fromkeys(note for trial in plan.trials for note in trial.resolved.dropped):
            self.say(f"note  {note}")

    def say(self, text: str) -> None:
        self.console.print(text, soft_wrap=not self.console.is_terminal, markup=False)

    def name(self, trial: Trial) -> str:
        """A run in words, in columns."""
        pieces = zip(_pieces(trial), self.widths, strict=True)
        return "  ".join(f"{piece:<{width}}" for piece, width in pieces)

    def tell(self, trial: Trial, result: Result | None, remark: str) -> None:
        """A run ended, or had before."""
        self.told.append(trial.folder)
        if self.quiet:
            return
        if result is None:
            self.say(f"{self.name(trial)}  failed: {remark}")
            return
        value = ablation.final(result, self.metric)
        seconds = float(result.metrics["seconds"].sum())
        note = f"  ({remark})" if remark else ""
        self.say(f"{self.name(trial)}  {self.metric} {_number(value, self.metric)}  {seconds:8.2f} s{note}")


class _Bar(View):
    """A bar over the rounds of one run, on a terminal."""

    def __init__(self, console: Console, name: str) -> None:
        self.name, self.console = name, console
        self.bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
            disable=not name or not console.is_terminal,
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def begin(self, engine: Engine, folder: RunFolder) -> None:
        self.task = self.bar.add_task(self.name, total=engine.config.federation.rounds)
        self.bar.start()

    def round(self, report: Report) -> None:
        self.bar.update(self.task, completed=report.metrics["round"] + 1)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)


def show(console: Console, plan: Plan, rows: Sequence[Row]) -> None:
    """The table, a group of rows a point of the grid; as two if a terminal is too narrow for one."""
    metric, seeds = plan.metric, len(plan.seeds)
    names = {"variant": [row.variant for row in rows]}
    for path, short in _short(plan.grid).items():
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
    tables = [_table(names, counts | compared | others, ends)]
    width, wide = console.width, Console(width=WIDEST)
    if console.is_terminal and wide.measure(tables[0]).maximum > width:
        tables = [_table(names, counts | compared, ends), _table(names, others, ends)]
    for table in tables:
        console.width = max(width, wide.measure(table).maximum)  # a terminal wraps a line, rich would cut it
        console.print()
        console.print(table)
    console.width = width
    console.print()
    notes = ["Mean ± standard deviation over seeds."] if seeds > 1 else []
    if seeds > 1 and len(plan.variants) > 1:
        figure = _words(metric)
        notes.append(
            f"Differences of the {figure} are paired by seed, with Student's 95 % confidence interval."
        )
    notes.append("MB, FLOPs and seconds are means a run.")
    console.print(" ".join(notes), soft_wrap=not console.is_terminal, markup=False)


def _table(
    names: Mapping[str, Sequence[str]], figures: Mapping[str, Sequence[str]], ends: Sequence[bool]
) -> Table:
    """A table of columns; an empty line follows where a group of rows ends."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in names:
        table.add_column(heading, no_wrap=True)
    for heading in figures:
        table.add_column(heading, justify="right", no_wrap=True)
    for number, cells in enumerate(zip(*names.values(), *figures.values(), strict=True)):
        table.add_row(*map(Text, cells), end_section=number < len(ends) and ends[number])
    return table


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


def _pieces(trial: Trial) -> list[str]:
    point = (f"{short}={ablation.shown(trial.point[path])}" for path, short in _short(trial.point).items())
    return [trial.variant, *point, f"seed {trial.seed}"]


def _short(paths: Iterable[str]) -> dict[str, str]:
    """The settings by the last word of their paths, or by the path where that says too little."""
    last = {path: path.removesuffix(".use").rpartition(".")[2] for path in paths}
    return {path: path if [*last.values()].count(word) > 1 else word for path, word in last.items()}


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _number(value: float, metric: str, sign: str = "") -> str:
    """Fractions and losses with four places, counts with four digits."""
    counts = metric.endswith("_total")
    return f"{value:{sign}.4g}" if counts else f"{value:{sign}.4f}"


def _spread(found: Spread, metric: str) -> str:
    mean = _number(found.mean, metric)
    return mean if found.deviation is None else f"{mean} ± {_number(found.deviation, metric)}"


def _interval(found: Interval | None, metric: str) -> str:
    if found is None:
        return ""
    mean = _number(found.mean, metric, "+")
    if found.n == 1:
        return f"{mean} (one seed)"
    if found.low is None or found.high is None:
        return mean
    return f"{mean} [{_number(found.low, metric, '+')}, {_number(found.high, metric, '+')}]"
