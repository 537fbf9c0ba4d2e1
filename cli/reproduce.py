"""`fedsparse reproduce`: tables listed, shown from what is kept, played and shown; torch only to play."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console

from ..core import reproduction
from ..core import reproduction_page as pages
from ..core.card import Section
from ..core.reproduction import Table
from ..core.reproduction_page import Own
from .tables import print_table

NAMES = 2  # columns of a row that name it
ACCURACIES = {
    False: 5,
    True: 8,
}  # where the columns of its accuracies end; with one's own runs there are more


def show_list(as_markdown: bool, as_json: bool) -> None:
    """The shipped tables; as Markdown the list of all their claims."""
    tables = _every()
    if as_markdown:
        click.echo(pages.claims_of(tables), nl=False)
        return
    if as_json:
        _print_json([pages.plain(table) for table in tables])
        return
    columns = {
        "table": [table.name for table in tables],
        "title": [table.description.title for table in tables],
        "rows": [str(len(table.presets)) for table in tables],
        "seeds kept": [
            ", ".join(map(str, table.seeds)) if any(table.kept.values()) else "none" for table in tables
        ],
        "claims": [str(len(table.description.claim)) for table in tables],
    }
    console = Console(highlight=False)
    print_table(console, {name: columns.pop(name) for name in ("table", "title")}, columns, {})
    console.print()
    console.print(
        "fedsparse reproduce TABLE --kept shows the kept figures; without --kept it plays the runs.",
        soft_wrap=True,
    )


def show_kept(table: Table, as_markdown: bool, as_json: bool) -> None:
    """The kept figures and the verdicts; nothing is played."""
    if as_json:
        _print_json(pages.plain(table))
    elif as_markdown:
        click.echo(pages.page(table), nl=False)
    else:
        _show(Console(highlight=False), table)


def write_pages(table: Table | None) -> None:
    """Writes a table's page, or all shipped tables', and the README's list of claims."""
    every = _every()
    for path in pages.write(every if table is None else [table], every):
        click.echo(f"Wrote {path}")


def play(
    table: Table,
    seeds: Sequence[int],
    sets: Sequence[str],
    out: Path,
    count: int,
    *,
    quiet: bool = False,
    as_markdown: bool = False,
    as_json: bool = False,
) -> signal.Signals | None:
    """Plays the rows with so many workers, then shows them beside the kept ones; the signal that ended it.

    Raises RunError at the end if runs failed.
    """
    from ..core import ablation
    from .trials import Lines, carry_out, counted, raise_failed, refuse_launcher

    refuse_launcher("reproduce")
    trials, changed = reproduction.plan(table, seeds, sets)
    console = Console(highlight=False, stderr=as_markdown or as_json)
    lines = Lines(console, trials, table.description.metric, quiet)

    def begin() -> None:
        if not quiet:
            said = f"{counted(len(table.presets), 'row')}, seeds {', '.join(map(str, seeds))}"
            lines.say(f"{table.name}: {said}: {counted(len(trials), 'run')} into {out}")
            lines.notes()

    with ablation.holding(out, reproduction.RECORD, {"table": table.name}, "a reproduction"):
        outcome, ended = carry_out(
            lines, out, count, lambda play: ablation.play_each(trials, out, play, lines.tell, begin)
        )
        if ended:
            return ended
        own = Own(reproduction.finished(trials, out), changed)
    if as_json:
        _print_json(pages.plain(table, own))
    elif as_markdown:
        _print_markdown(table, own)
    else:
        _show(console, table, own)
    raise_failed(outcome, out, len(trials))
    return None


def _every() -> list[Table]:
    return [reproduction.load(name) for name in reproduction.shipped()]


def _show(console: Console, table: Table, own: Own | None = None) -> None:
    told = table.description

    def say(text: str, style: str = "") -> None:
        console.print(text, style=style, soft_wrap=not console.is_terminal, markup=False)

    say(told.title, "bold")
    if own is None:
        for paragraph in told.about.strip().split("\n\n"):
            say(" ".join(paragraph.split()))
        say(f"Source: {told.source}")
    for section in pages.rows(table, own):
        if section.title:
            console.print()
            say(section.title, "bold")
        _draw(console, section, NAMES, ACCURACIES[own is not None])
    console.print()
    say(pages.rows_note(table), "dim")
    if own is not None and (said := pages.changes(own)):
        say(said)
    if told.claim:
        section = pages.claims(table, own)
        _draw(console, section, 1, len(section.headings))
        console.print()
        say(section.note, "dim")


def _draw(console: Console, section: Section, names: int, first: int) -> None:
    """A section with `names` columns to the left; on a narrow terminal those from `first` on stand apart."""
    # headings differ within a section, so that they can be keys
    columns = {
        heading: [row[number] for row in section.rows] for number, heading in enumerate(section.headings)
    }
    keys = [*columns]

    def part(chosen: Sequence[str]) -> dict[str, list[str]]:
        return {key: columns[key] for key in chosen}

    print_table(console, part(keys[:names]), part(keys[names:first]), part(keys[first:]))


def _print_markdown(table: Table, own: Own) -> None:
    from ..core.card import markdown

    said = pages.changes(own)
    sections = [Section(made.title or "Rows", made.headings, made.rows) for made in pages.rows(table, own)]
    sections[-1] = Section(
        sections[-1].title,
        sections[-1].headings,
        sections[-1].rows,
        "\n\n".join(filter(None, [pages.rows_note(table), said])),
    )
    if table.description.claim:
        sections.append(pages.claims(table, own))
    click.echo(markdown(table.description.title, sections), nl=False)


def _print_json(value: object) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))
