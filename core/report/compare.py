"""Runs side by side: accuracy at equal cost, cost of equal accuracy."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, Problem
from ..results import Result
from .bandwidth import Bandwidth
from .columns import Group, column, differing, grouped, shown, traffic

MEGABYTE = 1e6
ROUND_BUDGETS = 6  # columns, at most, where no budgets are given
NOT_REACHED, NOT_EVALUATED, NO_ROUNDS = "not reached", "not evaluated", "no rounds"
NOT_RECORDED = "not recorded"
NO_BUDGET = (
    "No round number of {} lies between the first evaluation and the largest total of the runs; choose "
    "by --budgets and --flops-budgets, or evaluate more often (output.evaluate_every)."
)
NO_TARGET = "No target accuracy: of no method have all runs been evaluated; choose one by --target."

Accuracy = Literal["test", "client"]
Value = float | str
"""A number, or why there is none."""
Show = Callable[[float, float | None], str]
"""A mean and its deviation, if there is one, as text."""


@dataclass(frozen=True)
class Cell:
    """A figure of each of a group's runs, in the order of their seeds."""

    values: tuple[Value, ...]

    @property
    def numbers(self) -> list[float]:
        return [value for value in self.values if not isinstance(value, str)]

    @property
    def mean(self) -> float | None:
        """None unless all runs have the figure: the mean of some would flatter."""
        return statistics.fmean(self.numbers) if len(self.numbers) == len(self.values) else None

    @property
    def std(self) -> float | None:
        """Sample standard deviation; None for one run, or where the mean is None."""
        return statistics.stdev(self.numbers) if self.mean is not None and len(self.values) > 1 else None

    def text(self, show: Show) -> str:
        """As a table shows it: `0.8120 ± 0.0040`, or why there is no mean."""
        if self.mean is not None:
            return show(self.mean, self.std)
        if self.numbers:
            return f"{len(self.numbers)} of {len(self.values)} runs"
        return str(self.values[0])

    def tree(self) -> dict[str, Any]:
        """For JSON: null is a value that does not exist; `missing` says why."""
        tree: dict[str, Any] = {"mean": self.mean, "std": self.std, "n": len(self.values)}
        tree["values"] = [None if isinstance(value, str) else value for value in self.values]
        if len(self.numbers) < len(self.values):
            tree["missing"] = [value if isinstance(value, str) else None for value in self.values]
        return tree


@dataclass(frozen=True)
class Column:
    """A name for JSON, a heading, how its numbers are written, and a cell a group."""

    key: str
    heading: str
    show: Show
    cells: tuple[Cell, ...]
    at: float | None = None
    """the budget, in bytes or FLOPs, that the column stands for"""


@dataclass(frozen=True)
class Table:
    """A table with a row a group; `key` is its name in JSON."""

    key: str
    title: str
    columns: tuple[Column, ...]

    def texts(self) -> list[list[str]]:
        """Rows of what is shown."""
        cells = zip(*(column.cells for column in self.columns), strict=True)
        shows = [column.show for column in self.columns]
        return [[cell.text(show) for cell, show in zip(row, shows, strict=True)] for row in cells]


@dataclass(frozen=True)
class Comparison:
    """Groups of runs, tables with a row for each of them, and what a reader must know."""

    groups: tuple[Group, ...]
    tables: tuple[Table, ...]
    notes: tuple[str, ...]
    asked: dict[str, Any]

    def tree(self) -> dict[str, Any]:
        """Everything for JSON: bytes, FLOPs, seconds, fractions; no NaN."""
        return {
            **self.asked,
            "groups": [
                {
                    "name": group.name,
                    "seeds": list(group.seeds),
                    "runs": [str(run.path) for run in group.runs],
                    "figures": {table.key: _row(table, index) for table in self.tables},
                }
                for index, group in enumerate(self.groups)
            ],
            "notes": list(self.notes),
        }


def compare(
    paths: Sequence[str | Path],
    *,
    budgets: Sequence[float] = (),
    flops_budgets: Sequence[float] = (),
    target: float | None = None,
    accuracy: Accuracy = "test",
    bandwidth: Bandwidth | None = None,
) -> Comparison:
    """Compares the runs in these folders.

    `budgets` are megabytes (10^6 bytes) up and down together, `flops_budgets` training FLOPs, over all
    clients since the start; without any, round numbers up to the largest total of the runs. The accuracy at
    a budget is that of the last evaluation at or below it; a run that ended below the budget did not reach
    it. `target`, in (0, 1], is of the pooled test set or of clients (`accuracy`); None is the lowest final
    accuracy among the groups, rounded down to three digits. Means are over seeds, deviations sample ones.

    Raises RunError if a folder holds no run, ConfigError for runs that are given twice and for budgets and
    targets out of range.
    """
    _check(paths, budgets, flops_budgets, target)
    model = bandwidth or Bandwidth()
    groups = grouped([Result.load(path) for path in paths])
    metric = f"{accuracy}_accuracy"
    if target is None:
        finals = [cell.mean for cell in _finals(groups, metric) if cell.mean is not None]
        target = math.floor(min(finals) * 1000) / 1000 if finals else None
    tables = [_totals(groups)]
    byte_budgets = [round(budget * MEGABYTE) for budget in budgets] or _round_budgets(groups, traffic)
    flop_budgets = list(flops_budgets) or _round_budgets(groups, _flops)
    for kind in ("test", "client"):
        title = f"{kind.capitalize()} accuracy at equal megabytes, up and down together"
        key = f"{kind}_accuracy_at_bytes"
        if byte_budgets:
            headings = [f"{budget / MEGABYTE:,.10g} MB" for budget in byte_budgets]
            tables.append(_at(groups, key, title, kind, traffic, byte_budgets, headings))
    for kind in ("test", "client"):
        if flop_budgets:
            title, key = f"{kind.capitalize()} accuracy at equal training FLOPs", f"{kind}_accuracy_at_flops"
            unit, prefix = _flops_unit(flop_budgets)
            headings = [f"{budget / unit:,.10g} {prefix}FLOPs" for budget in flop_budgets]
            tables.append(_at(groups, key, title, kind, _flops, flop_budgets, headings))
    if target is not None:
        tables.append(_to(groups, target, accuracy, model))
    notes = _notes(groups)
    for budgeted, what in ((byte_budgets, "megabytes"), (flop_budgets, "FLOPs")):
        notes += [] if budgeted else [NO_BUDGET.format(what)]
    notes.append(NO_TARGET if target is None else str(model))
    asked = {
        "target": {"accuracy": metric, "value": target},
        "bandwidth": {"up_mbit_s": model.up, "down_mbit_s": model.down, "flop_s": model.flops},
    }
    return Comparison(groups, tuple(tables), tuple(notes), asked)


def _check(
    paths: Sequence[str | Path],
    budgets: Sequence[float],
    flops_budgets: Sequence[float],
    target: float | None,
) -> None:
    """Refuses what cannot be meant, all at once."""
    places = [Path(path).resolve() for path in paths]
    messages = [
        f"{path} is given twice; give it once"
        for number, path in enumerate(paths)
        if Path(path).resolve() in places[:number]
    ]
    for option, given in (("--budgets", budgets), ("--flops-budgets", flops_budgets)):
        wrong = [budget for budget in given if not (budget > 0 and math.isfinite(budget))]
        messages += [f"{option} {budget:g}: expected a number above 0" for budget in wrong]
    if target is not None and not 0 < target <= 1:
        messages.append(f"--target {target:g}: expected a fraction above 0, at most 1, such as 0.8")
    if not paths:
        messages.append("no runs are given; name their folders, such as runs/*")
    if messages:
        raise ConfigError(Problem("", message) for message in messages)


def _totals(groups: Sequence[Group]) -> Table:
    """What the runs came to."""

    def last(spent: Callable[[Result], NDArray[np.float64]]) -> tuple[Cell, ...]:
        return tuple(Cell(tuple(_last(spent(run), NO_ROUNDS) for run in group.runs)) for group in groups)

    counts = tuple(Cell((float(len(group.runs)),)) for group in groups)
    rounds = tuple(Cell(tuple(float(len(run.rounds)) for run in group.runs)) for group in groups)
    columns = (
        Column("n", "runs", _count, counts),
        Column("rounds", "rounds", _count, rounds),
        Column("test_accuracy", "test accuracy", _fraction, _finals(groups, "test_accuracy")),
        Column("client_accuracy", "client accuracy", _fraction, _finals(groups, "client_accuracy")),
        Column("sparsity", "sparsity", _fraction, last(lambda run: column(run, "sparsity"))),
        Column("bytes", "MB up + down", _scaled(MEGABYTE), last(traffic)),
        _flops_column(last(_flops)),
    )
    return Table("final", "At the end", columns)


def _at(
    groups: Sequence[Group],
    key: str,
    title: str,
    kind: str,
    spent: Callable[[Result], NDArray[np.float64]],
    budgets: Sequence[float],
    headings: Sequence[str],
) -> Table:
    """Accuracy by the time that so much is spent."""
    columns = []
    for budget, heading in zip(budgets, headings, strict=True):
        cells = [
            Cell(tuple(accuracy_at(column(r, f"{kind}_accuracy"), spent(r), budget) for r in group.runs))
            for group in groups
        ]
        columns.append(Column(key, heading, _fraction, tuple(cells), budget))
    return Table(key, title, tuple(columns))


def _to(groups: Sequence[Group], target: float, accuracy: Accuracy, model: Bandwidth) -> Table:
    """What it took to evaluate at the target, or above, for the first time."""

    def needed(spent: Callable[[Result], Any]) -> tuple[Cell, ...]:
        metric = f"{accuracy}_accuracy"
        return tuple(
            Cell(tuple(spent_to(column(run, metric), spent(run), target) for run in group.runs))
            for group in groups
        )

    columns = (
        Column("rounds", "rounds", _count, needed(lambda run: np.arange(1.0, len(run.rounds) + 1))),
        Column("bytes", "MB up + down", _scaled(MEGABYTE), needed(traffic)),
        _flops_column(needed(_flops)),
        Column("seconds", "seconds, modelled", _scaled(1), needed(model.seconds)),
    )
    return Table("to_target", f"To a {accuracy} accuracy of {target:.10g}", columns)


def accuracy_at(accuracy: NDArray[np.float64], spent: NDArray[np.float64], budget: float) -> Value:
    """The last evaluated accuracy at or below the budget, of columns with a value a round."""
    if not np.isfinite(accuracy).any():
        return NOT_EVALUATED
    if not np.isfinite(spent).all():
        return NOT_RECORDED
    if spent[-1] < budget:
        return NOT_REACHED
    within = accuracy[np.isfinite(accuracy) & (spent <= budget)]
    return float(within[-1]) if within.size else NOT_EVALUATED


def spent_to(accuracy: NDArray[np.float64], spent: NDArray[np.float64], target: float) -> Value:
    """What was spent by the first evaluation at the target or above."""
    if not np.isfinite(accuracy).any():
        return NOT_EVALUATED
    first = np.flatnonzero(accuracy >= target)  # NaN is not
    if not first.size:
        return NOT_REACHED
    return float(spent[first[0]]) if np.isfinite(spent[first[0]]) else NOT_RECORDED


def _finals(groups: Sequence[Group], metric: str) -> tuple[Cell, ...]:
    """The last evaluations."""
    evaluated = ([column(run, metric) for run in group.runs] for group in groups)
    return tuple(
        Cell(tuple(_last(v[np.isfinite(v)], NOT_EVALUATED) for v in of_group)) for of_group in evaluated
    )


def _last(values: NDArray[np.float64], otherwise: str) -> Value:
    if not values.size:
        return otherwise
    return float(values[-1]) if np.isfinite(values[-1]) else NOT_RECORDED


def _flops(run: Result) -> NDArray[np.float64]:
    return column(run, "flops_total")


def _round_budgets(groups: Sequence[Group], spent: Callable[[Result], NDArray[np.float64]]) -> list[float]:
    """Round numbers spread from the first evaluation of a run to the largest total of one."""
    evaluated = [
        (costs, known)
        for run in (run for group in groups for run in group.runs)
        if (known := np.isfinite(column(run, "test_accuracy"))).any()
        and np.isfinite(costs := spent(run)).all()
    ]
    if not evaluated:
        return []
    least = min(float(costs[known][0]) for costs, known in evaluated)
    most = max(float(costs[-1]) for costs, _ in evaluated)
    if not most > 0:
        return []
    top, found = math.floor(math.log10(most)), list[float]()
    # from fine steps to coarse ones: the first that are few enough
    for digits in (range(10, 100), range(10, 100, 5), range(10, 100, 10), (10, 20, 50), (10, 30), (10,)):
        tried = (digit * 10.0 ** (power - 1) for power in range(top - 5, top + 1) for digit in digits)
        found = [budget for budget in tried if least <= budget <= most and budget >= 1]
        if len(found) <= ROUND_BUDGETS:
            break
    return found


def _notes(groups: Sequence[Group]) -> list[str]:
    notes = [
        "Mean ± sample standard deviation over seeds, left out where it is zero to the digits shown. A mean "
        "is shown only if every run has the figure.",
        "Accuracy at a budget is that of the last evaluation at or below it; a budget above a run's total is "
        "not reached, one below its first evaluation not evaluated. MB are 10^6 bytes, of all clients "
        "together.",
    ]
    short = [str(run.path) for group in groups for run in group.runs if not run.finished]
    if short:
        notes.append(f"Not all rounds were played in {', '.join(short)}.")
    paths = differing([group.settings for group in groups])
    apart = [path for path in paths if not path.startswith("method.")]
    if apart:
        told = (
            f"{path} ({', '.join(dict.fromkeys(shown(group.settings.get(path)) for group in groups))})"
            for path in apart
        )
        notes.append(f"Beyond the method, these settings differ: {'; '.join(told)}.")
    return notes


def _row(table: Table, index: int) -> Any:
    cells = [(column, column.cells[index].tree()) for column in table.columns]
    if any(column.at is not None for column in table.columns):
        return [{"at": column.at, **tree} for column, tree in cells]
    return {column.key: tree for column, tree in cells if column.key != "n"}


def _flops_column(cells: tuple[Cell, ...]) -> Column:
    unit, prefix = _flops_unit([number for cell in cells for number in cell.numbers])
    return Column("flops", f"{prefix}FLOPs", _scaled(unit), cells)


def _flops_unit(numbers: Sequence[float]) -> tuple[float, str]:
    """The largest unit of which the largest number holds one, and its prefix."""
    units = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"))
    return next(((unit, prefix) for unit, prefix in units if max(numbers, default=0) >= unit), (1.0, ""))


def _fraction(mean: float, std: float | None) -> str:
    return _spread(mean, std, 4)


def _count(mean: float, std: float | None) -> str:
    return _spread(mean, std, 0 if mean == int(mean) and not std else 1)


def _scaled(unit: float) -> Show:
    """Three digits or more, in this unit."""

    def show(mean: float, std: float | None) -> str:
        mean, std = mean / unit, None if std is None else std / unit
        return _spread(mean, std, max(0, 2 - math.floor(math.log10(abs(mean)))) if mean else 0)

    return show


def _spread(mean: float, std: float | None, decimals: int) -> str:
    """`26.20 ± 0.12`; the mean alone where the deviation is nothing to these digits."""
    spread = "" if std is None else f"{std:,.{decimals}f}"
    text = f"{mean:,.{decimals}f}"
    return f"{text} ± {spread}" if spread.strip("0.") else text
