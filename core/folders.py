"""Folders that a command is about to fill; imports no torch."""

from __future__ import annotations

from pathlib import Path

from .errors import RunError


def refuse_taken(path: Path) -> None:
    """Raises RunError if `path` exists and is not an empty folder."""
    try:
        taken = path.exists() and (not path.is_dir() or any(path.iterdir()))
    except (OSError, ValueError) as error:
        raise RunError(f"cannot write to {path}: {error}") from None
    if taken:
        raise RunError(f"{path} exists and is not an empty folder; name another with --out, or delete it")
