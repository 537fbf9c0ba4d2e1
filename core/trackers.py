"""Trackers: parts that send each round's metrics to a tool, chosen by `--track`; see `TRACKERS`."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from pydantic import PrivateAttr

from . import results
from .disk import replace as replace_file
from .errors import ConfigError, Problem, RunError, nearest
from .hookspecs import hookimpl
from .part import Part
from .resolve import Resolved
from .state import Report

__all__ = ["TRACKERS", "Csv", "MLflow", "TensorBoard", "WeightsAndBiases", "tracked"]


class Csv(Part):
    """`metrics.csv`: a line a number, with the columns round, name and value."""

    _file: Any = PrivateAttr(None)

    @hookimpl
    def on_run_begin(self, folder: Path) -> None:
        path, reached = folder / "metrics.csv", kept(folder)
        rows = []
        if path.exists():  # a resumed run plays the rounds after its checkpoint again
            with path.open(newline="", encoding="utf-8") as file:
                rows = [row for row in csv.reader(file) if row[:1] and row[0].isdigit()]

        def write(fresh: Path) -> None:
            with fresh.open("w", newline="", encoding="utf-8") as file:
                earlier = (row for row in rows if int(row[0]) < reached)
                csv.writer(file).writerows([("round", "name", "value"), *earlier])

        replace_file(path, write)
        self._file = path.open("a", newline="", encoding="utf-8")

    @hookimpl
    def on_round_end(self, report: Report) -> None:
        writer = csv.writer(self._file)
        writer.writerows((report.metrics["round"], *pair) for pair in numbers(report.metrics))
        self._file.flush()

    @hookimpl
    def on_run_end(self) -> None:
        self._file.close()


class TensorBoard(Part):
    """Scalars in `tensorboard/` of the run's folder: `tensorboard --logdir runs` compares runs."""

    _writer: Any = PrivateAttr(None)

    @hookimpl
    def on_run_begin(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # rounds that a resumed run plays again take the place of what was there
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=kept(folder) or None)

    @hookimpl
    def on_round_end(self, report: Report) -> None:
        for name, value in numbers(report.metrics):
            self._writer.add_scalar(name, value, report.metrics["round"])

    @hookimpl
    def on_run_end(self) -> None:
        self._writer.close()


class WeightsAndBiases(Part):
    """A run of the project `fedsparse` (or WANDB_PROJECT); WANDB_MODE=offline keeps it in its folder."""

    _run: Any = PrivateAttr(None)

    @hookimpl
    def on_run_begin(self, folder: Path, settings: Mapping[str, Any]) -> None:
        wandb = needed("wandb")
        import os

        project = os.environ.get("WANDB_PROJECT", "fedsparse")
        self._run = wandb.init(project=project, name=folder.name, dir=str(folder), config=dict(settings))

    @hookimpl
    def on_round_end(self, report: Report) -> None:
        self._run.log(dict(numbers(report.metrics)), step=report.metrics["round"])

    @hookimpl
    def on_run_end(self) -> None:
        self._run.finish()


class MLflow(Part):
    """A run of the experiment `fedsparse`, where MLFLOW_TRACKING_URI says, or in MLflow's default store."""

    _client: Any = PrivateAttr(None)
    _run: str = PrivateAttr("")

    @hookimpl
    def on_run_begin(self, folder: Path, settings: Mapping[str, Any]) -> None:
        mlflow = needed("mlflow")
        self._client = mlflow.MlflowClient()
        experiment = self._client.get_experiment_by_name("fedsparse")
        number = experiment.experiment_id if experiment else self._client.create_experiment("fedsparse")
        self._run = self._client.create_run(number, run_name=folder.name).info.run_id
        for path, value in flat(settings):
            self._client.log_param(self._run, path, value)

    @hookimpl
    def on_round_end(self, report: Report) -> None:
        for name, value in numbers(report.metrics):
            self._client.log_metric(self._run, name, value, step=report.metrics["round"])

    @hookimpl
    def on_run_end(self) -> None:
        self._client.set_terminated(self._run)


TRACKERS: dict[str, Callable[[], Part]] = {
    "csv": Csv,
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
}
"""By name; but for "csv" it is the package's, too."""


def tracked(resolved: Resolved, names: Iterable[str]) -> Resolved:
    """The run with these trackers among its extras.

    Raises ConfigError for unknown names and RunError for packages that are not installed.
    """
    names = list(dict.fromkeys(names))
    unknown = [name for name in names if name not in TRACKERS]
    if unknown:
        raise ConfigError(
            Problem("--track", f"unknown tracker {n!r}. {nearest(n, TRACKERS)}") for n in unknown
        )
    for name in names:
        if name != "csv":
            needed(name)  # before minutes are spent on data
    extras = (*resolved.method.extras, *(TRACKERS[name]() for name in names))
    return replace(resolved, method=replace(resolved.method, extras=extras)) if names else resolved


def kept(folder: Path) -> int:
    """The rounds of a run that stay: 0, or those up to its checkpoint when it is resumed."""
    return len((folder / "metrics.jsonl").read_bytes().splitlines())


def numbers(metrics: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers among a round's metrics, but the round itself; by layer as `density/fc1.weight`."""
    return ((name, float(value)) for name, value in results.numbers(metrics) if name != "round")


def flat(settings: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings by dotted path, as texts."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", str(value)


def needed(package: str) -> Any:
    """The package of a tracker. Raises RunError if it is not installed."""
    try:
        return import_module(package)
    except ImportError:
        raise RunError(f"--track {package} needs {package}: pip install 'fedsparse[trackers]'") from None
