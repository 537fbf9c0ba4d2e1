"""A run from a resolved configuration to its folder."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import checkpoint, task
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
) -> dict[str, Any]:
    """Runs to the end and returns the summary, also written to `summary.json`.

    `begun` is called once, before the first round, `watch` after each. Ctrl-C ends the run with what was
    recorded and "interrupted" in the summary. Raises FedsparseError for what the user can mend; a traceback
    of a plugin's error is kept in `error.log`.
    """
    started = time.perf_counter()
    if out is not None:
        refuse_taken(out)  # before minutes are spent on data
    engine = Engine(resolved, task.build(resolved.config))
    state = engine.start()
    folder = RunFolder(resolved, out)
    begun(engine, folder)
    interrupted = False
    every = resolved.config.output.checkpoint_every
    try:
        for report in engine.rounds(state):
            state = report.state
            folder.record(report.metrics)
            if state.round % every == 0 or state.round == resolved.config.federation.rounds:
                checkpoint.save(folder.path / "checkpoint", state, engine.ledger.state())
            watch(report)
    except KeyboardInterrupt:
        interrupted = True
    except Exception:
        folder.fail(traceback.format_exc())
        raise
    return folder.finish(
        state,
        device=engine.task.device,
        wall_seconds=time.perf_counter() - started,
        interrupted=interrupted,
    )
