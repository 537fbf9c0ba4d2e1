"""`fedsparse compare` and `report`: their options, and what they print."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import click

if TYPE_CHECKING:
    from ..core.report.compare import Comparison

WIDTH = 120  # of tables in a file or a pipe


class NumbersType(click.ParamType[tuple[float, ...]]):
    """Numbers separated by commas."""

    name = "x[,x…]"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        try:
            return tuple(dict.fromkeys(sorted(float(text) for text in str(value).split(","))))
        except ValueError:
            self.fail(f"{value!r}: expected numbers, such as 1,5,10", param, ctx)


@dataclass(frozen=True)
class Asked:
    """What the options of `comparing` said."""

    runs: tuple[Path, ...]
    budgets: tuple[float, ...] | None
    flops_budgets: tuple[float, ...] | None
    target: float | None
    accuracy: str
    up: float
    down: float
    flops: float

    def compare(self) -> Comparison:
        """Reads the runs. Raises RunError and ConfigError."""
        from ..core.report.bandwidth import Bandwidth
        from ..core.report.compare import compare

        return compare(
            self.runs,
            budgets=self.budgets or (),
            flops_budgets=self.flops_budgets or (),
            target=self.target,
            accuracy=cast(Literal["test", "client"], self.accuracy),
            bandwidth=Bandwidth(self.up, self.down, self.flops),
        )


def comparing(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the runs and the options that say how they are compared; the command gets them as `asked`."""

    def gathered(
        runs: tuple[Path, ...],
        budgets: tuple[float, ...] | None,
        flops_budgets: tuple[float, ...] | None,
        target: float | None,
        accuracy: str,
        up: float,
        down: float,
        flops: float,
        **others: Any,
    ) -> Any:
        return command(Asked(runs, budgets, flops_budgets, target, accuracy, up, down, flops), **others)

    gathered.__doc__, gathered.__name__ = command.__doc__, command.__name__
    gathered.__click_params__ = getattr(command, "__click_params__", [])  # type: ignore[attr-defined]
    numbers = NumbersType()
    decorators = [
        click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path)),
        click.option(
            "--budgets",
            type=numbers,
            help="Megabytes, up and down together, at which accuracies are compared. "
            "Default: round numbers up to the largest total of the runs.",
        ),
        click.option("--flops-budgets", type=numbers, help="Training FLOPs likewise: 1e9,5e9."),
        click.option(
            "--target",
            type=float,
            help="Accuracy, a fraction, to which cost is counted. Default: the lowest at the end among the "
            "methods.",
        ),
        click.option(
            "--accuracy",
            type=click.Choice(["test", "client"]),
            default="test",
            show_default=True,
            help="Whose accuracy the target is: of the pooled test set, or the mean over clients.",
        ),
        click.option("--up", default=1.0, show_default=True, help="A client's upload, Mbit/s."),
        click.option("--down", default=10.0, show_default=True, help="A client's download, Mbit/s."),
        click.option("--flops", default=1e9, show_default=True, help="A client's computing, FLOP/s."),
    ]
    for decorate in reversed(decorators):
        gathered = decorate(gathered)
    return gathered


def show(asked: Asked, as_json: bool) -> None:
    """Tables, or the same numbers as JSON."""
    from ..core.report.page import as_json as written

    comparison = asked.compare()
    if as_json:
        click.echo(written(comparison), nl=False)
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    screen = console.is_terminal
    console = console if screen else Console(highlight=False, width=WIDTH)
    for table in comparison.tables:
        console.print(table.title, style="bold", markup=False)
        drawn = Table()
        drawn.add_column("", overflow="fold")
        for column in table.columns:
            drawn.add_column(column.heading, justify="right", overflow="fold")
        for group, texts in zip(comparison.groups, table.texts(), strict=True):
            drawn.add_row(escape(group.name), *texts)
        console.print(drawn)
    for note in comparison.notes:
        console.print(note, style="dim", markup=False, soft_wrap=not screen)


def write(asked: Asked, out: Path) -> None:
    """The report's folder. Raises RunError if `out` is taken, or without matplotlib."""
    from ..core.folders import refuse_taken
    from ..core.report.figures import require_matplotlib
    from ..core.report.page import write as written

    require_matplotlib()
    refuse_taken(out)
    written(asked.compare(), out)
    click.echo(f"Report: {out / 'report.html'}")
