"""What goes out to a round's clients, and the sums of what comes back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..budget import Budget
from ..state import Clock, Masks, Params, ServerState

Totals = dict[str, Tensor]


@dataclass(frozen=True)
class Plan:
    """What the server sends to this round's clients, and the settings of their training."""

    state: ServerState
    budget: Budget
    clock: Clock
    trainable: Masks
    target: float
    lr: float
    broadcast: Params = field(default_factory=dict)


class Measured(NamedTuple):
    """The part of `Uploads` to which clients add while they still train."""

    metrics: Totals
    score: Totals
    steps_weight: int


@dataclass
class Uploads:
    """The contributions of clients, summed; every tensor has the size of the model once.

    Sums are kept in float64, so that neither the order of clients nor the number of workers shows in what
    they round to.
    """

    sums: Totals = field(default_factory=dict)
    buffers: Totals = field(default_factory=dict)
    score: Totals = field(default_factory=dict)
    metrics: Totals = field(default_factory=dict)
    samples: int = 0
    steps_weight: int = 0
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)

    def add(self, into: Totals, entries: Mapping[str, Tensor]) -> None:
        """Adds one client's entries by name."""
        for name, value in entries.items():
            if name in into:
                into[name] += value
            else:
                into[name] = value.to(torch.float64, copy=True)

    def measure(self, metrics: Sequence[Mapping[str, Tensor]], samples: Sequence[int]) -> None:
        """Adds the metrics of one client's steps, each a mean over that many samples."""
        for name in metrics[0]:
            steps = torch.stack([step[name] for step in metrics]).to(torch.float64)
            self.add(self.metrics, {name: steps @ steps.new_tensor(samples)})
        self.steps_weight += sum(samples)

    def contribute(self, entries: Mapping[str, Tensor]) -> None:
        """Adds one client's contribution, and remembers its types."""
        self.dtypes |= {name: value.dtype for name, value in entries.items()}
        self.add(self.sums, entries)

    def measured(self, with_score: bool) -> Measured:
        """What training has added so far, kept for `back_to`; the score, of the model's size, if asked."""
        score = {name: total.clone() for name, total in self.score.items()} if with_score else self.score
        return Measured({n: total.clone() for n, total in self.metrics.items()}, score, self.steps_weight)

    def back_to(self, kept: Measured) -> None:
        """Forgets what training added since."""
        self.metrics, self.score, self.steps_weight = kept

    def tensors(self) -> Iterator[Tensor]:
        """Every sum, in an order that all workers share."""
        for group in (self.sums, self.buffers, self.score, self.metrics):
            yield from group.values()

    def form(self) -> list[Any]:
        """Names and shapes of every sum, and the types of contributions."""
        groups = (self.sums, self.buffers, self.score, self.metrics)
        shapes = [{name: tuple(value.shape) for name, value in group.items()} for group in groups]
        return [shapes, self.dtypes, next(iter(self.sums.values())).device.type]

    def take_form(self, form: list[Any]) -> None:
        """Sums of nobody: zeros of another's form."""
        shapes, self.dtypes, kind = form
        device = torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)
        for group, wanted in zip((self.sums, self.buffers, self.score, self.metrics), shapes, strict=True):
            for name, shape in wanted.items():
                group[name] = torch.zeros(shape, dtype=torch.float64, device=device)

    def contributions(self) -> Params:
        """The sums of contributions in the types that clients sent."""
        return {
            name: total.to(self.dtypes[name], memory_format=torch.contiguous_format)
            for name, total in self.sums.items()
        }

    def mean_score(self) -> Params:
        """The clients' scores, averaged by samples."""
        return {
            name: (total / self.samples).to(torch.float32, memory_format=torch.contiguous_format)
            for name, total in self.score.items()
        }
