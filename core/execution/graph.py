"""The graph executor: a client's step captured once as a CUDA graph and replayed, clients side by side.

Each client of a group has a lane: a stream, and every tensor of its step at a fixed place. A replay costs
the host a few copies whatever the model's size, and lanes fill the GPU where one client does not. On a CPU
a lane runs the step as it is, at the same places: what a graph asks of a method shows there, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..compose import PluginError
from ..contracts import Where, versions
from ..errors import FedsparseError, RunError
from ..memory import out_of_memory
from ..registry import describe
from ..state import Batch, Clock, Stepped
from .exchange import Plan, Totals, Uploads
from .sequential import Sequential
from .step import IGNORED, Given, Step, compiled, filled
from .training import Client

WARM_UPS = 3  # as PyTorch advises before a capture


class Graph(Sequential):
    """Trains `size` clients side by side."""

    lanes: list[Lane]
    compile = False

    def train_all(self, plan: Plan, clients: Sequence[int], uploads: Uploads) -> None:
        if not hasattr(self, "lanes"):
            if self.compile:
                torch.compiler.reset()  # what other runs of this process compiled counts against a limit
            self.lanes = [Lane(self.task.device) for _ in range(self.size)]
        super().train_all(plan, clients, uploads)

    def steps(
        self, plan: Plan, group: Sequence[Client], clock: Clock, batches: Sequence[Sequence[Batch]]
    ) -> None:
        settings = self.settings(plan, clock)
        size = min(self.task.federation.batch_size, self.task.partition.train_range[1])  # of the fullest one
        lanes, each = self.lanes[: len(group)], []
        for lane, client, own in zip(lanes, group, batches, strict=True):
            self.hooks.at = (plan.clock.round, client.number)
            place, plain = self.hooks.where("local_step"), self.stepper(plan, clock)
            step = compiled(self.step, self.loss, settings, place) if self.compile else plain
            ready = list(own) if self.whole_batches() else [filled(batch, size) for batch in own]
            keys = self.step_keys(plan, client.number, clock, len(own))
            # of a whole minibatch: the form of all clients, also of those who have only a short one
            whole, first = filled(own[0], size), {name: key[0] for name, key in keys.items()}
            given = self.given(plan, client, whole, first)
            try:
                lane.load(pure(step, place), pure(plain, place), given, settings.taken(self.step))
            except CaptureError as error:
                raise RunError(
                    f"{place}: the step cannot be captured as a CUDA graph: {error}. "
                    "execution.executor = 'sequential' runs it as it is"
                ) from error
            each.append((ready, keys))
        for lane in lanes:
            lane.wait()
        for index in range(max(len(own) for own in batches)):
            for lane, (ready, keys) in zip(lanes, each, strict=True):
                if index < len(ready):
                    lane.advance(ready[index], {name: key[index] for name, key in keys.items()})
        for lane, client, own in zip(lanes, group, batches, strict=True):
            lane.join()
            if self.contracts:
                self.hooks.at = (plan.clock.round, client.number)
                place, made = self.hooks.where("local_step"), lane.stepped
                self.contracts.parameters(place, made.params)
                self.contracts.stepped(place, made.carry, made.metrics, plan.state.buffers)
            client.params, client.carry = lane.places.params, lane.places.carry
            client.measured.add(client.measured.metrics, lane.totals)
            client.measured.steps_weight += sum(len(batch.targets) for batch in own)


class CaptureError(Exception):
    """Why a step is no CUDA graph."""


def pure(step: Step, place: Where) -> Step:
    """The step, held to what it is given: its tensors lie at the lane's places and are used again."""

    def checked(given: Given) -> Stepped:
        kept = (given.params, given.mask, given.trainable, given.anchor, *given.carry.state.values())
        before = versions(*kept)
        stepped = step(given)
        if versions(*kept) != before:
            raise place.breach("wrote into a tensor it was given; return new ones")
        return stepped

    return checked


class Lane:
    """A step with every tensor that it reads or writes at a fixed place."""

    places: Given
    stepped: Stepped
    """what the step returned when it last ran on the host; its tensors hold nothing after a replay"""

    def __init__(self, device: torch.device) -> None:
        self.device, self.totals = device, Totals()
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.graph: torch.cuda.CUDAGraph | None = None
        self.form: Any = None
        self.constants: dict[str, Any] = {}

    def load(self, step: Step, plain: Step, given: Given, constants: dict[str, Any]) -> None:
        """Brings a client's tensors to their places; captures the step if anything else changed.

        `constants`: numbers that a captured step holds; `plain`: the step for minibatches of another size.
        """
        self.step, self.plain = step, plain
        leaves, structure = pytree.tree_flatten(given)
        form = structure, [(t.shape, t.dtype, t.stride()) for t in leaves]
        fits = form == self.form
        if fits:
            _copy(_pairs(self.places, given))
        else:
            self.places, self.totals = pytree.tree_map(torch.clone, given), {}
        if self.stream is not None and not (fits and constants == self.constants):
            # for another number, such as the rate, libraries have chosen, but a compiler may have to begin
            self.capture(self.stream, 1 if fits else WARM_UPS)
        self.form, self.constants = form, constants
        for total in self.totals.values():
            total.zero_()

    def capture(self, stream: torch.cuda.Stream, warm_ups: int) -> None:
        """Records the step, which runs without effect before: libraries choose their kernels then."""
        self.graph, self.form = None, None
        self.wait()
        # what layers draw without a key must not depend on when a step is captured
        undrawn = torch.random.fork_rng([self.device] if self.device.type == "cuda" else [])
        with torch.cuda.stream(stream), undrawn:
            for _ in range(warm_ups):
                self.stepped = self.step(self.places)
            for name, metric in self.stepped.metrics.items():
                self.totals[name] = torch.zeros_like(metric, dtype=torch.float64)
        self.join()
        graph, failed = torch.cuda.CUDAGraph(), cast(Exception | None, None)
        try:
            with (
                torch.cuda.stream(stream),
                torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
            ):
                try:
                    self.run(self.step, self.places)
                except (RuntimeError, FedsparseError) as error:
                    failed = error  # the end of a capture that failed raises, too, and says less
        except RuntimeError as error:
            failed = failed or error
        if failed is not None:
            if out_of_memory(failed) or not isinstance(failed, RuntimeError | PluginError):
                raise failed
            # the step ran before: a graph is what it cannot be
            raise CaptureError(describe(failed)) from failed
        self.graph = graph

    def run(self, step: Step, given: Given) -> None:
        """One step; its results go to their places."""
        self.stepped = step(given)
        samples = (given.batch.targets != IGNORED).sum()
        for name, metric in self.stepped.metrics.items():
            if name not in self.totals:
                self.totals[name] = torch.zeros_like(metric, dtype=torch.float64)
            self.totals[name] += metric * samples
        held = (self.places.params, self.places.carry)
        _copy(_pairs(held, (self.stepped.params, self.stepped.carry)))

    def advance(self, batch: Batch, keys: dict[str, Tensor]) -> None:
        """The next step, launched on this lane's stream."""
        with self.current():
            if batch.targets.shape != self.places.batch.targets.shape:
                self.run(self.plain, self.places._replace(batch=batch, keys=keys))
                return
            _copy(_pairs((self.places.batch, self.places.keys), (batch, keys)))
            if self.graph is None:
                self.run(self.step, self.places)
            else:
                self.graph.replay()

    def current(self) -> AbstractContextManager[object]:
        """The context in which work goes to this lane."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def wait(self) -> None:
        """This lane goes on after what was launched before; the host does not wait."""
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))

    def join(self) -> None:
        """What is launched from now on runs after this lane's work; the host does not wait."""
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)


def _copy(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Writes values to places, each as it was before: one may be what lies at the place of another."""
    moving = [(place, value) for place, value in pairs if place is not value]
    written = {place.untyped_storage().data_ptr() for place, _ in moving}
    types: dict[tuple[torch.dtype, torch.dtype], list[tuple[Tensor, Tensor]]] = {}
    for place, value in moving:
        apart = value.clone() if value.untyped_storage().data_ptr() in written else value
        types.setdefault((place.dtype, value.dtype), []).append((place, apart))
    for same in types.values():  # of several types a GPU copies one tensor after another
        torch._foreach_copy_([place for place, _ in same], [value for _, value in same])


def _pairs(into: Any, values: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Places with the values of the same names. Raises RunError where the names differ."""
    if isinstance(into, Tensor):
        yield into, values
        return
    if isinstance(into, dict):
        if into.keys() != values.keys():
            raise RunError(
                f"the step returned {sorted(values)} where it was given {sorted(into)}; the graph executor "
                "needs the same names. execution.executor = 'sequential' does not"
            )
        into, values = into.values(), [values[name] for name in into]
    for place, value in zip(into, values, strict=True):
        yield from _pairs(place, value)
