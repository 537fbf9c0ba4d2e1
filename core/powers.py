"""Powered weights, sign(θ)·|θ|^β: on host memory by numpy where that takes a third of torch's time."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .functional import is_stacked
from .recording import operation
from .selection import readable
from .state import Params


def with_slopes(params: Params, exponents: Params) -> tuple[Params, Params]:
    """θ·|θ|^(β-1) and its derivative β·|θ|^(β-1) for each θ with an exponent β (0-d, 1 or more).

    Where β is 1 the derivative is 1, at 0 too. Neither has a gradient of its own. A fourth root may differ
    from torch's in its last bit.
    """
    thetas = [params[name] for name in exponents]
    if thetas and is_stacked(params) and thetas[0].is_cpu and not torch.compiler.is_compiling():
        made = _Stacked.apply(*thetas, *exponents.values())
        found = made[: len(thetas)], made[len(thetas) :]
    else:
        found = _with_slopes(thetas, list(exponents.values()))
    weights, slopes = (dict(zip(exponents, each, strict=True)) for each in found)
    return weights, slopes


@operation
def _with_slopes(thetas: list[Tensor], exponents: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Of one client, or of stacked ones with an exponent each."""
    by_numpy = readable(*thetas, *exponents)
    both = [
        _fourth_roots(theta.detach().numpy())
        if by_numpy and theta.dtype == torch.float32 and _all(exponent, 1.25)
        else _powers(theta, exponent)
        for theta, exponent in zip(thetas, exponents, strict=True)
    ]
    return [weight for weight, _ in both], [slope for _, slope in both]


def _powers(theta: Tensor, exponent: Tensor) -> tuple[Tensor, Tensor]:
    exponent = exponent.view(exponent.shape + (1,) * (theta.dim() - exponent.dim()))
    powers = theta.abs().pow(exponent - 1)
    return theta * powers, powers * exponent


def _fourth_roots(values: np.ndarray[Any, Any]) -> tuple[Tensor, Tensor]:
    """`_powers` for the exponent 1.25; torch's square root is several times slower where many are 0."""
    root = np.abs(values)
    np.sqrt(np.sqrt(root, out=root), out=root)
    weight = values * root
    return torch.from_numpy(weight), torch.from_numpy(np.multiply(root, np.float32(1.25), out=root))


def _all(exponent: Tensor, value: float) -> bool:
    """Whether this is every client's exponent; quick where there is one, as for each small layer."""
    return bool((exponent == value).all() if exponent.dim() else exponent.item() == value)


class _Stacked(torch.autograd.Function):
    """`_with_slopes` of stacked clients on a CPU, θ and exponents one after another; has no gradient."""

    @staticmethod
    def forward(*tensors: Tensor) -> tuple[Tensor, ...]:
        count = len(tensors) // 2
        weights, slopes = _with_slopes(list(tensors[:count]), list(tensors[count:]))
        return (*weights, *slopes)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *tensors: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        rows = [
            t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
            for t, dim in zip(tensors, in_dims, strict=True)
        ]
        return _Stacked.apply(*rows), (0,) * len(tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        return (None,) * len(grads)


def chained(grads: Params, slopes: Params) -> Params:
    """Gradients by θ from those by the weights, for those with a slope; writes into `grads`."""
    if is_stacked(grads):
        return grads | {name: grads[name] * slope for name, slope in slopes.items()}
    if slopes:
        torch._foreach_mul_([grads[name] for name in slopes], list(slopes.values()))
    return grads
