"""Dropout from keyed streams: the same draws in a loop over clients, under vmap, and on any worker."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from . import rng
from .selection import readable

WHOLE_CHANNELS = (functional.dropout1d, functional.dropout2d, functional.dropout3d)


def drops(model: nn.Module, input_shape: Sequence[int]) -> bool:
    """Whether a model drops anything in training; found by a pass of a copy over two images of zeros."""
    twin = copy.deepcopy(model).train()
    device = next(twin.parameters()).device
    untouched = torch.random.fork_rng([device] if device.type == "cuda" else [])
    with untouched, torch.no_grad(), KeyedDropout(torch.tensor(0, device=device)) as mode:
        twin(torch.zeros(2, *input_shape, device=device))
        return bool(mode.calls)


class KeyedDropout(TorchFunctionMode):
    """Replaces the draws of dropout layers, in training mode, by those of a key; one stream a call."""

    def __init__(self, key: Tensor) -> None:
        super().__init__()
        self.key, self.calls = key, 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is functional.dropout or func in WHOLE_CHANNELS:
            return self.dropout(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def dropout(
        self,
        func: Callable[..., Tensor],
        input: Tensor,
        p: float = 0.5,
        training: bool = True,
        inplace: bool = False,
    ) -> Tensor:
        """The input with entries, or whole channels, dropped with probability `p`, and others scaled."""
        if not training or p == 0.0:
            return input
        shape = input.shape
        if func in WHOLE_CHANNELS:  # (b, c, …)
            shape = torch.Size([*shape[:2], *(1 for _ in shape[2:])])
        self.calls += 1
        if p == 1.0:
            return torch.zeros_like(input)
        kept = rng.above(rng.fold(self.key, self.calls), shape, p)
        if readable(input) and input.dtype == torch.float32:  # half the time, four times the memory
            return input * kept.to(input.dtype).mul_(1 / (1 - p))
        return torch.where(kept, input * (1 / (1 - p)), 0.0)
