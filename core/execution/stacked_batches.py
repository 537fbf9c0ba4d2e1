"""The minibatches of stacked clients: an epoch's samples in a row, gathered by the step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ..data.dataset import taken
from ..layout import Layout
from ..state import Batch
from ..transfer import to_device
from .step import IGNORED


@dataclass(frozen=True)
class StackedBatches:
    """One local epoch of clients that have ever fewer samples, `counts`, from `starts` on in `samples`.

    What a step launches on the device does not depend on how many clients take it.
    """

    samples: Batch
    starts: np.ndarray
    counts: np.ndarray
    batch_size: int
    layout: Layout

    @classmethod
    def of(cls, samples: Batch, counts: Sequence[int], batch_size: int, layout: Layout) -> StackedBatches:
        """`samples` are those of one client after another."""
        ends = np.cumsum(counts)
        return cls(samples, ends - counts, np.array(counts), batch_size, layout)

    @property
    def steps(self) -> int:
        """Steps of the client with the most samples."""
        return -(-int(self.counts[0]) // self.batch_size)

    def sizes(self, index: int) -> list[int]:
        """Samples of each client that takes the step: those that still train are the first ones."""
        left = self.counts - index * self.batch_size
        return [min(int(count), self.batch_size) for count in left if count > 0]

    def stacked(self, index: int, begin: int, end: int) -> Batch:
        """A step's inputs (clients, size, …) and targets (clients, size), filled up where one is short."""
        sizes = np.array(self.sizes(index)[begin:end])
        place = np.arange(sizes.max())
        short = place >= sizes[:, None]
        first = self.starts[begin:end, None] + index * self.batch_size
        chosen = to_device(np.where(short, first, first + place).reshape(-1), self.samples.targets.device)
        inputs = taken(self.samples.inputs, chosen)
        targets = self.samples.targets.index_select(0, chosen).view(short.shape)
        if short.any():
            targets = torch.where(to_device(short, targets.device), IGNORED, targets)
        return Batch(self.layout.stacked(inputs.view(*short.shape, *inputs.shape[1:])), targets)

    def one(self, client: int) -> list[Batch]:
        """A client's own minibatches, in the run's layout."""
        rows = slice(self.starts[client], self.starts[client] + self.counts[client])
        own = Batch(self.layout.arrange(self.samples.inputs[rows]), self.samples.targets[rows])
        return own.split(self.batch_size)

    def only(self, places: Sequence[int]) -> StackedBatches:
        """The epoch of some of the clients."""
        return replace(self, starts=self.starts[places], counts=self.counts[places])
