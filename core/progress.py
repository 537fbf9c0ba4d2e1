"""Who is told of a run that is played from Python: nobody, a callable, or a bar, in a notebook too."""

from __future__ import annotations

import html
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from .errors import FedsparseError
from .playing import View
from .resolve import Resolved

if TYPE_CHECKING:
    from .state import Report

Tell = Callable[[Mapping[str, Any]], object]
Told = Callable[[Mapping[str, Any] | str], None]
REDRAW = 0.2  # seconds between two pictures of a notebook's bar


@contextmanager
def watching(progress: bool | Tell, resolved: Resolved, workers: int) -> Iterator[View]:
    """The view of a run: what it tells arrives in this process, whichever process plays the run."""
    with _teller(progress, resolved) as tell:
        if tell is None or workers == 1:
            yield _Telling(tell or (lambda told: None))
            return
        # forked workers have copies of everything that a callable might fill
        here, there = socket.socketpair()
        reader, writer = Connection(here.detach()), Connection(there.detach())
        failed: list[BaseException] = []

        def listen() -> None:
            try:
                while True:
                    tell(reader.recv())
            except EOFError:
                return
            except BaseException as error:
                failed.append(error)
                with socket.socket(fileno=os.dup(reader.fileno())) as line:
                    line.shutdown(socket.SHUT_RDWR)  # the run ends when it next tells something

        thread = threading.Thread(target=listen, daemon=True)
        thread.start()
        try:
            yield _Telling(writer.send)
        except FedsparseError:
            if failed:
                raise failed[0] from None
            raise
        finally:
            writer.close()
            thread.join()
            reader.close()
        if failed:
            raise failed[0]


class _Telling(View):
    """Passes on each round's metrics, and news in words."""

    def __init__(self, tell: Told) -> None:
        self.tell = tell

    def round(self, report: Report) -> None:
        self.tell(dict(report.metrics))

    def say(self, text: str) -> None:
        self.tell(text)


@contextmanager
def _teller(progress: bool | Tell, resolved: Resolved) -> Iterator[Told | None]:
    """What metrics and news are told to."""
    if callable(progress):
        told = progress

        def tell(what: Mapping[str, Any] | str) -> None:
            if not isinstance(what, str):
                told(what)

        yield tell
        return
    if not progress:
        yield None
        return
    from rich.console import Console

    name, rounds = resolved.method.name, resolved.config.federation.rounds
    console = Console()
    if console.is_jupyter:
        bar = _Notebook(name, rounds)
        yield bar
        bar.draw()
        return
    from rich.progress import Progress

    with Progress(console=console) as bars:
        task = bars.add_task(name, total=rounds)

        def show(what: Mapping[str, Any] | str) -> None:
            if isinstance(what, str):
                bars.print(what, markup=False)
            else:
                bars.update(task, completed=what["round"] + 1)

        yield show


class _Notebook:
    """A bar in a notebook's cell, by what every kernel has: rich's needs ipywidgets, and vanishes without."""

    def __init__(self, name: str, rounds: int) -> None:
        from IPython.display import display  # there is no notebook without

        self.name, self.rounds, self.round, self.news = name, rounds, 0, ""
        self.accuracy, self.drawn_at = "", 0.0
        self.handle = display(self.picture(), raw=True, display_id=True)

    def __call__(self, told: Mapping[str, Any] | str) -> None:
        if isinstance(told, str):
            self.news = told
        else:
            self.round = told["round"] + 1
            if told.get("test_accuracy") is not None:
                self.accuracy = f", test accuracy {told['test_accuracy']:.3f}"
        if isinstance(told, str) or time.monotonic() - self.drawn_at >= REDRAW:
            self.draw()

    def draw(self) -> None:
        """Shows how far the run is by now."""
        self.drawn_at = time.monotonic()
        self.handle.update(self.picture(), raw=True)

    def picture(self) -> dict[str, str]:
        """The bar, as HTML and as text for what shows no HTML."""
        text = f"{self.name}: {self.round} of {self.rounds} rounds{self.accuracy}"
        text = f"{text}. {self.news}" if self.news else text
        bar = f'<progress value="{self.round}" max="{self.rounds}"></progress> {html.escape(text)}'
        return {"text/plain": text, "text/html": bar}
