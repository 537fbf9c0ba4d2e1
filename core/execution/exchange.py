"""What goes out to a round's clients, and the sums of what comes back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..budget import Budget
from ..state import Clock, Masks, Params, ServerState
from ..transfer import to_device

Totals = dict[str, Tensor]


@dataclass(frozen=True)
class Plan:
    """What the server sends to this round's clients, and the settings of their training."""

    state: ServerState
    budget: Budget
    clock: Clock
    trainable: Masks
    """what local steps may move; only tensors with something that they may not"""
    frozen: Masks
    """the server's frozen set; only tensors with something in it"""
    target: float
    lr: float
    broadcast: Params = field(default_factory=dict)
    drop_non_finite: bool = False
    """a client that becomes NaN or infinite gives up, and the round goes on without it"""


class Measured(NamedTuple):
    """The part of `Uploads` to which clients add while they still train."""

    metrics: Totals
    score: Totals
    steps_weight: int
    lost: dict[str, list[int]]


@dataclass
class Uploads:
    """The contributions of clients, summed; every tensor has the size of the model once.

    Sums are kept in float64, so that neither the order of clients nor the number of workers shows in what
    they round to. If `gathered`, contributions stay `apart` and as they are: memory grows with the clients.
    """

    gathered: bool = False
    apart: list[tuple[int, Params]] = field(default_factory=list)
    """clients with what they contributed, in no order"""
    stacked: Params = field(default_factory=dict)
    """contributions of all workers' clients, clients first"""
    one: Params = field(default_factory=dict)
    """the first contribution as empty tensors of its shapes and types"""

    sums: Totals = field(default_factory=dict)
    buffers: Totals = field(default_factory=dict)
    score: Totals = field(default_factory=dict)
    metrics: Totals = field(default_factory=dict)
    samples: int = 0
    steps_weight: int = 0
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    lost: dict[str, list[int]] = field(default_factory=dict)
    """clients that send nothing, by reason"""

    def lose(self, reason: str, *clients: int) -> None:
        """Notes clients whose upload will not come."""
        if clients:
            self.lost.setdefault(reason, []).extend(clients)

    def add(self, into: Totals, entries: Mapping[str, Tensor]) -> None:
        """Adds one client's entries by name."""
        for name, value in entries.items():
            if name in into:
                into[name] += value
            else:
                into[name] = value.to(torch.float64, copy=True)

    def measure(self, metrics: Sequence[Mapping[str, Tensor]], samples: Sequence[int]) -> None:
        """Adds the metrics of one client's steps, each a mean over that many samples."""
        weights = to_device(np.array(samples, dtype=np.float64), metrics[0]["loss"].device)
        for name in metrics[0]:
            steps = torch.stack([step[name] for step in metrics]).to(torch.float64)
            self.add(self.metrics, {name: steps @ weights})
        self.steps_weight += sum(samples)

    def contribute(self, number: int, entries: Mapping[str, Tensor]) -> None:
        """Adds one client's contribution, and remembers its types."""
        if self.gathered:
            # a copy: an executor may train the next client in the same memory
            own = {n: v.clone(memory_format=torch.contiguous_format) for n, v in entries.items()}
            self.one = self.one or {name: value.to("meta") for name, value in own.items()}
            self.apart.append((number, own))
            return
        self.dtypes |= {name: value.dtype for name, value in entries.items()}
        self.add(self.sums, entries)

    def before(self) -> Params:
        """Tensors of the names and shapes of the contributions so far; empty before the first."""
        return self.one or self.sums

    def measured(self, with_score: bool) -> Measured:
        """What training has added so far, kept for `back_to`; the score, of the model's size, if asked."""
        score = {name: total.clone() for name, total in self.score.items()} if with_score else self.score
        metrics = {name: total.clone() for name, total in self.metrics.items()}
        lost = {reason: list(clients) for reason, clients in self.lost.items()}
        return Measured(metrics, score, self.steps_weight, lost)

    def back_to(self, kept: Measured) -> None:
        """Forgets what training added since."""
        self.metrics, self.score, self.steps_weight, self.lost = kept

    def tensors(self) -> Iterator[Tensor]:
        """Every sum, in an order that all workers share."""
        for group in (self.sums, self.buffers, self.score, self.metrics):
            yield from group.values()

    def form(self) -> list[Any] | None:
        """Names and shapes of every sum, and the types of contributions; None if nobody has contributed.

        Of contributions that stay apart, those of one.
        """
        if not self.before():
            return None
        groups = (self.sums, self.buffers, self.score, self.metrics)
        shapes = [{name: tuple(value.shape) for name, value in group.items()} for group in groups]
        one = {name: (tuple(value.shape), value.dtype) for name, value in self.one.items()}
        return [shapes, self.dtypes, next(iter(self.metrics.values())).device.type, one]

    def take_measured(self, other: Uploads) -> None:
        """Adds the metrics that were measured apart."""
        self.add(self.metrics, other.metrics)
        self.steps_weight += other.steps_weight

    def take_form(self, form: list[Any]) -> None:
        """Sums of nobody: zeros of another's form."""
        shapes, self.dtypes, kind, one = form
        self.one = {
            name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in one.items()
        }
        device = torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)
        for group, wanted in zip((self.sums, self.buffers, self.score, self.metrics), shapes, strict=True):
            for name, shape in wanted.items():
                group[name] = torch.zeros(shape, dtype=torch.float64, device=device)

    def contributions(self) -> Params:
        """The sums of contributions, or all of them stacked, in the types that clients sent."""
        return self.stacked or {
            name: total.to(self.dtypes[name], memory_format=torch.contiguous_format)
            for name, total in self.sums.items()
        }

    def mean_score(self) -> Params:
        """The clients' scores, averaged by samples."""
        return {
            name: (total / self.samples).to(torch.float32, memory_format=torch.contiguous_format)
            for name, total in self.score.items()
        }
