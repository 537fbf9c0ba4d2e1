"""A run from a resolved configuration to its folder."""

from __future__ import annotations

import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import checkpoint, task
from .compose import PluginError
from .engine import Engine
from .resolve import Resolved
from .state import Report
from .tracking import RunFolder, refuse_taken

Watcher = Callable[[Report], None]
Begun = Callable[[Engine, RunFolder], None]


def run(
    resolved: Resolved,
    out: Path | None = None,
    begun: Begun = lambda engine, folder: None,
    watch: Watcher = lambda report: None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Runs to the end and returns the summary, also written to `summary.json`.

    `begun` is called once, before the first round, `watch` after each, `say` with news in words. Ctrl-C ends
    the run after the round that is being played, a second one at once; either way what was recorded stays,
    and the summary says "interrupted". Raises FedsparseError for what the user can mend; the traceback of a
    run that failed is kept in `error.log`.
    """
    started = time.perf_counter()
    if out is not None:
        refuse_taken(out)  # before minutes are spent on data
    engine = Engine(resolved, task.build(resolved.config))
    state = engine.start()
    folder = RunFolder(resolved, out)
    begun(engine, folder)
    every, rounds = resolved.config.output.checkpoint_every, resolved.config.federation.rounds
    stop = threading.Event()
    try:
        with first_ctrl_c_sets(stop, say):
            for report in engine.rounds(state):
                state = report.state
                folder.record(report.metrics)
                if state.round % every == 0 or state.round == rounds or stop.is_set():
                    checkpoint.save(folder.path / "checkpoint", state, engine.ledger.state())
                watch(report)
                if stop.is_set():
                    break
    except KeyboardInterrupt:
        stop.set()
    except PluginError as error:
        folder.fail(traceback.format_exc())
        raise PluginError(f"{error}; traceback in {folder.path / 'error.log'}") from error
    except Exception:
        folder.fail(traceback.format_exc())
        raise
    return folder.finish(
        state,
        engine.loss.weights(state.params, state.mask),
        device=engine.task.device,
        wall_seconds=time.perf_counter() - started,
        interrupted=stop.is_set() and state.round < rounds,
    )


@contextmanager
def first_ctrl_c_sets(stop: threading.Event, say: Callable[[str], None]) -> Iterator[None]:
    """The first Ctrl-C sets the event; the second raises KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach the main thread only
        return
    before = signal.getsignal(signal.SIGINT)

    def first(*_: object) -> None:
        stop.set()
        signal.signal(signal.SIGINT, before)
        say("Ending after this round; Ctrl-C again ends at once.")

    signal.signal(signal.SIGINT, first)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
