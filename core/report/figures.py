"""Pictures of groups of runs: a line a group, a band of ± one standard deviation over its seeds."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from textwrap import wrap
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import RunError
from ..results import Result
from .columns import Group, column, traffic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

# Okabe and Ito's, which readers with any colour vision can tell apart; without their yellow, faint on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", (0, (6, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
MARKERS = ("o", "s", "^", "D", "v")  # with colours and dashes, no two of 140 lines look alike
WIDTH, HEIGHT, GAP = 7.0, 2.9, 0.3  # inches: of a page's column, of one panel, of a line of the legend
DPI = 160
LABEL = 65  # characters of a line of the legend
POINTS = 50  # of a line, up to which they are marked
MEGABYTE = 1e6
Columns = NDArray[np.float64]


@dataclass(frozen=True)
class Picture:
    """A PNG with what is said of it."""

    name: str
    title: str
    caption: str
    png: bytes


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


def draw(groups: Sequence[Group]) -> tuple[Picture, ...]:
    """Every picture that the metrics of these runs allow. Raises RunError where matplotlib is missing."""
    require_matplotlib()
    accuracy = Panel("test accuracy (fraction)", lambda run: column(run, "test_accuracy"), stepped=False)
    sparsity = Panel("sparsity (fraction)", lambda run: column(run, "sparsity"), (0, 1))
    frozen = Panel("frozen fraction", lambda run: column(run, "frozen_fraction"), (0, 1))
    overlap = Panel("mask IoU (0 to 1)", lambda run: column(run, "mask_iou"), (0, 1))
    grown = Panel("regrown fraction", regrown, (0, 1))
    up = Panel("upload, MB a round", lambda run: column(run, "upload_bytes") / MEGABYTE)
    down = Panel("download, MB a round", lambda run: column(run, "download_bytes") / MEGABYTE)
    planned: list[tuple[str, str, str, tuple[Panel, ...], bool]] = [
        (
            "accuracy-rounds",
            "Test accuracy against rounds",
            f"On the pooled test set, a point an evaluation. {BAND}",
            (accuracy,),
            False,
        ),
        (
            "accuracy-megabytes",
            "Test accuracy against megabytes",
            "The same against what all clients have sent and received; a point is the seeds' mean accuracy "
            f"at their mean megabytes. {BAND}",
            (accuracy,),
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
            "Intersection over union of the masks after a round and before it, and the share of the active "
            f"weights that were not active before it. {BAND}",
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
    pictures = []
    for name, title, caption, panels, by_bytes in planned:
        png = _png(groups, panels, by_bytes)
        if png:
            pictures.append(Picture(name, title, caption, png))
    return tuple(pictures)


def require_matplotlib() -> None:
    """Raises RunError where it is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise RunError("figures need matplotlib: pip install 'fedsparse[plots]'") from None


def regrown(run: Result) -> Columns:
    """Share of the active weights that were not active a round before; NaN in round 0.

    With the densities d and d' now and before, and the masks' intersection over union J, the weights that
    stayed are (d + d') · J / (1 + J) of the prunable ones.
    """
    density, overlap = 1 - column(run, "sparsity"), column(run, "mask_iou")
    before = np.concatenate([[np.nan], density])[: len(density)]
    with np.errstate(divide="ignore", invalid="ignore"):
        share = 1 - (density + before) * overlap / (1 + overlap) / density
    return np.asarray(np.where(density > 0, np.clip(share, 0, 1), np.nan))


def _png(groups: Sequence[Group], panels: Sequence[Panel], by_bytes: bool) -> bytes | None:
    """The drawn panels, one below the other; None if no run has what they show."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    columns = 1 if max(len(group.name) for group in groups) > 38 else 2
    columns = 3 if all(len(group.name) <= 22 for group in groups) else columns
    lines_each = max(len(wrap(group.name, LABEL)) for group in groups)
    height = HEIGHT * len(panels) + GAP * (1 + lines_each * math.ceil(len(groups) / columns))
    with _style():
        figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
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
            return None
        lines, labels = zip(*(drawn[group.name] for group in groups if group.name in drawn), strict=True)
        figure.legend(lines, labels, loc="outside lower center", ncols=columns)
        file = io.BytesIO()
        figure.savefig(file, format="png")
    return file.getvalue()


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


@contextmanager
def _style() -> Iterator[None]:
    """Our own look, whatever the user's matplotlibrc says; text that holds $ is no formula."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "font.size": 10,
                "axes.grid": True,
                "grid.color": "#dddddd",
                "grid.linewidth": 0.6,
                "axes.axisbelow": True,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "lines.linewidth": 1.8,
                "lines.markersize": 3.5,
                "legend.frameon": False,
                "legend.handlelength": 3.2,
                "text.parse_math": False,
            }
        )
        yield
