"""Optimiser steps that honour a mask: pure functions, the same under a loop and under vmap."""

from __future__ import annotations

import torch
from torch import Tensor

from .functional import is_stacked
from .state import Masks, Params


def zeros(params: Params) -> Params:
    """A zero for every parameter: fresh momentum."""
    return {name: torch.zeros_like(p) for name, p in params.items()}


def sgd(
    params: Params,
    grads: Params,
    state: dict[str, Params],
    trainable: Masks,
    lr: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
) -> tuple[Params, dict[str, Params]]:
    """One step of g ← g + λw; v ← μv + g; w ← w - η·v on the trainable entries; others keep their bits.

    With `nesterov` w moves by g + μv instead of v, as in torch.optim.SGD; without momentum by the same.
    The momentum buffer `state["momentum"]` covers masked entries too (FedDST code; harmless, because the
    engine clears it where a client grows, and it starts afresh each round). `trainable` lists only tensors
    with entries that must not move. Returns parameters and state.
    """
    names = list(params)
    step = _elementwise if is_stacked(grads) or is_stacked(params) else _foreach
    velocity = [state["momentum"][name] for name in names] if momentum else None
    moved, velocity = step(
        [params[name] for name in names],
        [grads[name] for name in names],
        velocity,
        [trainable.get(name) for name in names],
        lr,
        momentum,
        weight_decay,
        nesterov,
    )
    new_state = (
        {**state, "momentum": dict(zip(names, velocity, strict=True))} if velocity is not None else state
    )
    return dict(zip(names, moved, strict=True)), new_state


Tensors = list[Tensor]


def _foreach(
    params: Tensors,
    grads: Tensors,
    velocity: Tensors | None,
    trainable: list[Tensor | None],
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
) -> tuple[Tensors, Tensors | None]:
    """All tensors in a few fused calls; writes only into tensors made here."""
    if weight_decay:
        grads = list(torch._foreach_add(grads, params, alpha=weight_decay))
    if velocity is not None:
        velocity = list(torch._foreach_mul(velocity, momentum))
        torch._foreach_add_(velocity, grads)
    direction = grads if velocity is None else velocity
    if velocity is not None and nesterov:
        direction = list(torch._foreach_add(grads, velocity, alpha=momentum))
    masked = [
        d if mask is None else d * mask.view(torch.uint8)  # on CPUs three times as fast as by bools
        for d, mask in zip(direction, trainable, strict=True)
    ]
    if isinstance(lr, Tensor):  # a rate that a part computed stays on the device
        return list(torch._foreach_add(params, torch._foreach_mul(masked, -lr))), velocity
    return list(torch._foreach_add(params, masked, alpha=-lr)), velocity


def _elementwise(
    params: Tensors,
    grads: Tensors,
    velocity: Tensors | None,
    trainable: list[Tensor | None],
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
) -> tuple[Tensors, Tensors | None]:
    """Tensor by tensor, for vmap, which has no foreach."""
    if weight_decay:
        grads = [g + weight_decay * p for g, p in zip(grads, params, strict=True)]
    if velocity is not None:
        velocity = [momentum * v + g for v, g in zip(velocity, grads, strict=True)]
    direction = grads if velocity is None else velocity
    if velocity is not None and nesterov:
        direction = [g + momentum * v for v, g in zip(velocity, grads, strict=True)]
    moved = [
        p + (-lr * d if mask is None else -lr * d * mask)
        for p, d, mask in zip(params, direction, trainable, strict=True)
    ]
    return moved, velocity
