"""The vocabulary of tensors and records that hooks take and return."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Params = dict[str, Tensor]
"""Trainable tensors by name, as `module.named_parameters()` names them."""

Masks = dict[str, Tensor]
"""bool tensors by parameter name, of the parameter's shape; True = the weight exists (or is frozen)."""

Scores = dict[str, Tensor]
"""A score a weight, larger is better, for each prunable parameter."""

Sums = dict[str, Tensor]
"""What `contribute` returns; the engine adds these over clients, or stacks them, clients first."""

Memory = dict[str, Any]
"""A part's own tensors and plain values; checkpointed."""


class Batch(NamedTuple):
    """One minibatch on the device: `inputs` float (b, …) normalised, `targets` int64 (b,)."""

    inputs: Tensor
    targets: Tensor

    def split(self, size: int) -> list[Batch]:
        """Minibatches of `size` samples; the last may be short."""
        parts = zip(torch.split(self.inputs, size), torch.split(self.targets, size), strict=True)
        return [Batch(inputs, targets) for inputs, targets in parts]


class Carry(NamedTuple):
    """What a client carries from step to step besides its parameters.

    `buffers` are the model's (running statistics); `state` holds optimiser state by name, each a dict of
    tensors by parameter name, so that the engine can clear the entries of weights that were rewired.
    """

    buffers: Params
    state: dict[str, Params]


class Clock(NamedTuple):
    """Where the run is: `round` of `rounds` (from 0) and, on a client, `epoch` of `epochs` completed."""

    round: int
    rounds: int
    epoch: int = 0
    epochs: int = 1


class Stepped(NamedTuple):
    """Result of `local_step`; `metrics` are 0-d tensors, averaged over the round weighted by samples."""

    params: Params
    carry: Carry
    metrics: dict[str, Tensor]


class Uploaded(NamedTuple):
    """Result of `upload`: what a client sends, and what it counts in the aggregate, 0-d."""

    params: Params
    weight: Tensor


class Measured(NamedTuple):
    """Result of `round_metrics`: numbers by name for the round's record, and the part's memory."""

    metrics: dict[str, float]
    memory: Memory


class Best(NamedTuple):
    """The evaluated global model of best `client_accuracy` so far."""

    round: int
    accuracy: float
    params: Params
    buffers: Params
    mask: Masks


class Frozen(NamedTuple):
    """Result of `freeze`: what may no longer change, the mask with it (growth), the part's memory.

    `params` and `buffers` replace the global model's if given: a freeze policy that goes back to `best`.
    """

    frozen: Masks
    mask: Masks
    memory: Memory
    params: Params | None = None
    buffers: Params | None = None


class Readjusted(NamedTuple):
    """Result of `readjust`: values and mask belong together; a weight drawn anew restarts at 0."""

    params: Params
    mask: Masks
    memory: Memory


class Aggregated(NamedTuple):
    """Result of `aggregate`: the next global model."""

    params: Params
    mask: Masks
    memory: Memory


@dataclass
class ServerState:
    """Everything a run needs to go on: the same numbers on every worker.

    `mask` covers every prunable parameter; `frozen` covers those, and any unprunable parameter that a
    freeze policy named. `memory` is by slot, `rows` by client id (on the host).
    """

    round: int
    params: Params
    buffers: Params
    mask: Masks
    frozen: Masks
    memory: dict[str, Memory] = field(default_factory=dict)
    rows: dict[int, Memory] = field(default_factory=dict)

    def copy(self) -> ServerState:
        """A state that can move on without changing this one; tensors are shared, they are never written."""
        return replace(self, memory=dict(self.memory), rows=dict(self.rows))


class Report(NamedTuple):
    """One finished round: its line of `metrics.jsonl` and the state after it, to read only.

    `stop` tells every worker that one of them was asked to end the run here.
    """

    metrics: dict[str, Any]
    state: ServerState
    stop: bool = False


def moved_to(memory: Any, device: torch.device | str, copy: bool = False) -> Any:
    """The same nested dict with its tensors on a device. `copy` owns all of them."""
    if isinstance(memory, Tensor):
        return memory.detach().to(device, copy=copy)
    if isinstance(memory, dict):
        return {name: moved_to(value, device, copy) for name, value in memory.items()}
    return memory


def row_on(device: torch.device | str, row: Memory, copy: bool = False) -> Memory:
    """A client's row on a device; rows rest on the host. `copy` owns all of its tensors.

    To or from a GPU its tensors are sent as one of a type, so that the host waits once, not for each.
    """
    if not row:
        return {}
    leaves, form = pytree.tree_flatten(row)
    device, together = torch.device(device), dict[torch.dtype, list[int]]()
    for at, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.device.type != device.type and leaf.is_contiguous():
            together.setdefault(leaf.dtype, []).append(at)
    for places in together.values():
        gpu, sizes = device.type == "cuda", [leaves[at].numel() for at in places]
        flat = torch.cat([leaves[at].detach().reshape(-1) for at in places])
        sent = (flat.pin_memory() if gpu else flat).to(device, non_blocking=gpu)
        for at, part in zip(places, torch.split(sent, sizes), strict=True):
            leaves[at] = part.view(leaves[at].shape)
    sent_row: Memory = moved_to(pytree.tree_unflatten(leaves, form), device, copy)
    return sent_row
