"""Errors that a user sees: one readable message, never a traceback.

Exit codes of the command line: 2 for a configuration that cannot be used, 1 for a run that failed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass


class FedsparseError(Exception):
    """Base of every error that fedsparse raises on purpose; its text is written for the user."""

    exit_code = 1


class RunError(FedsparseError):
    """The run cannot start or go on: missing data, a folder in use, a breach of a contract."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong in a configuration: a dotted path and what to do about it."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


class ConfigError(FedsparseError):
    """Every problem found in a configuration, together."""

    exit_code = 2

    def __init__(self, problems: Iterable[Problem] | str) -> None:
        self.problems = [Problem("", problems)] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(map(str, self.problems)))


def nearest(given: str, allowed: Iterable[str]) -> str:
    """`Did you mean 'x'? Allowed: …` for an unknown name, as the tail of a message."""
    names = sorted(allowed)
    close = difflib.get_close_matches(given, names, n=1)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    return f"{hint}Allowed: {', '.join(names) or 'nothing'}"
