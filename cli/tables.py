"""Tables that are never cut: on a narrow terminal split by columns, else as wide as they need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDEST = 1000  # of a table, in characters

Columns = Mapping[str, Sequence[str]]
"""Cells by heading."""


def print_table(
    console: Console, names: Columns, first: Columns, others: Columns, ends: Sequence[bool] = ()
) -> None:
    """A table of columns, `names` to the left, numbers to the right.

    As two, `first` and `others`, if a terminal is too narrow for one. An empty line follows where `ends` says
    that a group of rows ends.
    """
    tables = [_table(names, {**first, **others}, ends)]
    width, wide = console.width, Console(width=WIDEST)
    if console.is_terminal and others and wide.measure(tables[0]).maximum > width:
        tables = [_table(names, first, ends), _table(names, others, ends)]
    for table in tables:
        console.width = max(width, wide.measure(table).maximum)  # a terminal wraps a line, rich would cut it
        console.print()
        console.print(table)
    console.width = width


def _table(names: Columns, figures: Columns, ends: Sequence[bool]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in names:
        table.add_column(heading, no_wrap=True)
    for heading in figures:
        table.add_column(heading, justify="right", no_wrap=True)
    for number, cells in enumerate(zip(*names.values(), *figures.values(), strict=True)):
        table.add_row(*map(Text, cells), end_section=number < len(ends) and ends[number])
    return table
