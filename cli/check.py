"""The checks of a plugin on the terminal: a line each, as they are played."""

from __future__ import annotations

from collections.abc import Sequence

import click

from ..core.config import leaves, parse_set
from ..core.testing import checks


def show_checks(plugin: str, sets: Sequence[str]) -> bool:
    """Plays every check and prints its outcome; whether all passed."""
    settings = dict(pair for text in sets for pair in leaves(parse_set(text).values))
    seen: dict[str, str] = {}  # first check that failed for a reason
    counts = [0, 0]
    for contract in checks(plugin, settings=settings):
        name, passed, message = contract.result()
        counts[passed] += 1
        if not passed:
            first = seen.setdefault(message, name)
            message = message if first == name else f"as in {first!r}"
        click.secho("ok      " if passed else "failed  ", fg="green" if passed else "red", nl=False)
        click.echo(f"{name}{': ' if message else ''}{message}")
    failed, passed_ = counts
    click.echo(f"{plugin}: {passed_} of {failed + passed_} checks passed")
    return not failed
