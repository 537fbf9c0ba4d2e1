"""Budgets: how many weights of each layer may be active at a given sparsity."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Literal, get_args

Allocation = Literal["scaled", "scaled-er", "scaled-uniform", "uniform", "er", "erk", "global"]
ALLOCATIONS: tuple[str, ...] = get_args(Allocation)
Kernel = Literal["erk", "er", "uniform"]


@dataclass(frozen=True)
class Layer:
    """A prunable tensor: its name, shape, and the number of unmasked biases of the same module."""

    name: str
    shape: tuple[int, ...]
    biases: int = 0

    @property
    def weights(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Budget:
    """Active weights allowed at `sparsity` (fraction of prunable weights that are zero, in [0, 1)).

    `counts` by layer name, or None under "global" allocation, where only `total` is fixed.
    """

    layers: tuple[Layer, ...]
    allocation: Allocation
    sparsity: float

    def at(self, sparsity: float) -> Budget:
        """The budget of the same network and rule at another sparsity."""
        return replace(self, sparsity=sparsity)

    @cached_property
    def weights(self) -> int:
        """Number of prunable weights N."""
        return sum(layer.weights for layer in self.layers)

    @cached_property
    def counts(self) -> Mapping[str, int] | None:
        if self.allocation == "global":
            return None
        return dict(
            zip(
                [layer.name for layer in self.layers],
                _RULES[self.allocation](self.layers, self.sparsity),
                strict=True,
            )
        )

    @cached_property
    def total(self) -> int:
        if self.counts is None:
            return max(1, round((1 - self.sparsity) * self.weights))
        return sum(self.counts.values())


def scaled_raw(layers: Sequence[Layer], sparsity: float, kernel: Kernel = "erk") -> list[int]:
    """K_l = floor((1 - c·raw_l)·m_l) before any clipping, which can leave [1, n_l] (FedDST code).

    The layer *sparsity* is proportional to raw = 1 - (o+i+kh+kw)/(o·i·kh·kw), without the kernel terms for
    "er" and 1 for "uniform"; m_l counts weights and biases; c makes the m-weighted mean the target.
    """
    return _scaled(layers, sparsity, kernel, held={})


def scaled(layers: Sequence[Layer], sparsity: float, kernel: Kernel = "erk") -> list[int]:
    """`scaled_raw`, clipped to [1, n_l], with c solved again over the layers that were not clipped."""
    held: dict[int, int] = {}
    while True:
        counts = _scaled(layers, sparsity, kernel, held)
        clipped = {
            index: min(max(count, 1), layers[index].weights)
            for index, count in enumerate(counts)
            if index not in held and not 1 <= count <= layers[index].weights
        }
        if not clipped:
            return counts
        held |= clipped


def _scaled(layers: Sequence[Layer], sparsity: float, kernel: Kernel, held: Mapping[int, int]) -> list[int]:
    sizes = [layer.weights + layer.biases for layer in layers]
    raws = [_propensity(layer.shape, kernel) for layer in layers]
    free = [index for index in range(len(layers)) if index not in held]
    removed = sum(sizes[index] - count for index, count in held.items())
    spread = sum(raws[index] * sizes[index] for index in free)
    c = (sparsity * sum(sizes) - removed) / spread if spread else 0.0
    return [
        held[index] if index in held else math.floor((1 - c * raw) * size)
        for index, (raw, size) in enumerate(zip(raws, sizes, strict=True))
    ]


def _propensity(shape: Sequence[int], kernel: Kernel) -> float:
    if kernel == "uniform":
        return 1.0
    kept = shape if kernel == "erk" else shape[:2]
    return 1 - sum(kept) / math.prod(kept)


def uniform(layers: Sequence[Layer], sparsity: float) -> list[int]:
    """The same density in every layer, rounded so that the total is exact."""
    return _apportion(layers, [1 - sparsity] * len(layers), sparsity)


def erdos_renyi(layers: Sequence[Layer], sparsity: float, kernel: Kernel) -> list[int]:
    """Density proportional to (o+i+kh+kw)/(o·i·kh·kw), clipped at 1 (SET; RigL, section 3).

    `er` leaves out the kernel terms. Layers that would exceed density 1 stay dense, the rest is solved
    again; the total is exact.
    """
    factors = [1 - _propensity(layer.shape, kernel) for layer in layers]
    dense: set[int] = set()
    while True:
        free = [index for index in range(len(layers)) if index not in dense]
        left = (1 - sparsity) * sum(layer.weights for layer in layers)
        left -= sum(layers[index].weights for index in dense)
        spread = sum(factors[index] * layers[index].weights for index in free)
        epsilon = max(left, 0.0) / spread if spread else 0.0
        over = {index for index in free if epsilon * factors[index] > 1}
        if not over:
            break
        dense |= over
    densities = [1.0 if index in dense else epsilon * factors[index] for index in range(len(layers))]
    return _apportion(layers, densities, sparsity)


def _apportion(layers: Sequence[Layer], densities: Sequence[float], sparsity: float) -> list[int]:
    """Integer counts in [1, n_l] near density·n_l that add up to round((1 - sparsity)·N)."""
    ideal = [density * layer.weights for density, layer in zip(densities, layers, strict=True)]
    counts = [min(max(math.floor(x), 1), layer.weights) for x, layer in zip(ideal, layers, strict=True)]
    missing = max(round((1 - sparsity) * sum(layer.weights for layer in layers)), len(layers)) - sum(counts)
    while missing:
        step = 1 if missing > 0 else -1
        movable = [i for i, layer in enumerate(layers) if 1 <= counts[i] + step <= layer.weights]
        movable.sort(key=lambda i: step * (counts[i] - ideal[i]))
        for index in movable[: abs(missing)]:
            counts[index] += step
            missing -= step
    return counts


_RULES: dict[str, Callable[[Sequence[Layer], float], list[int]]] = {
    "scaled": scaled,
    "scaled-er": partial(scaled, kernel="er"),
    "scaled-uniform": partial(scaled, kernel="uniform"),
    "uniform": uniform,
    "er": partial(erdos_renyi, kernel="er"),
    "erk": partial(erdos_renyi, kernel="erk"),
}
