"""Batch normalisation of a minibatch of one sample, as clients with a sample too many have them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class OneSample(TorchFunctionMode):
    """Normalises channels of a single value by their running statistics, which stay as they are.

    One value has no variance, and PyTorch refuses to train on it; every other channel is left to PyTorch. A
    layer without running statistics still raises PyTorch's ValueError.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        return self.normalised(*args, **given) if func is functional.batch_norm else func(*args, **given)

    def normalised(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        """`torch.nn.functional.batch_norm`, of `input` (1, channels, …)."""
        if running_mean is not None and input.numel() == input.shape[1]:
            training = False
        return functional.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
