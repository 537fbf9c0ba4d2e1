"""`fedsparse card` and `fedsparse diff`: sections as tables, or as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from ..core.card import Section, card, markdown
from ..core.diff import differences
from ..core.results import Result


def show_card(folder: Path, as_markdown: bool) -> None:
    """Prints a run's card. Raises RunError if the folder is no run."""
    result = Result.load(folder)
    show_sections(f"Run {folder}", card(result), as_markdown)


def show_diff(first: Path, second: Path, as_markdown: bool) -> None:
    """Prints what differs between two runs. Raises RunError if one is none."""
    found = differences(Result.load(first), Result.load(second))
    if not found:
        click.echo("no difference (but in time)")
        return
    show_sections(f"A = {first}, B = {second}", found, as_markdown)


def show_sections(title: str, sections: Sequence[Section], as_markdown: bool = False) -> None:
    """Tables under their titles; a section's note below its table."""
    if as_markdown:
        click.echo(markdown(title, sections), nl=False)
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    console.print(f"[bold]{escape(title)}[/bold]", soft_wrap=True)
    for section in sections:
        console.print(f"\n[bold]{escape(section.title)}[/bold]")
        if section.rows:
            plain = section.headings == ("", "value")
            table = Table(show_edge=False, pad_edge=False, show_header=not plain)
            for number, heading in enumerate(section.headings):
                whole = min(24, max(len(row[number]) for row in section.rows)) if heading == "part" else None
                table.add_column(heading, overflow="fold", no_wrap=number == 0, width=whole)
            for row in section.rows:
                table.add_row(*map(escape, row))
            console.print(table)
        if section.note:
            console.print(escape(section.note), style="dim")
