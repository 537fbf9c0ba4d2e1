"""Pictures of groups of runs: a line a group, a band of ± one standard deviation over its seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from textwrap import wrap
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import RunError
from ..results import Result
from . import bars, maps
from .columns import Group, column, traffic
from .picture import COLOURS, MEGABYTE, Picture, balanced, canvas, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

DASHES = ("-", (0, (6, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
MARKERS = ("o", "s", "^", "D", "v")  # with colours and dashes, no two of 140 lines look alike
HEIGHT, GAP = 2.9, 0.3  # inches: of one panel, of a line of the legend
LABEL = 65  # characters of a line of the legend
POINTS = 50  # of a line, up to which they are marked
Columns = NDArray[np.float64]


class Figures(NamedTuple):
    """The pictures that runs allow, and of others why they are missing."""

    pictures: tuple[Picture, ...]
    notes: tuple[str, ...]


class Panel(NamedTuple):
    """What one pair of axes shows."""

    label: str
    y: Callable[[Result], Columns]
    limits: tuple[float, float] | None = None
    stepped: bool = True
    """every round has a value of its own; evaluations are points, joined for the eye"""


ROUNDS = "rounds played"
MEGABYTES = "MB sent since the start (up + down, all clients)"
BAND = (
    "Bands: mean ± one sample standard deviation over the seeds, where there are several; a line ends with "
    "the first of its runs."
)


def draw(groups: Sequence[Group]) -> Figures:
    """Every picture that these runs allow.

    Raises RunError where matplotlib is missing, or if a file of a run is damaged.
    """
    require_matplotlib()
    pooled = Panel("test accuracy, pooled", lambda run: column(run, "test_accuracy"), stepped=False)
    clients = Panel("client accuracy, mean", lambda run: column(run, "client_accuracy"), stepped=False)
    sparsity = Panel("sparsity (fraction)", lambda run: column(run, "sparsity"), (0, 1))
    frozen = Panel("frozen fraction", lambda run: column(run, "frozen_fraction"), (0, 1))
    overlap = Panel("mask IoU (0 to 1)", lambda run: column(run, "mask_iou"), (0, 1))
    grown = Panel("regrown fraction", lambda run: column(run, "regrown_fraction"))
    up = Panel("upload, MB a round", lambda run: column(run, "upload_bytes") / MEGABYTE)
    down = Panel("download, MB a round", lambda run: column(run, "download_bytes") / MEGABYTE)
    planned: list[tuple[str, str, str, tuple[Panel, ...], bool]] = [
        (
            "accuracy-rounds",
            "Accuracy against rounds",
            "Fractions, on the pooled test set and as the mean over clients' own; a point an evaluation. "
            f"{BAND}",
            (pooled, clients),
            False,
        ),
        (
            "accuracy-megabytes",
            "Accuracy against megabytes",
            "The same against what all clients have sent and received; a point is the seeds' mean accuracy "
            f"at their mean megabytes. {BAND}",
            (pooled, clients),
            True,
        ),
        (
            "sparsity",
            "Sparsity and frozen weights",
            "Share of the prunable weights that the mask removes, and share of the active ones that no "
            f"longer change. {BAND}",
            (sparsity, frozen),
            False,
        ),
        (
            "masks",
            "How masks move",
            "Intersection over union of the global masks after a round and before it, and regrown weights: "
            f"the share of the active ones that were not active before the round. {BAND}",
            (overlap, grown),
            False,
        ),
        (
            "traffic",
            "Bytes a round",
            f"Of all of a round's clients together. {BAND}",
            (up, down),
            False,
        ),
    ]
    lines = [_lines(groups, *figure) for figure in planned]
    before, after = lines[:-1], lines[-1:]
    made = [*before, maps.density(groups), maps.overlap(groups), *after]
    made += [bars.upload_kinds(groups), maps.labels(groups)]
    return Figures(
        tuple(one for one in made if isinstance(one, Picture)),
        tuple(one for one in made if isinstance(one, str)),
    )


def require_matplotlib() -> None:
    """Raises RunError where it is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise RunError("figures need matplotlib: pip install 'fedsparse[plots]'") from None


def _lines(
    groups: Sequence[Group], name: str, title: str, caption: str, panels: Sequence[Panel], by_bytes: bool
) -> Picture | str:
    """Panels one below the other, a line a group; or why there are none."""
    columns = 1 if max(len(group.name) for group in groups) > 38 else 2
    columns = 3 if all(len(group.name) <= 22 for group in groups) else columns
    columns = balanced(len(groups), columns)
    lines_each = max(len(wrap(group.name, LABEL)) for group in groups)
    height = HEIGHT * len(panels) + GAP * (1 + lines_each * math.ceil(len(groups) / columns))
    with canvas(height) as figure:
        from matplotlib.ticker import MaxNLocator

        axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
        drawn: dict[str, tuple[Line2D, str]] = {}
        for panel, axis in zip(panels, axes, strict=True):
            for number, group in enumerate(groups):
                line = _draw(axis, group, panel, by_bytes, _look(number))
                if line is not None:
                    drawn.setdefault(group.name, line)
            _frame(axis, panel)
        axes[-1].xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10], integer=not by_bytes))
        axes[-1].set_xlabel(MEGABYTES if by_bytes else ROUNDS)
        if not drawn:
            return f"{title}: no run has recorded it."
        lines, labels = zip(*(drawn[group.name] for group in groups if group.name in drawn), strict=True)
        figure.legend(lines, labels, loc="outside lower center", ncols=columns)
        return Picture(name, title, caption, png(figure))


def _draw(
    axis: Axes, group: Group, panel: Panel, by_bytes: bool, look: dict[str, Any]
) -> tuple[Line2D, str] | None:
    """Draws a group's line and band; the line and its label, None if none of its runs has such values."""
    ys = [panel.y(run) for run in group.runs]
    pairs = [(y, run) for y, run in zip(ys, group.runs, strict=True) if np.isfinite(y).any()]
    if not pairs:
        return None
    played = min(len(y) for y, _ in pairs)  # a mean over fewer seeds further on would jump
    values = np.stack([y[:played] for y, _ in pairs])
    held = np.isfinite(values).all(axis=0)
    if not held.any():
        return None
    sent = np.stack([traffic(run)[:played] for _, run in pairs]) / MEGABYTE
    x = (sent.mean(axis=0) if by_bytes else np.arange(1.0, played + 1))[held]
    mean = values[:, held].mean(axis=0)
    step: Any = "mid" if panel.stepped else None
    marked = x.size == 1 or (not panel.stepped and x.size <= POINTS)
    style = look if marked else {**look, "marker": ""}
    (line,) = axis.plot(x, mean, drawstyle="steps-mid" if panel.stepped else "default", **style)
    if len(pairs) > 1:
        spread, colour = values[:, held].std(axis=0, ddof=1), look["color"]
        axis.fill_between(x, mean - spread, mean + spread, step=step, color=colour, alpha=0.18, linewidth=0)
    label = group.name if len(pairs) == 1 else f"{group.name}, {len(pairs)} seeds"
    return line, "\n".join(wrap(label, LABEL))


def _frame(axis: Axes, panel: Panel) -> None:
    axis.set_ylabel(panel.label)
    if panel.limits is not None:
        low, high = panel.limits
        axis.set_ylim(low - 0.03, high + 0.03)
    else:
        axis.set_ylim(0, axis.get_ylim()[1] * 1.02)
    axis.set_xlim(left=0)


def _look(number: int) -> dict[str, Any]:
    looks = {"color": COLOURS, "linestyle": DASHES, "marker": MARKERS}
    return {name: choices[number % len(choices)] for name, choices in looks.items()}
