"""What a run shows: a live view on a terminal, plain lines elsewhere, only the summary if quiet."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live as RichLive
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ..core.engine import Engine
from ..core.hookspecs import SLOTS
from ..core.playing import View
from ..core.resolve import DEFAULT_PLUGIN
from ..core.results import Result
from ..core.state import Report
from ..core.tracking import RunFolder

MEGABYTE = 1e6


class Summary(View):
    """Prints the summary at the end; subclasses say more on the way."""

    def __init__(self) -> None:
        self.console = Console(highlight=False)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def end(self, result: Result) -> None:
        """The summary table and where the results are."""
        summary = result.summary
        final, best = summary["final"], summary["best"]
        table = Table(title="interrupted; recorded so far" if summary["interrupted"] else None)
        for heading in ("", "final", "best"):
            table.add_column(heading, justify="left" if not heading else "right")
        for name, label, show in ROWS:
            if name in final or name in best:
                values = [show(row[name]) if name in row else "" for row in (final, best)]
                table.add_row(label, *values)
        table.add_row("nonzero parameters", f"{summary['nonzero']:,} of {summary['parameters']:,}", "")
        for reason, count in summary.get("lost", {}).items():
            table.add_row(f"clients lost: {reason.replace('_', ' ')}", f"{count:,}", "")
        table.add_row("wall time", f"{summary['wall_seconds']:.1f} s", "")
        self.console.print(table)
        self.console.print(f"Results: {result.path}", soft_wrap=True, markup=False)


class Lines(Summary):
    """A header, then one line for each evaluated round."""

    def begin(self, engine: Engine, folder: RunFolder) -> None:
        for line in header(engine, folder):
            self.console.print(line, soft_wrap=not self.console.is_terminal)  # whole words on a screen

    def round(self, report: Report) -> None:
        if "test_accuracy" in report.metrics:
            self.console.print(status(report.metrics), soft_wrap=True)


class Live(Lines):
    """A header, a progress bar over rounds, and the latest figures below it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, Any] = {}
        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
        )
        self.live = RichLive(console=self.console, refresh_per_second=8)

    def begin(self, engine: Engine, folder: RunFolder) -> None:
        super().begin(engine, folder)
        rounds = engine.config.federation.rounds
        self.bar = self.progress.add_task(escape(engine.hooks.method.name), total=rounds)
        self.live.update(self.progress)
        self.live.start()

    def round(self, report: Report) -> None:
        self.seen = {**self.seen, "lost": {}, **report.metrics}
        self.progress.update(self.bar, advance=1)
        self.live.update(Group(self.progress, Text(figures(self.seen))))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.live.stop()


def choose_view(quiet: bool) -> Summary:
    """Live on a terminal, lines elsewhere."""
    if quiet:
        return Summary()
    return Live() if Console().is_terminal else Lines()


def header(engine: Engine, folder: RunFolder) -> list[str]:
    """What runs, in a few lines."""
    config, task, resolved = engine.config, engine.task, folder.resolved
    (least, most), federation = task.partition.train_range, config.federation
    uses = {slot: resolved.uses[f"method.{slot}"] for slot in SLOTS}
    parts = [f"{slot}={use}" for slot, use in uses.items() if not use.startswith(f"{DEFAULT_PLUGIN}:")]
    parts += [f"extra={use}" for use in resolved.extras.values()]
    rest = (
        f"{DEFAULT_PLUGIN}'s parts"
        if any(use.startswith(f"{DEFAULT_PLUGIN}:") for use in uses.values())
        else ""
    )
    weights = sum(layer.weights for layer in task.layers)
    lines = [
        f"[bold]{escape(resolved.method.name):<7}[/bold] {escape(', '.join(filter(None, [*parts, rest])))}",
        f"task    {resolved.uses['task.dataset']}, {task.partition.clients} clients with {least} to "
        f"{most} samples ({resolved.uses['task.partition']}), {federation.clients_per_round} a round",
        f"model   {resolved.uses['task.model']}, {weights:,} prunable weights, target sparsity "
        f"{config.sparsity.target:g} ({config.sparsity.allocation})",
        f"run     {federation.rounds} rounds on {task.device}, seed {config.seed}, into {folder.path}",
        f"speed   {execution(engine)}",
    ]
    unused = federation.clients - task.partition.clients
    if unused:
        lines.append(
            f"note    {unused} of {federation.clients} clients got no training or no test samples: left out"
        )
    return [
        lines[0],
        *map(escape, lines[1:]),
        *(f"[yellow]note    {escape(s)}[/yellow]" for s in resolved.dropped),
    ]


def execution(engine: Engine) -> str:
    """How the clients are trained, and why so."""
    size = engine.workers.size
    said = [f"{type(engine.executor).__name__.lower()} ({engine.why})"]
    said += ["channels last"] if engine.task.layout.channels_last else []
    said += [f"{size} workers"] if size > 1 else []
    return ", ".join(said)


def figures(metrics: Mapping[str, Any]) -> str:
    """Accuracy, sparsity and traffic in one line."""
    accuracy = f"accuracy {metrics['test_accuracy']:.3f}  " if "test_accuracy" in metrics else ""
    up, down = metrics["upload_bytes_total"] / MEGABYTE, metrics["download_bytes_total"] / MEGABYTE
    frozen = f"  frozen {metrics['frozen_fraction']:.2f}" if metrics["frozen_fraction"] else ""
    lost = sum(map(len, metrics.get("lost", {}).values()))
    gone = f"  lost {lost} of {len(metrics['clients'])}" if lost else ""
    return f"{accuracy}sparsity {metrics['sparsity']:.3f}{frozen}  MB up {up:.1f} down {down:.1f}{gone}"


def status(metrics: Mapping[str, Any]) -> str:
    """A plain line of an evaluated round."""
    return f"round {metrics['round'] + 1:>5}  loss {metrics['train_loss']:.4f}  {figures(metrics)}"


def _fraction(value: float) -> str:
    return f"{value:.4f}"


def _megabytes(value: float) -> str:
    return f"{value / MEGABYTE:,.2f} MB"


ROWS = (
    ("round", "rounds played", lambda value: f"{value + 1}"),
    ("test_accuracy", "test accuracy (pooled)", _fraction),
    ("client_accuracy", "client accuracy (mean)", _fraction),
    ("test_loss", "test loss", _fraction),
    ("sparsity", "sparsity", _fraction),
    ("upload_bytes_total", "uploaded", _megabytes),
    ("download_bytes_total", "downloaded", _megabytes),
    ("paper_bytes_total", "both, by the paper's formula", _megabytes),
    ("flops_total", "training FLOPs", lambda value: f"{value:.3g}"),
    ("epsilon", "privacy ε of clients", lambda value: f"{value:.3g}"),
    ("delta", "privacy δ", lambda value: f"{value:g}"),
)
