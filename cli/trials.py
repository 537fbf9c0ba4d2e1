"""Runs played one after another, as an ablation and a paper's table have them: a line and a bar each."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..core import ablation
from ..core.ablation import Outcome, Play, Trial
from ..core.engine import Engine
from ..core.errors import RunError
from ..core.execution import workers
from ..core.playing import View
from ..core.playing import play as play_run
from ..core.results import Result
from ..core.state import Report
from ..core.tracking import RunFolder


class Lines:
    """A line a run, as it ends."""

    def __init__(self, console: Console, trials: Sequence[Trial], metric: str, quiet: bool) -> None:
        """`metric` is the final figure that a line shows."""
        self.console, self.trials, self.metric, self.quiet = console, trials, metric, quiet
        self.told: list[str] = []
        self.widths = [
            max(len(piece) for piece in column) for column in zip(*map(_pieces, trials), strict=True)
        ]

    def say(self, text: str) -> None:
        self.console.print(text, soft_wrap=not self.console.is_terminal, markup=False)

    def notes(self) -> None:
        """Settings that a swap or a preset dropped."""
        for note in dict.fromkeys(note for trial in self.trials for note in trial.resolved.dropped):
            self.say(f"note  {note}")

    def name(self, trial: Trial) -> str:
        """A run in words, in columns."""
        pieces = zip(_pieces(trial), self.widths, strict=True)
        return "  ".join(f"{piece:<{width}}" for piece, width in pieces)

    def tell(self, trial: Trial, result: Result | None, remark: str) -> None:
        """A run ended, or had before."""
        self.told.append(trial.folder)
        if self.quiet:
            return
        if result is None:
            self.say(f"{self.name(trial)}  failed: {remark}")
            return
        value = ablation.final(result, self.metric)
        seconds = float(result.metrics["seconds"].sum())
        note = f"  ({remark})" if remark else ""
        self.say(f"{self.name(trial)}  {self.metric} {number(value, self.metric)}  {seconds:8.2f} s{note}")


class Bar(View):
    """A bar over the rounds of one run, on a terminal."""

    def __init__(self, console: Console, name: str) -> None:
        self.name, self.console = name, console
        self.bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
            disable=not name or not console.is_terminal,
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def begin(self, engine: Engine, folder: RunFolder) -> None:
        self.task = self.bar.add_task(self.name, total=engine.config.federation.rounds)
        self.bar.start()

    def round(self, report: Report) -> None:
        self.bar.update(self.task, completed=report.metrics["round"] + 1)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)


def refuse_launcher(command: str) -> None:
    """Raises RunError in a process of torchrun's."""
    if workers.started_by_launcher():
        raise RunError(f"{command} starts its own workers: run it without torchrun, with --workers N")


def carry_out(
    lines: Lines, out: Path, count: int, each: Callable[[Play], Outcome]
) -> tuple[Outcome, signal.Signals | None]:
    """Plays what `each` asks for with so many workers; how it went, and the signal that ended it, if any.

    When it was ended, the last line says how to go on.
    """
    ended = signal.SIGINT

    def play(trial: Trial, folder: Path, resume: bool) -> bool:
        nonlocal ended
        view = Bar(lines.console, "" if lines.quiet else lines.name(trial))
        result = play_run(trial.resolved, folder, view, count, resume)
        assert result is not None  # the first of its workers
        ended = signal.Signals[result.summary.get("signal", ended.name)]
        return bool(result.summary["interrupted"])

    outcome = each(play)
    if not outcome.interrupted:
        return outcome, None
    done = len(lines.told) - len(outcome.failed)
    lines.console.print(
        f"Interrupted; {done} of {len(lines.trials)} runs are finished. The same command with --out {out} "
        "goes on and repeats none of them.",
        soft_wrap=True,
        markup=False,
    )
    return outcome, ended


def raise_failed(outcome: Outcome, out: Path, runs: int) -> None:
    """Raises RunError if some of so many runs failed."""
    if outcome.failed:
        said = "".join(f"\n  {out / name}: {why}" for name, why in outcome.failed.items())
        raise RunError(
            f"{len(outcome.failed)} of {runs} runs failed; the same command tries them again:{said}"
        )


def number(value: float, metric: str, sign: str = "") -> str:
    """Fractions and losses with four places, counts with four digits."""
    counts = metric.endswith("_total")
    return f"{value:{sign}.4g}" if counts else f"{value:{sign}.4f}"


def short_paths(paths: Iterable[str]) -> dict[str, str]:
    """The settings by the last word of their paths, or by the path where that says too little."""
    last = {path: path.removesuffix(".use").rpartition(".")[2] for path in paths}
    return {path: path if [*last.values()].count(word) > 1 else word for path, word in last.items()}


def counted(number: int, what: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def _pieces(trial: Trial) -> list[str]:
    names = short_paths(trial.point).items()
    return [
        trial.variant,
        *(f"{short}={ablation.shown(trial.point[path])}" for path, short in names),
        f"seed {trial.seed}",
    ]
