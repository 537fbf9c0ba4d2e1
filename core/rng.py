"""Random streams keyed by (seed, purpose, round, client): no generator, no state to save.

Device draws are counter-based (SplitMix64 of key and position; Steele, Lea, Flood 2014), elementwise in
int64, so that they agree bit for bit between CPU and GPU, and between a loop over clients and `vmap`. On
host memory numpy makes them, in half of torch's time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

from .recording import operation
from .selection import readable
from .transfer import to_device

GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # as signed int64; int64 arithmetic wraps
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def _digest(*path: str | int) -> int:
    text = "/".join(f"{type(item).__name__}:{item}" for item in path)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def number(*path: str | int) -> int:
    """The key of a stream as a plain signed 64-bit integer."""
    digest = _digest(*path)
    return digest - (1 << 64) if digest >= 1 << 63 else digest


def key(*path: str | int, device: torch.device | str = "cpu") -> Tensor:
    """The key of a stream, 0-d int64, e.g. `key(seed, "grow", round)`."""
    return torch.full((), number(*path), dtype=torch.int64, device=device)


def fold(stream: Tensor, *path: str | int) -> Tensor:
    """The key of a stream within a stream, e.g. one a layer; nothing is sent to the device."""
    return _mix(stream ^ number(*path))


def folded(
    streams: Sequence[int], paths: Sequence[Sequence[str | int]], device: torch.device | str = "cpu"
) -> Tensor:
    """`fold` of each of several streams with each of several paths, (streams, paths), in one transfer."""
    numbers = np.array([number(*path) for path in paths], dtype=np.int64)
    return _mix(to_device(np.array(streams, dtype=np.int64)[:, None] ^ numbers, device))


def bits_at(streams: Tensor, places: Tensor) -> Tensor:
    """What `bits` of a stream draws at given places of its flat shape, counted from 0; both broadcast."""
    return _shift(_mix(streams + (places + 1) * GOLDEN), 1)


@operation
def bits(stream: Tensor, shape: Sequence[int]) -> Tensor:
    """Independent uniform integers in [0, 2^63), int64 of the given shape."""
    count = int(np.prod(shape, dtype=np.int64))
    if readable(stream):
        return torch.from_numpy(_host_bits(int(stream.item()), count)).view(tuple(shape))
    position = torch.arange(1, count + 1, device=stream.device)
    # the compiler would take the product of an index and a number for an address, which does not wrap
    golden = (stream & 0) | GOLDEN if torch.compiler.is_compiling() else GOLDEN
    return _shift(_mix(stream + position * golden), 1).view(tuple(shape))


def above(stream: Tensor, shape: Sequence[int], share: float) -> Tensor:
    """Where `uniform` of the same stream is at or above `share`, in [0, 1)."""
    return bits(stream, shape) > (math.ceil(share * 2**24) << 39) - 1


def uniform(stream: Tensor, shape: Sequence[int]) -> Tensor:
    """Independent uniform float32 in [0, 1), with 24 random bits each."""
    return (bits(stream, shape) >> 39).to(torch.float32) * 2.0**-24


def normal(stream: Tensor, shape: Sequence[int]) -> Tensor:
    """Independent standard normal float32: Box and Muller (1958) on 53 random bits in float64."""
    radius, angle = ((bits(fold(stream, part), shape) >> 10).double() for part in ("radius", "angle"))
    # in (0, 1]: the logarithm of 0 never comes up
    radius = ((radius + 1) * 2.0**-53).log().mul(-2).sqrt()
    return (radius * (angle * (2 * math.pi * 2.0**-53)).cos()).to(torch.float32)


def generator(*path: str | int) -> np.random.Generator:
    """A NumPy generator for draws on the host: partitions, sampled clients, batches."""
    return np.random.Generator(np.random.PCG64(_digest(*path)))


def _host_bits(stream: int, count: int) -> np.ndarray:
    """`bits` as an array."""
    value = np.arange(1, count + 1, dtype=np.uint64)
    value *= np.uint64(GOLDEN % 2**64)
    value += np.uint64(stream % 2**64)
    moved = np.empty_like(value)
    for by, factor in ((30, _MIX_1), (27, _MIX_2), (31, 1)):
        np.right_shift(value, np.uint64(by), out=moved)
        value ^= moved
        if factor != 1:
            value *= np.uint64(factor % 2**64)
    value >>= np.uint64(1)
    return value.view(np.int64)


def _shift(value: Tensor, by: int) -> Tensor:
    """Logical right shift of int64."""
    return (value >> by) & ((1 << (64 - by)) - 1)


def _mix(value: Tensor) -> Tensor:
    value = (value ^ _shift(value, 30)) * _MIX_1
    value = (value ^ _shift(value, 27)) * _MIX_2
    return value ^ _shift(value, 31)
