"""What uploads consist of, as bars."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import wrap
from typing import Any

import numpy as np

from .columns import Group, column
from .picture import MEGABYTE, SMALL, Picture, canvas, png

KINDS = ("values", "mask", "dense", "other")
COLOURS = ("#482878", "#26828e", "#6ece58", "#fde725")  # not those of groups; apart in lightness, too
HATCHES = ("", "////", "....", "xxxx")  # for grey print
NAME = 30  # characters of a line beside a bar


def upload_kinds(groups: Sequence[Group]) -> Picture | str:
    """Bytes a round by kind, a bar a group; or why there is none."""
    bars = {group.name: kinds for group in groups if (kinds := _kinds(group)) is not None}
    if not bars:
        return "Upload by kind: no run has recorded it."
    names = ["\n".join(wrap(name, NAME)) for name in bars]
    lines = sum(max(2, name.count("\n") + 1) for name in names)
    with canvas(1.2 + 0.21 * lines) as figure:
        axis = figure.subplots()
        left = np.zeros(len(bars))
        for number, kind in enumerate(KINDS):
            sent = np.array([kinds[number] for kinds in bars.values()]) / MEGABYTE
            look: Any = {"color": COLOURS[number], "hatch": HATCHES[number], "edgecolor": "white"}
            axis.barh(range(len(bars)), sent, left=left, height=0.7, label=kind, **look)
            left += sent
        for place, total in enumerate(left):
            axis.text(total, place, f" {total:.3g}", va="center", fontsize=SMALL)
        axis.set_yticks(range(len(bars)), names, fontsize=SMALL)
        axis.invert_yaxis()
        axis.margins(x=0.1)
        axis.grid(axis="y", visible=False)
        axis.set_xlabel("upload, MB a round (all clients)")
        figure.legend(loc="outside upper center", ncols=len(KINDS))
        made = png(figure)
    caption = (
        "Mean over rounds and seeds. Values: of the weights that the mask keeps; mask: what says where they "
        "are; dense: parameters that are never pruned, and buffers; other: headers, scores, extras."
    )
    return Picture("upload-kinds", "Upload by kind", caption, made)


def _kinds(group: Group) -> list[float] | None:
    """Mean bytes a round of each kind; None if a run lacks them."""
    if not all(run.rounds for run in group.runs):
        return None
    means = [[column(run, f"upload_{kind}_bytes").mean() for kind in KINDS] for run in group.runs]
    return np.mean(means, axis=0).tolist() if np.isfinite(means).all() else None
