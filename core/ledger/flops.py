"""FLOPs of training, from the MACs of each layer and the densities of its mask.

Convention: a multiply-accumulate (MAC) is 2 FLOPs. For each training sample and each layer, forward costs
2·MAC·density, the input gradient the same (in the first layer too), the weight gradient 2·MAC·(trainable
density); density counts active weights, trainable density those of them that are not frozen, and a layer
without a mask has density 1. A method whose passes use fewer weights of a layer than its mask has, or fewer
of its inputs in the weight gradient, says so by a `PassDensity`: the first replaces the density of the
forward pass and the input gradient, the second multiplies the weight gradient. A dense gradient that a grow
score asks for costs, for each of its samples, a forward pass and an input gradient as above and a weight
gradient of 2·MAC. Layers without MACs of their own (normalisation, activations, pooling), biases and
optimiser steps count nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from .messages import Count

PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers of which each output takes one MAC for each weight of its row or filter."""


class PassDensity(NamedTuple):
    """What a step computes of a layer, as fractions in [0, 1]."""

    weights: float
    """of its weights that its output and the gradient of its inputs use"""
    inputs: float = 1.0
    """of its inputs that the gradient of its weights uses"""


PassDensities = Callable[[Mapping[str, float]], Mapping[str, PassDensity]]
"""From the densities of layers to what a step computes, for layers of which it is less than that."""


class Cost(NamedTuple):
    """FLOPs of one sample: of a training step, and of the dense gradient of a grow score."""

    step: float
    score: float


def forward_macs(model: nn.Module, input_shape: Iterable[int], prunable: Iterable[str]) -> dict[str, float]:
    """MACs of one image's forward pass by weight parameter, as `named_parameters` names them.

    `input_shape` is one image's, without the batch. All weights of convolutions and linear layers are
    there, and every name in `prunable` (0 if it takes part in no matrix product). Measured on a copy in
    evaluation mode: `model` and the random state stay as they are.
    A module with several weights (attention) shares its MACs in proportion to their sizes.
    """
    plain = all(type(module) in PLAIN for module in _with_weights(model))
    # names and ties are the original's: moving to the meta device unties tied weights
    names = {id(param): name for name, param in model.named_parameters()}
    macs = dict.fromkeys(prunable, 0.0)
    for path, own in (_by_shapes if plain else _by_counter)(model, input_shape).items():
        weights = [p for p in model.get_submodule(path).parameters(recurse=False) if p.dim() >= 2]
        size = sum(p.numel() for p in weights)
        for param in weights:
            name = names[id(param)]
            macs[name] = macs.get(name, 0.0) + own * (param.numel() / size)
    return macs


def _with_weights(model: nn.Module) -> Iterator[nn.Module]:
    """Modules that have matrices, or tensors of more dimensions, of their own."""
    return (m for m in model.modules() if any(p.dim() >= 2 for p in m.parameters(recurse=False)))


def _by_shapes(model: nn.Module, input_shape: Iterable[int]) -> dict[str, float]:
    """MACs by path of plain layers, by the shapes that they put out for one image of zeros.

    The counter and the meta device would do, but take two seconds to import.
    """
    twin = copy.deepcopy(model).eval()
    device = next(twin.parameters()).device
    macs: dict[str, float] = {}

    def count(path: str, module: nn.Module, output: Tensor) -> None:
        weight = cast(Tensor, module.weight)
        macs[path] = macs.get(path, 0.0) + output.numel() * weight[0].numel()

    for path, module in twin.named_modules():
        if type(module) in PLAIN:
            module.register_forward_hook(lambda module, _, output, path=path: count(path, module, output))
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        twin(torch.zeros(1, *input_shape, device=device))
    return macs


def _by_counter(model: nn.Module, input_shape: Iterable[int]) -> dict[str, float]:
    """MACs by path of every module that has weights of its own and computes products, by torch's counter.

    Nothing is computed: it runs on the meta device.
    """
    from torch.utils.flop_counter import FlopCounterMode

    twin = copy.deepcopy(model).to("meta").eval()
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        twin(torch.empty(1, *input_shape, device="meta"))
    flops = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    root = type(twin).__name__

    def total(path: str) -> int:
        return flops.get(f"{root}.{path}" if path else root, 0)

    macs: dict[str, float] = {}
    # a module that is reached by two paths is counted under one of them: add up both
    for path, module in model.named_modules(remove_duplicate=False):
        children = (f"{path}.{child}" if path else child for child, _ in module.named_children())
        own = total(path) - sum(map(total, children))
        if own and any(p.dim() >= 2 for p in module.parameters(recurse=False)):
            macs[path] = own / 2
    return macs


def training_cost(
    macs: Mapping[str, float],
    counts: Mapping[str, Count],
    sizes: Mapping[str, int],
    passes: PassDensities | None = None,
) -> Cost:
    """FLOPs a sample, by the convention of this module.

    `counts` as `messages.count` gives them; `sizes` are the positions of each parameter.
    """
    used = passes({name: sum(counts[name]) / sizes[name] for name in macs}) if passes else {}
    step = score = 0.0
    for name, mac in macs.items():
        live, still = counts[name]
        # product before quotient: MACs are a multiple of the weights, so that the result is a whole number
        active, trainable = mac * (live + still) / sizes[name], mac * live / sizes[name]
        if name in used:
            active, trainable = mac * used[name].weights, trainable * used[name].inputs
        step += 2 * (2 * active + trainable)
        score += 2 * (2 * active + mac)
    return Cost(step, score)
