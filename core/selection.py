"""The k-th largest of many values: on host memory by numpy where that is several times faster than torch.

On a device by sorting, from as many values on: its selection runs in one block of threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .functional import is_stacked
from .recording import operation

_SHIFT, _BUCKETS = 20, 1 << 12  # buckets of float32 values by sign, exponent and three bits of the fraction
# torch's own selection is faster up to here, and on a CPU several times slower soon after
_FEW = 1 << 15


def readable(*tensors: Tensor) -> bool:
    """Whether the host may look at values for nothing: on a CPU, and outside vmap."""
    return all(t.is_cpu for t in tensors) and not is_stacked(dict(enumerate(tensors)))


@operation
def kth_largest(values: Tensor, k: int | Tensor) -> Tensor:
    """The k-th largest entry (k from 1 to their number), 0-d; NaN is larger than everything.

    The host does not look at a `k` that is a tensor.
    """
    flat = values.detach().flatten()
    if is_stacked({"values": flat}) and not torch.compiler.is_compiling():
        ranked: Tensor = _Ranked.apply(flat, k)
        return ranked
    if isinstance(k, Tensor):
        return _at(flat, k)
    place = flat.numel() - k
    if flat.numel() > _FEW and not flat.is_cpu:
        return flat.sort().values[place]
    if flat.numel() <= _FEW or not readable(flat) or flat.dtype == torch.bfloat16:
        return flat.kthvalue(place + 1).values
    numbers = flat.numpy()
    if flat.dtype == torch.float32 and not np.isnan(numbers.max()):
        numbers, place = _bucket(numbers, place)
    return flat.new_tensor(np.partition(numbers, place)[place])


def _at(flat: Tensor, k: Tensor) -> Tensor:
    """The k-th largest by sorting, which needs no look at `k`."""
    return flat.sort(descending=True).values.gather(0, (k - 1).view(1)).view(())


class _Ranked(torch.autograd.Function):
    """`kth_largest` under vmap: on a CPU client by client, a third of the time of sorting them together."""

    @staticmethod
    def forward(flat: Tensor, k: int | Tensor) -> Tensor:
        return kth_largest(flat, k)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(info: Any, in_dims: Any, flat: Tensor, k: int | Tensor) -> tuple[Tensor, int]:
        rows, count = info.batch_size, k
        flat = flat.movedim(in_dims[0], 0) if in_dims[0] is not None else flat.expand(rows, -1)
        if readable(flat) and (isinstance(k, Tensor) or flat.shape[1] > _FEW):
            return _by_row(flat, k), 0
        if isinstance(count, Tensor):
            ordered = flat.sort(dim=1, descending=True).values
            return ordered.gather(1, (count - 1).expand(rows).view(-1, 1)).view(-1), 0
        place = flat.shape[1] - count
        if flat.shape[1] > _FEW and not flat.is_cpu:
            return flat.sort(dim=1).values[:, place], 0
        return flat.kthvalue(place + 1, dim=1).values, 0

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None


@operation
def _by_row(rows: Tensor, k: int | Tensor) -> Tensor:
    """The k-th largest of each row."""
    counts = k.expand(len(rows)).tolist() if isinstance(k, Tensor) else [k] * len(rows)
    return torch.stack([kth_largest(row, n) for row, n in zip(rows, counts, strict=True)])


def _bucket(values: NDArray[np.float32], place: int) -> tuple[NDArray[np.float32], int]:
    """The values near the one that is at `place` in ascending order, and its place among these."""
    bits = values.view(np.int32)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # ascends as the values do, -0 just below 0
    bucket = (key >> _SHIFT) + _BUCKETS // 2
    upto = np.bincount(bucket, minlength=_BUCKETS).cumsum()
    found = int(np.searchsorted(upto, place, side="right"))
    return values[bucket == found], place - (int(upto[found - 1]) if found else 0)
