"""Signals that ask a run to end: Ctrl-C, and the SIGTERM of a cluster that takes its machine back."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .engine import Engine

ENDING = (signal.SIGINT, signal.SIGTERM)
asked: list[signal.Signals] = []
"""those that this process got since its run began, the first one first"""


@contextmanager
def ends_after_round(engine: Engine, say: Callable[[str], object]) -> Iterator[None]:
    """Until the block ends, the first of the signals asks the engine to end the run after its round.

    Another Ctrl-C raises KeyboardInterrupt. Another SIGTERM does nothing: launchers and clusters send it to
    each process and to their group, so that one request arrives twice.
    """
    asked.clear()
    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach the main thread only
        return
    before = {number: signal.getsignal(number) for number in ENDING}

    def ask(number: int, frame: FrameType | None) -> None:
        known, given = signal.SIGINT in asked, signal.Signals(number)
        first = not asked
        asked.append(given)
        if given == signal.SIGINT and known:
            raise KeyboardInterrupt
        engine.stop = True
        if first or given == signal.SIGINT:
            end = "Ctrl-C again ends at once" if given == signal.SIGINT else "SIGKILL ends at once"
            say(f"{given.name}: ending after this round; {end}.")

    for number in ENDING:
        signal.signal(number, ask)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ended_by() -> signal.Signals:
    """The signal behind a run that ended early; SIGTERM if another worker got it and not this one."""
    return signal.SIGINT if signal.SIGINT in asked else signal.SIGTERM
