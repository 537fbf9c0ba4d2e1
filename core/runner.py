"""A run from a resolved configuration to its folder."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import checkpoint, clients, mask_history, task
from .compose import PluginError
from .disk import DiskError
from .ending import asked, ended_by, ends_after_round
from .engine import Engine
from .errors import RunError
from .execution.workers import LostWorkerError
from .folders import refuse_taken
from .resolve import Resolved
from .state import Report, ServerState
from .tracking import RunFolder, finished, keep_traceback

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

    `begun` is called once, before the first round, `watch` after each, `say` with news in words. Ctrl-C or
    SIGTERM ends the run after the round that is being played, with a checkpoint; a second Ctrl-C at once.
    Either way what was recorded stays, and the summary says "interrupted" and by which "signal". With
    `resume` the run in the folder `out` goes on from its checkpoint. Of several workers the first records,
    watches and says; to the others all this is empty. Raises FedsparseError for what the user can mend,
    DiskError if the folder does not take what is written; the traceback of a run that failed is kept in
    `error.log`, or `error-worker1.log`.
    """
    started = time.perf_counter()
    if out is not None and not resume:
        refuse_taken(out)  # before minutes are spent on data
    engine, made_by = Engine(resolved, task.build(resolved.config)), checkpoint.identity(resolved)
    engine.workers.wait()  # nobody writes before all have looked
    if resume and out is not None:
        state, ledger = checkpoint.load(out / "checkpoint", made_by, engine.task.device, say)
        try:
            checkpoint.check(state, engine.params, engine.buffers, engine.prunable)
            engine.ledger.load_state(ledger)
        except RunError as error:
            raise RunError(f"cannot read the checkpoint {out / 'checkpoint'}: {error}") from error
        if state.round >= resolved.config.federation.rounds and finished(out):
            raise RunError(f"the run in {out} has played all of its {state.round} rounds")
    else:
        state = engine.start()
    first, engine.executor.say = engine.workers.rank == 0, say
    with ends_after_round(engine, say if first else lambda text: None):
        if not first:
            _follow(engine, state)
            return {}
        folder = RunFolder(resolved, out, resume_at=state.round if resume else None)
        engine.workers.from_first(folder.path)
        begun(engine, folder)
        state, ended = _play(engine, folder, state, watch, made_by)
    with _advice(folder):
        summary = folder.finish(
            state,
            engine.loss.weights(state.params, state.mask),
            device=engine.task.device,
            workers=engine.workers.size,
            clients=engine.task.partition.clients,
            wall_seconds=time.perf_counter() - started,
            ended_by=ended if state.round < resolved.config.federation.rounds else None,
        )
    if engine.hooks.has_extra("on_run_end"):
        engine.hooks.extra("on_run_end", summary=summary)
    return summary


def _follow(engine: Engine, state: ServerState) -> None:
    """Plays the rounds that are left, which the first worker records."""
    folder = engine.workers.from_first(Path())
    try:
        for report in engine.rounds(state):
            if report.stop:
                return
    except KeyboardInterrupt:
        return
    except LostWorkerError:
        if signal.SIGINT not in asked:
            raise  # else it was lost to a second Ctrl-C, which waiting for it kept from this worker
    except Exception as error:
        _keep(error, folder, engine.workers.rank)
        raise


def _play(
    engine: Engine, folder: RunFolder, state: ServerState, watch: Watcher, made_by: Mapping[str, Any]
) -> tuple[ServerState, str | None]:
    """Plays and records the rounds that are left; the last state, and the signal that ended them."""
    every, rounds = engine.config.output.checkpoint_every, engine.config.federation.rounds
    kept = mask_history.kept_rounds(rounds, engine.config.output.masks)
    try:
        if engine.hooks.has_extra("on_run_begin"):
            engine.hooks.extra("on_run_begin", folder=folder.path, settings=folder.resolved.tree())
        with _advice(folder):
            clients.write(folder.path, engine.task)
            if state.round in kept:
                mask_history.keep(folder.path, state.round, engine.sent(state))
        for report in engine.rounds(state):
            state = report.state
            with _advice(folder):
                folder.record(report.metrics)
                # before the checkpoint: who goes on from it writes no mask of the past
                if state.round in kept:
                    mask_history.keep(folder.path, state.round, engine.sent(state))
                if state.round % every == 0 or state.round == rounds or report.stop:
                    folder.settle()
                    checkpoint.save(folder.path / "checkpoint", state, engine.ledger.state(), made_by)
            watch(report)
            if report.stop:
                return state, ended_by().name
    except KeyboardInterrupt:
        return state, signal.SIGINT.name
    except LostWorkerError:
        if signal.SIGINT in asked:
            return state, signal.SIGINT.name
        folder.close()
        raise  # the other one's report says what happened
    except DiskError:
        folder.close()
        raise  # its message says all
    except Exception as error:
        folder.close()
        _keep(error, folder.path)
        raise
    return state, None


@contextmanager
def _advice(folder: RunFolder) -> Iterator[None]:
    """Adds to a DiskError what to do when it is mended."""
    try:
        yield
    except DiskError as error:
        saved = (folder.path / "checkpoint").exists()
        after = f"fedsparse resume {folder.path} goes on from the last checkpoint"
        raise DiskError(f"{error}. {after if saved else 'There is no checkpoint yet: start anew'}") from error


def _keep(error: Exception, folder: Path, worker: int = 0) -> None:
    """Keeps the traceback. Raises PluginError that says where, if a plugin is to blame."""
    log = keep_traceback(folder, worker)
    if log is not None and isinstance(error, PluginError):
        raise PluginError(f"{error}; traceback in {log}") from error
