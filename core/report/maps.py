"""Pictures in which colour is a number: layers by rounds, masks by masks, labels by clients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .. import clients, mask_history
from ..results import Result, numbers
from .columns import Group
from .picture import SMALL, WIDTH, Picture, balanced, canvas, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Matrix = NDArray[np.float64]

SEQUENTIAL = "viridis"  # even steps of lightness, for readers with any colour vision and for grey print
FROM_WHITE = "Blues"
STEPS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
TITLE = {1: 56, 2: 32, 3: 22}  # characters of a line above a map, by columns
MEAN = "Means over seeds, where there are several."


@dataclass(frozen=True)
class Rounds:
    """A group's mean density, (layers, rounds)."""

    name: str
    layers: tuple[str, ...]
    density: Matrix


def density(groups: Sequence[Group]) -> Picture | str:
    """The density of each layer over rounds, a map a group; or why there is none."""
    drawn = [found for group in groups if (found := _density(group)) is not None]
    if not drawn:
        return "Density by layer: no run has recorded it."
    alike = len({one.layers for one in drawn}) == 1
    columns = 2 if alike and len(drawn) > 1 else 1
    rows = math.ceil(len(drawn) / columns)
    lines = max(len(wrap(one.name, TITLE[columns])) for one in drawn)
    heights = [max(0.9, 0.15 * len(one.layers)) for one in drawn[::columns]]
    with canvas(rows * (0.65 + 0.15 * lines) + sum(heights)) as figure:
        from matplotlib.colors import LogNorm
        from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

        axes = figure.subplots(rows, columns, squeeze=False, sharey=alike, height_ratios=heights)
        values = np.concatenate([one.density.ravel() for one in drawn])
        least = values[values > 0].min(initial=1.0)
        low = max((step for step in STEPS[:-1] if step <= least), default=STEPS[0])
        norm = LogNorm(low, 1, clip=True)
        for number, (one, axis) in enumerate(zip(drawn, axes.flat, strict=False)):
            played = one.density.shape[1]
            extent = (0.5, played + 0.5, len(one.layers) - 0.5, -0.5)
            image = _map(axis, one.density, norm=norm, extent=extent, aspect="auto")
            axis.set_title("\n".join(wrap(one.name, TITLE[columns])))
            axis.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
            axis.set_yticks(range(len(one.layers)), _short(one.layers), fontsize=SMALL)
            if number + columns >= len(drawn):
                axis.set_xlabel("rounds played")
        bar = figure.colorbar(image, ax=_used(axes, len(drawn)), label="density", aspect=30)
        ticks = [step for step in STEPS if step >= low]
        bar.ax.yaxis.set_major_locator(FixedLocator(ticks))
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        bar.ax.minorticks_off()
        made = png(figure)
    caption = (
        "Active fraction of each layer's weights after each round; colours are spaced by ratio, and a layer "
        f"below the scale has its darkest. {MEAN}"
    )
    return Picture("density", "Density by layer over rounds", caption, made)


def overlap(groups: Sequence[Group]) -> Picture | str:
    """The IoU of each pair of kept masks, a map a group; or why there is none."""
    drawn = [(group.name, *found) for group in groups if (found := _overlap(group)) is not None]
    if not drawn:
        return "Overlap of masks between rounds: no run has kept two masks (output.masks)."
    columns = balanced(len(drawn), 3)
    rows = math.ceil(len(drawn) / columns)
    lines = max(len(wrap(name, TITLE[columns])) for name, _, _ in drawn)
    side = min((WIDTH - 1.3) / columns, 3.6)
    with canvas(rows * (side + 0.15 * lines + 0.1) + 0.4) as figure:
        axes = figure.subplots(rows, columns, squeeze=False)
        # a mask that moves a little shows, too
        low = min(math.floor(min(matrix.min() for _, _, matrix in drawn) * 10) / 10, 0.9)
        for number, ((name, played, matrix), axis) in enumerate(zip(drawn, axes.flat, strict=False)):
            image = _map(axis, matrix, vmin=low, vmax=1, origin="lower")
            axis.set_title("\n".join(wrap(name, TITLE[columns])))
            places = np.unique(np.linspace(0, len(played) - 1, 5).round().astype(int))
            labels = [str(played[place]) for place in places]
            axis.set_xticks(places, labels, fontsize=SMALL)
            axis.set_yticks(places, labels, fontsize=SMALL)
            if number + columns >= len(drawn):
                axis.set_xlabel("rounds played")
            if number % columns == 0:
                axis.set_ylabel("rounds played")
        figure.colorbar(image, ax=_used(axes, len(drawn)), label="mask IoU", aspect=30, shrink=0.8)
        made = png(figure)
    caption = (
        "Intersection over union of the global masks after two numbers of rounds, where both were kept (0 is "
        f"the mask that training began with). The scale begins at {low:g}. {MEAN}"
    )
    return Picture("overlap", "Overlap of masks between rounds", caption, made)


def labels(groups: Sequence[Group]) -> Picture | str:
    """Which labels clients hold, a map a distribution; or why there is none."""
    drawn = _distributions(groups)
    if not drawn:
        return "Labels of clients: no run has recorded them."
    with canvas(3.4 * len(drawn)) as figure:
        parts = figure.subfigures(len(drawn), squeeze=False)[:, 0]
        for part, (names, held) in zip(parts, drawn, strict=True):
            _distribution(part, held, "" if len(drawn) == 1 else ", ".join(names))
        made = png(figure)
    seeds = sorted({group.seeds[0] for group in groups})
    caption = (
        "Train samples of each client, and below them the share of each label in them. Clients stand in the "
        f"order of their most frequent label. Of seed {', '.join(map(str, seeds))}; other seeds deal anew."
    )
    return Picture("clients", "Labels of clients", caption, made)


def _density(group: Group) -> Rounds | None:
    several = [run for run in group.runs if run.rounds and all(map(_layers, run.rounds))]
    if not several:
        return None
    layers = tuple(_layers(several[0].rounds[0]))
    played = min(len(run.rounds) for run in several)

    def matrix(run: Result) -> Matrix:
        recorded = map(_layers, run.rounds[:played])
        return np.array([[of_round.get(layer, np.nan) for layer in layers] for of_round in recorded]).T

    return Rounds(group.name, layers, np.mean([matrix(run) for run in several], axis=0))


def _layers(line: Mapping[str, Any]) -> dict[str, float]:
    """A round's densities by layer; empty if it has none."""
    recorded = line.get("density")
    return dict(numbers(recorded)) if isinstance(recorded, Mapping) else {}


def _overlap(group: Group) -> tuple[list[int], Matrix] | None:
    """The rounds whose masks all of a group's runs with masks have kept, two or more, and the mean IoU."""
    kept = [history for run in group.runs if (history := mask_history.load(run.path))]
    played = sorted(set.intersection(*(set(history) for history in kept))) if kept else []
    if len(played) < 2:
        return None
    matrices = [mask_history.overlaps([history[number] for number in played]) for history in kept]
    return played, np.mean(matrices, axis=0)


def _distributions(groups: Sequence[Group]) -> list[tuple[list[str], clients.Labels]]:
    """The distributions of the groups' first seeds, each once, with the groups that have it."""
    found: list[tuple[list[str], clients.Labels]] = []
    for group in groups:
        held = clients.load(group.runs[0].path)
        if held is None:
            continue
        for names, other in found:
            if other.pool == held.pool and np.array_equal(other.counts, held.counts):
                names.append(group.name)
                break
        else:
            found.append(([group.name], held))
    return found


def _distribution(part: Any, held: clients.Labels, title: str) -> None:
    counts = held.counts
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    order = np.lexsort((-shares.max(axis=1), shares.argmax(axis=1)))
    shown, classes = counts.shape
    above, below = part.subplots(2, height_ratios=(1, 2.4), sharex=True)
    above.bar(range(shown), counts.sum(axis=1)[order], width=1.0, color="#555555")
    above.grid(axis="x", visible=False)
    above.set_ylabel("train\nsamples")
    if title:
        above.set_title("\n".join(wrap(title, TITLE[1])))
    image = _map(below, shares[order].T, vmin=0, vmax=1, aspect="auto", origin="lower", cmap=FROM_WHITE)
    below.set_yticks(range(0, classes, math.ceil(classes / 10)))
    below.set_ylabel("label")
    below.set_xticks([])
    which = f"{shown:,} clients" if shown == held.pool else f"the first {shown:,} of {held.pool:,} clients"
    below.set_xlabel(f"{which}, by most frequent label")
    part.colorbar(image, ax=below, label="share of its samples", aspect=12)


def _map(axis: Axes, matrix: Matrix, **options: Any) -> Any:
    axis.grid(visible=False)
    return axis.imshow(matrix, **{"cmap": SEQUENTIAL, "interpolation": "nearest", **options})


def _used(axes: NDArray[Any], count: int) -> list[Axes]:
    """The first axes of a grid; what it has too many of is taken away."""
    for axis in axes.flat[count:]:
        axis.remove()
    return list(axes.flat[:count])


def _short(layers: Sequence[str]) -> list[str]:
    """Names without the `.weight` that all have."""
    same = all(layer.endswith(".weight") for layer in layers)
    return [layer.removesuffix(".weight") for layer in layers] if same else list(layers)
