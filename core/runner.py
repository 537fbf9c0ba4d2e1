"""A run from a resolved configuration to its folder."""

from __future__ import annotations

import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import checkpoint, clients, mask_history, task
from .compose import PluginError
from .engine import Engine
from .errors import RunError
from .execution.workers import LostWorkerError
from .folders import refuse_taken
from .resolve import Resolved
from .state import Report, ServerState
from .tracking import RunFolder

Watcher = Callable[[Report], None]
Begun = Callable[[Engine, RunFolder], None]


def run(
    resolved: Resolved,
    out: Path | None = None,
    begun: Begun = lambda engine, folder: None,
    watch: Watcher = lambda report: None,
    say: Callable[[str], None] = lambda text: None,
    resume: bool = False,
) -> dict[str, Any]:
    """Runs to the end and returns the summary, also written to `summary.json`.

    `begun` is called once, before the first round, `watch` after each, `say` with news in words. Ctrl-C ends
    the run after the round that is being played, a second one at once; either way what was recorded stays,
    and the summary says "interrupted". With `resume` the run in the folder `out` goes on from its checkpoint.
    Of several workers the first records, watches and says; to the others all this is empty. Raises
    FedsparseError for what the user can mend; the traceback of a run that failed is kept in `error.log`.
    """
    started = time.perf_counter()
    if out is not None and not resume:
        refuse_taken(out)  # before minutes are spent on data
    engine, made_by = Engine(resolved, task.build(resolved.config)), checkpoint.identity(resolved)
    engine.workers.wait()  # nobody writes before all have looked
    if resume and out is not None:
        state, ledger = checkpoint.load(out / "checkpoint", made_by, engine.task.device, say)
        engine.ledger.load_state(ledger)
        if state.round >= resolved.config.federation.rounds:
            raise RunError(f"the run in {out} has played all of its {state.round} rounds")
    else:
        state = engine.start()
    with first_ctrl_c(engine, say):
        if engine.workers.rank > 0:
            _follow(engine, state)
            return {}
        folder = RunFolder(resolved, out, resume_at=state.round if resume else None)
        clients.write(folder.path, engine.task)
        begun(engine, folder)
        state, interrupted = _play(engine, folder, state, watch, made_by)
    summary = folder.finish(
        state,
        engine.loss.weights(state.params, state.mask),
        device=engine.task.device,
        workers=engine.workers.size,
        clients=engine.task.partition.clients,
        wall_seconds=time.perf_counter() - started,
        interrupted=interrupted and state.round < resolved.config.federation.rounds,
    )
    if engine.hooks.has_extra("on_run_end"):
        engine.hooks.extra("on_run_end", summary=summary)
    return summary


def _follow(engine: Engine, state: ServerState) -> None:
    """Plays the rounds that are left, which the first worker records."""
    try:
        for report in engine.rounds(state):
            if report.stop:
                return
    except KeyboardInterrupt:
        return


def _play(
    engine: Engine, folder: RunFolder, state: ServerState, watch: Watcher, made_by: Mapping[str, Any]
) -> tuple[ServerState, bool]:
    """Plays and records the rounds that are left; the last state, and whether Ctrl-C ended them."""
    every, rounds = engine.config.output.checkpoint_every, engine.config.federation.rounds
    kept = mask_history.kept_rounds(rounds, engine.config.output.masks)
    try:
        if engine.hooks.has_extra("on_run_begin"):
            engine.hooks.extra("on_run_begin", folder=folder.path, settings=folder.resolved.tree())
        if state.round in kept:
            mask_history.keep(folder.path, state.round, engine.sent(state))
        for report in engine.rounds(state):
            state = report.state
            folder.record(report.metrics)
            if state.round in kept:  # before the checkpoint: who goes on from it writes no mask of the past
                mask_history.keep(folder.path, state.round, engine.sent(state))
            if state.round % every == 0 or state.round == rounds or report.stop:
                checkpoint.save(folder.path / "checkpoint", state, engine.ledger.state(), made_by)
            watch(report)
            if report.stop:
                return state, True
    except KeyboardInterrupt:
        return state, True
    except LostWorkerError:
        raise  # its own report says what happened
    except PluginError as error:
        folder.fail(traceback.format_exc())
        raise PluginError(f"{error}; traceback in {folder.path / 'error.log'}") from error
    except Exception:
        folder.fail(traceback.format_exc())
        raise
    return state, False


@contextmanager
def first_ctrl_c(engine: Engine, say: Callable[[str], None]) -> Iterator[None]:
    """The first Ctrl-C asks the engine to stop after its round; the second raises KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach the main thread only
        return
    before = signal.getsignal(signal.SIGINT)

    def first(*_: object) -> None:
        engine.stop = True
        signal.signal(signal.SIGINT, before)
        say("Ending after this round; Ctrl-C again ends at once.")

    signal.signal(signal.SIGINT, first)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
