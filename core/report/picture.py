"""What every picture shares: its size, its look, and how it becomes a PNG."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's, which readers with any colour vision can tell apart; without their yellow, faint on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
WIDTH, DPI = 7.0, 160  # inches, of a page's column; pixels an inch
SMALL = 8  # points, of names beside and above what is drawn
MEGABYTE = 1e6


@dataclass(frozen=True)
class Picture:
    """A PNG with what is said of it."""

    name: str
    title: str
    caption: str
    png: bytes


@contextmanager
def canvas(height: float) -> Iterator[Figure]:
    """An empty figure of so many inches, in our own look whatever the user's matplotlibrc says."""
    import matplotlib
    from matplotlib.figure import Figure

    look: Any = {
        "font.size": 10,
        "axes.titlesize": SMALL + 1,
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
        "text.parse_math": False,  # a name that holds $ is no formula
    }
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(look)
        yield Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")


def balanced(count: int, columns: int) -> int:
    """Columns, at most so many, of a grid whose last row is as full as can be."""
    return math.ceil(count / math.ceil(count / columns))


def png(figure: Figure) -> bytes:
    """The figure's file, drawn inside its `canvas`: in 256 colours, which take a third of the bytes."""
    from PIL import Image

    drawn, file = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")
    pixels = Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    pixels.save(file, "png", optimize=True, dpi=(DPI, DPI))
    return file.getvalue()
