"""The masks of some rounds, kept small in a run's folder; reading them imports no torch.

`masks/00040.npz` is the global mask after 40 rounds (0: the one that training began with): the `names` of the
prunable parameters, the number of `weights` of each, and `bits`: a bit a weight, row-major, each parameter
filled up to whole bytes as `numpy.packbits` does.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .disk import replace, writing
from .errors import RunError

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = "masks"
Bits = NDArray[np.uint8]

UNREADABLE = (OSError, ValueError, TypeError, KeyError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error)

ONES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1, dtype=np.uint8)
"""How many bits of each byte are 1; numpy 1 has no bitwise_count."""


def kept_rounds(rounds: int, wanted: int) -> frozenset[int]:
    """After how many of the `rounds` a mask is kept: `wanted` times, evenly spread, and before the first.

    The last round is one of them; if there are no more rounds than wanted, all are. Empty if `wanted` is 0.
    """
    count = min(wanted, rounds)
    return frozenset(number * rounds // count for number in range(count + 1)) if count else frozenset()


def keep(run: Path, played: int, mask: Mapping[str, Tensor]) -> None:
    """Writes the mask after so many rounds, whole or not at all. Raises DiskError if it cannot."""
    path = run / FOLDER / f"{played:05d}.npz"
    packed = [np.packbits(active.detach().cpu().contiguous().numpy()) for active in mask.values()]

    def write(fresh: Path) -> None:
        with fresh.open("wb") as file:
            np.savez_compressed(
                file,
                names=np.array(list(mask)),
                weights=np.array([active.numel() for active in mask.values()]),
                bits=np.concatenate(packed),
            )

    with writing(path):
        path.parent.mkdir(exist_ok=True)
    replace(path, write)


def load(run: Path) -> dict[int, Bits]:
    """The bits of the kept masks by rounds played, in order; empty if the run kept none.

    Raises RunError if a file is damaged, or of another model than the first.
    """
    history: dict[int, Bits] = {}
    first: tuple[list[str], list[int]] | None = None
    for path in sorted((run / FOLDER).glob("*.npz")):
        try:
            played = int(path.stem)
            # opened here: numpy leaves a damaged file open
            with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
                form = file["names"].tolist(), file["weights"].tolist()
                bits = file["bits"]
            first = first or form
            if form != first or bits.dtype != np.uint8 or bits.shape != (sum(-(-n // 8) for n in form[1]),):
                raise ValueError("it does not hold the mask of this model")
        except UNREADABLE as error:
            raise RunError(f"cannot read {path}: {error}; remove it to do without") from None
        history[played] = bits
    return dict(sorted(history.items()))


def overlaps(masks: Sequence[Bits]) -> NDArray[np.float64]:
    """Intersection over union of each pair of masks, float64 (n, n) in [0, 1]; 1 for two empty ones."""
    counts = [_ones(bits) for bits in masks]
    matrix = np.ones((len(masks), len(masks)))
    for row in range(len(masks)):
        for other in range(row):
            both = _ones(masks[row] & masks[other])
            either = counts[row] + counts[other] - both
            matrix[row, other] = matrix[other, row] = both / either if either else 1.0
    return matrix


def _ones(bits: Bits) -> int:
    return int(ONES[bits].sum(dtype=np.int64))
