"""Who is measured: the plain loop, FedAvg on the engine in several ways, and methods."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch

from ...core.config import Layer
from ...core.engine import Engine
from ...core.errors import FedsparseError
from ...core.execution.graph import Graph
from ...core.layout import choose_layout
from ...core.ledger import Ledger, OwnMask, Passed
from ...core.resolve import Resolved, resolve
from ...core.state import Masks, Params
from ...core.task import Task, prunable_layers
from .bare import Bare

SPARSITY = 0.8  # of the methods
NEVER = 1_000_000_000  # rounds between evaluations


class Contender(Protocol):
    """Plays the rounds of a work, one call each, with numbers from 0."""

    captures: bool
    """whether it trains by CUDA graphs"""

    def round(self, number: int) -> None:
        """One round."""


class OnEngine:
    """A method on the engine, from its start on."""

    def __init__(self, resolved: Resolved, task: Task, ledger: bool = True) -> None:
        # one copy of data and network for all contenders; what is prunable is the method's own
        layers = prunable_layers(task.model, resolved.config.sparsity)
        task = replace(task, layers=layers, federation=resolved.config.federation)
        layout = choose_layout(resolved.config.execution.channels_last, task.model, task.device)
        if layout != task.layout:
            task = replace(task, layout=layout, dataset=task.dataset.arranged(layout))
        self.engine = Engine(resolved, task)
        if not ledger:
            self.engine.ledger = self.engine.executor.ledger = NoLedger({}, {}, {})
        self.captures = isinstance(self.engine.executor, Graph)
        self.state = self.engine.start()

    def round(self, number: int) -> None:
        """One round."""
        self.state = self.engine.play(self.state).state


class NoLedger(Ledger):
    """Counts nothing."""

    def begin_round(
        self, params: Params, buffers: Params, mask: Masks, frozen: Masks, trained: Masks | None = None
    ) -> None:
        """Nothing."""

    def beside(
        self, tensors: Params, way: str, client: int, mask: Masks | None = None, whole: bool = False
    ) -> Params:
        """Nothing."""
        return tensors

    def download(self, client: int) -> Passed:
        """Nothing."""
        return Passed(0)

    def upload(
        self,
        client: int,
        mask: Masks,
        params: Params | None = None,
        buffers: Params | None = None,
        own: OwnMask | None = None,
    ) -> Passed:
        """Nothing."""
        return Passed(0)

    def own_masks(self, masks: Masks) -> list[OwnMask]:
        """Nothing."""
        return []

    def train(self, samples: int, score_samples: int = 0) -> float:
        """Nothing."""
        return 0.0

    def end_round(self, tally: Iterable[float] | None = None, clients: Iterable[int] = ()) -> None:
        """Nothing."""


def configured(work: str, plugin: str = "fedavg", **sets: Any) -> Resolved:
    """A work's configuration for a method, never to be evaluated; `a__b=1` stands for a.b."""
    layers = [Layer("bench", {"output": {"evaluate_every": NEVER}})]
    for path, value in sets.items():
        section, _, key = path.partition("__")
        layers.append(Layer("bench", {section: {key: value}}))
    return resolve(plugin, [work], layers=layers)


def gather(
    work: str, task: Task, methods: Sequence[str], executors: bool
) -> tuple[dict[str, Contender], dict[str, str]]:
    """The contenders by name, and the methods that this work does not suit with the reason."""
    dense: Any = {"sparsity__target": 0.0}
    resolved = configured(work, **dense)
    unchecked = configured(work, **dense, execution__contracts=False)
    fedavg = OnEngine(resolved, task)
    found: dict[str, Contender] = {
        "bare": Bare(resolved.config, task, fedavg.engine.workers),
        "fedavg": fedavg,
        "fedavg, no contracts": OnEngine(unchecked, task),
        "fedavg, no contracts or ledger": OnEngine(unchecked, task, ledger=False),
    }
    refused = {}

    def add(name: str, *arguments: str, **sets: Any) -> None:
        try:
            found[name] = OnEngine(configured(work, *arguments, **sets), task)
        except FedsparseError as error:
            refused[name] = str(error)

    for kind in others(fedavg.engine, task.device) if executors else ():
        add(f"fedavg, {kind}", **dense, execution__executor=kind)
    if executors and task.device.type == "cuda":
        add("fedavg, graph, compiled", **dense, execution__executor="graph", execution__compile=True)
        add("fedavg, channels last", **dense, execution__channels_last="on")
    for method in methods:
        add(method, method, sparsity__target=SPARSITY)
    return found, refused


def others(engine: Engine, device: torch.device) -> list[str]:
    """The executors that "auto" did not choose; a CPU has no graphs."""
    kinds = ["sequential", "vectorised", *(["graph"] if device.type == "cuda" else [])]
    return [kind for kind in kinds if kind != type(engine.executor).__name__.lower()]
