"""Codecs of masks: how a bool tensor becomes bytes on the wire.

Both ends know the names, their order and the shapes. Each tensor of n positions is one tag byte and the
payload of whichever codec is shortest (the lower tag wins a tie):

* `BITMAP`: ceil(n / 8) bytes, position i in bit i mod 8 of byte i // 8, padding bits 0;
* `ACTIVE`: the flat (row-major) positions that are on, as a count and then the number of positions skipped
  before each, all as LEB128 varints in their shortest form;
* `INACTIVE`: the same for the positions that are off;
* `CHANGED`: the same for the positions that differ from a `reference` mask held by both ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import RunError
from ..state import Masks
from .frame import CorruptError

Bits = npt.NDArray[np.bool_]
Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]


_POSITIONS = 2**21  # looked at at once; each takes some 40 bytes
_WIDE = 2**14  # flags from which on a row is quicker by itself than among others


class Codec(IntEnum):
    """Tag byte of a tensor's payload."""

    BITMAP = 0
    ACTIVE = 1
    INACTIVE = 2
    CHANGED = 3


def on_host(masks: Masks) -> Masks:
    """The masks on the CPU: themselves if they are there, else copies, in one transfer."""
    away = {name: mask for name, mask in masks.items() if not mask.is_cpu}
    if not away:
        return masks
    flat = torch.cat([mask.reshape(-1) for mask in away.values()]).cpu()
    parts = torch.split(flat, [mask.numel() for mask in away.values()])
    return masks | {name: part.view(away[name].shape) for name, part in zip(away, parts, strict=True)}


def encode_masks(masks: Mapping[str, Tensor], reference: Mapping[str, Tensor] | None = None) -> bytes:
    """The masks as bytes, each tensor in its shortest codec.

    `reference`, where given, has an entry of the same shape for every mask (RunError otherwise) and must be
    known to the receiver.
    """
    chunks: list[bytes] = []
    for bits, base in _pairs(masks, reference):
        codec, _, gaps = _shortest(bits, base)
        chunks.append(bytes([codec]))
        if gaps is None:
            chunks.append(np.packbits(bits, bitorder="little").tobytes())
        else:
            chunks.append(_varints(np.concatenate(([gaps.size], gaps))).tobytes())
    return b"".join(chunks)


def masks_size(masks: Mapping[str, Tensor], reference: Mapping[str, Tensor] | None = None) -> int:
    """Bytes of `encode_masks(masks, reference)`, counted without building them."""
    return int(masks_sizes({name: mask[None] for name, mask in masks.items()}, reference).sum())


def masks_sizes(masks: Mapping[str, Tensor], reference: Mapping[str, Tensor] | None = None) -> Ints:
    """`masks_size` of each of stacked masks (clients, …), all at once."""
    total = np.zeros(1, np.int64)
    for bits, base in _pairs(masks, reference, stacked=True):
        total = total + 1 + _sizes(bits, base)
    return total


def decode_masks(
    data: bytes, shapes: Mapping[str, torch.Size], reference: Mapping[str, Tensor] | None = None
) -> Masks:
    """The masks that `encode_masks` made into `data`: bool, on the CPU, in the order of `shapes`.

    Raises RunError if `data` is truncated, too long or malformed; never allocates more than the shapes need.
    """
    reader = Reader(data)
    masks = read_masks(reader, shapes, reference)
    reader.end()
    return masks


def read_masks(
    reader: Reader, shapes: Mapping[str, torch.Size], reference: Mapping[str, Tensor] | None = None
) -> Masks:
    """As `decode_masks`, for masks that are a section of a longer message."""
    masks: Masks = {}
    reference = None if reference is None else on_host(dict(reference))
    for name, shape in shapes.items():
        bits = _read(reader, name, shape.numel(), None if reference is None else _flat(reference[name]))
        masks[name] = torch.from_numpy(bits).reshape(shape)
    return masks


class Reader:
    """Takes a message apart from its front; RunError where it is shorter or longer than it must be."""

    def __init__(self, data: bytes) -> None:
        self._data: Bytes = np.frombuffer(data, np.uint8)
        self._at = 0

    @property
    def left(self) -> int:
        """Bytes not yet taken."""
        return self._data.size - self._at

    def take(self, size: int) -> Bytes:
        """The next `size` bytes, a read-only view."""
        if size > self.left:
            raise CorruptError(f"{size} bytes expected, {self.left} left")
        self._at += size
        return self._data[self._at - size : self._at]

    def varints(self, count: int, limit: int) -> Ints:
        """The next `count` varints, each at most `limit` (a count or position, below 2**31 or so)."""
        if count > self.left:
            raise CorruptError(f"{count} numbers expected, {self.left} bytes left")
        width = _length(limit)
        window = self._data[self._at : self._at + count * width]
        ends = np.flatnonzero(window < 0x80)[:count]
        if ends.size < count:
            raise CorruptError("a number without end")
        starts = np.concatenate(([0], ends + 1))
        lengths = np.diff(starts)
        if count and lengths.max() > width:
            raise CorruptError(f"a number above {limit}")
        values = np.zeros(count, np.int64)
        for k in range(width):
            more = lengths > k
            values[more] |= (window[starts[:-1][more] + k].astype(np.int64) & 0x7F) << (7 * k)
        if count and (values.max() > limit or (_lengths(values) != lengths).any()):
            raise CorruptError(f"a number above {limit} or not in its shortest form")
        self._at += int(starts[-1])
        return values

    def end(self) -> None:
        """Nothing may be left."""
        if self.left:
            raise CorruptError(f"{self.left} bytes too many")


def _pairs(
    masks: Mapping[str, Tensor], reference: Mapping[str, Tensor] | None, stacked: bool = False
) -> Iterator[tuple[Bits, Bits | None]]:
    """Flat, or (clients, n) of stacked masks; the reference is one for all."""
    masks, reference = on_host(dict(masks)), None if reference is None else on_host(dict(reference))
    for name, mask in masks.items():
        base = None if reference is None else reference.get(name)
        shape = mask.shape[1:] if stacked else mask.shape
        # numpy would broadcast a reference of another shape
        if reference is not None and (base is None or base.shape != shape):
            raise RunError(f"mask {name!r} has no reference of its shape {tuple(shape)}")
        bits = _flat(mask)
        yield bits.reshape(len(mask), -1) if stacked else bits, None if base is None else _flat(base)


def _flat(mask: Tensor) -> Bits:
    flat: Bits = mask.detach().reshape(-1).numpy()
    return flat


def _shortest(bits: Bits, base: Bits | None) -> tuple[Codec, int, Ints | None]:
    """Codec, payload bytes, and the gaps to write (None for a bitmap)."""
    best: tuple[Codec, int, Ints | None] = Codec.BITMAP, (bits.size + 7) // 8, None
    for codec, flags in _candidates(bits, base):
        count = int(np.count_nonzero(flags))
        # each index takes a byte at least: most losers are known without looking at their positions
        if _length(count) + count >= best[1]:
            continue
        gaps = np.diff(np.flatnonzero(flags), prepend=-1) - 1
        size = _length(count) + _total_length(gaps)
        if size < best[1]:
            best = codec, size, gaps
    return best


def counted(rows: Bits) -> Ints:
    """What is on in each row; many times as fast as numpy's own count along an axis."""
    return np.array([np.count_nonzero(row) for row in rows], np.int64)


def _sizes(bits: Bits, base: Bits | None) -> Ints:
    """Payload bytes of each row in its shortest codec; a few rows at a time, as positions take memory."""
    if len(bits) == 1 or bits.shape[1] >= _WIDE:
        return np.array([_shortest(row, base)[1] for row in bits], np.int64)
    rows = max(1, _POSITIONS // max(bits.shape[1], 1))
    return np.concatenate([_some_sizes(bits[at : at + rows], base) for at in range(0, len(bits), rows)])


def _some_sizes(bits: Bits, base: Bits | None) -> Ints:
    rows, width = bits.shape
    best = np.full(rows, (width + 7) // 8, np.int64)
    for _, flags in _candidates(bits, base):
        counts = counted(flags)
        least = counts + _lengths(counts)
        # each index takes a byte at least: most losers are known without looking at their positions
        close = np.flatnonzero(least < best)
        if close.size:
            row = np.repeat(np.arange(close.size), counts[close])
            place = np.flatnonzero(flags[close]) - width * row
            gaps = np.diff(place, prepend=-1) - 1
            first = np.diff(row, prepend=-1) > 0
            gaps[first] = place[first]
            longer = np.bincount(row, weights=_lengths(gaps) - 1, minlength=close.size)
            best[close] = np.minimum(best[close], least[close] + longer.astype(np.int64))
    return best


def _candidates(bits: Bits, base: Bits | None) -> Iterator[tuple[Codec, Bits]]:
    yield Codec.ACTIVE, bits
    yield Codec.INACTIVE, ~bits
    if base is not None:
        yield Codec.CHANGED, bits ^ base


def _length(value: int) -> int:
    """Bytes of a varint."""
    return max(1, (value.bit_length() + 6) // 7)


def _lengths(values: Ints) -> Ints:
    lengths = np.ones(values.size, np.int64)
    for k in range(1, _length(int(values.max(initial=0)))):
        lengths += values >= 1 << (7 * k)
    return lengths


def _total_length(values: Ints) -> int:
    widest = _length(int(values.max(initial=0)))
    return values.size + sum(int(np.count_nonzero(values >= 1 << (7 * k))) for k in range(1, widest))


def _varints(values: Ints) -> Bytes:
    lengths = _lengths(values)
    ends = np.cumsum(lengths)
    out = np.zeros(int(ends[-1]), np.uint8)
    for k in range(int(lengths.max())):
        more = lengths > k
        byte = (values[more] >> (7 * k)) & 0x7F
        out[(ends - lengths)[more] + k] = byte | np.where(lengths[more] > k + 1, 0x80, 0)
    return out


def _read(reader: Reader, name: str, size: int, base: Bits | None) -> npt.NDArray[Any]:
    tag = int(reader.take(1)[0])
    if tag == Codec.BITMAP:
        packed = reader.take((size + 7) // 8)
        if size % 8 and packed[-1] >> (size % 8):
            raise CorruptError(f"padding of the bitmap of {name!r} is not zero")
        return np.unpackbits(packed, count=size, bitorder="little").view(np.bool_)
    if tag > Codec.CHANGED or (tag == Codec.CHANGED and base is None):
        raise CorruptError(f"codec {tag} of mask {name!r} is unknown or needs a reference")
    count = int(reader.varints(1, size)[0])
    positions = np.cumsum(reader.varints(count, size) + 1) - 1
    if count and positions[-1] >= size:
        raise CorruptError(f"mask {name!r} has {size} positions, {positions[-1]} is named")
    flags = np.zeros(size, np.bool_)
    flags[positions] = True
    if tag == Codec.ACTIVE:
        return flags
    return ~flags if tag == Codec.INACTIVE or base is None else flags ^ base
