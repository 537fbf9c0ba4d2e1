"""A resolved run, here or in so many new processes: what the command and the Python API both call."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from . import runner
from .errors import RunError
from .execution import workers
from .folders import refuse_taken
from .resolve import Resolved
from .results import Result

if TYPE_CHECKING:
    from .engine import Engine
    from .state import Report
    from .tracking import RunFolder


class View:
    """What is told of a run on the way, in the process that records it. This one keeps silent."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def begin(self, engine: Engine, folder: RunFolder) -> None:
        """Once, before the first round."""

    def round(self, report: Report) -> None:
        """After each round."""

    def say(self, text: str) -> None:
        """News in between."""


def play(
    resolved: Resolved, out: Path | None, view: View, count: int = 1, resume: bool = False
) -> Result | None:
    """Plays a run to its end, or to Ctrl-C, with so many workers; what it wrote.

    With `resume` the run in the folder `out` goes on. None in a process that torchrun started and that is not
    the first: only that one records. Raises RunError and ConfigError for what the user can mend.
    """
    if out is not None and not resume:
        refuse_taken(out)
    if count > 1 and not workers.started_by_launcher():
        workers.refuse_idle(count, resolved.config.federation.clients_per_round)
        path = workers.launch(count, _played, resolved, out, view, resume)
    else:
        path = _played(resolved, out, view, resume)
    return None if path is None else Result.load(path)


def played_alone(resolved: Resolved, out: Path | None, view: View, count: int, resume: bool) -> Result:
    """The same where this process must not be one of torchrun's."""
    if workers.started_by_launcher():
        raise RunError(
            "this process was started by torchrun, of which only the commands run and resume can be workers; "
            "start it without torchrun and give workers=N"
        )
    result = play(resolved, out, view, count, resume)
    assert result is not None  # the first of its workers
    return result


def _played(resolved: Resolved, out: Path | None, view: View, resume: bool) -> Path | None:
    """One worker's part; the run's folder, in the first one."""
    me = workers.join(device=resolved.config.execution.device)
    folders: list[Path] = []

    def begun(engine: Engine, folder: RunFolder) -> None:
        folders.append(folder.path)
        view.begin(engine, folder)

    if me.rank > 0:
        runner.run(resolved, out, resume=resume)
    else:
        with view:
            runner.run(resolved, out, begun, view.round, view.say, resume)
    if me.size > 1:
        workers.leave()
    return folders[0] if folders else None
