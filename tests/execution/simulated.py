"""A second device, played on the CPU: what would fail or wait on a GPU shows on a machine without one.

Its tensors report a device of their own and cannot meet the CPU's. The CPU's kernels compute them. Counted
are `waits`, where the host needs something from the device or blocks on a copy to it (one that asks not to
block does not here), and `launches`, the operations that are no views.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils import backend_registration

DEVICE = "simulated:0"
READS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero"}
"""Operations whose result, or its shape, the host must know."""
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}

launches: Counter[str] = Counter()
waits: Counter[str] = Counter()


class OnDevice(torch.Tensor):
    """A tensor of the device; `held` are its values on the CPU."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> OnDevice:
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, held.shape, **layout, device=DEVICE)
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    def tolist(self):
        return self.cpu().tolist()

    def untyped_storage(self):
        return self.held.untyped_storage()


def on_cpu(value):
    return value.held if isinstance(value, OnDevice) else value


def copied(source: Tensor, into: Tensor, non_blocking: bool = False) -> Tensor:
    """Copies between devices wait for each other, unless the source is the host's and nobody asked to."""
    away, back = isinstance(into, OnDevice), isinstance(source, OnDevice)
    waits["a copy"] += away != back and (back or not non_blocking)
    on_cpu(into).copy_(on_cpu(source))
    return into


def run(func, args, kwargs):
    """One operation, on the CPU's kernels."""
    name = func.overloadpacket.__name__
    if name == "copy_":
        return copied(args[1], args[0], *args[2:], **kwargs)
    if name == "_to_copy":
        return moved(args[0], **kwargs)
    flat, form = pytree.tree_flatten((args, kwargs))
    tensors = [value for value in flat if isinstance(value, Tensor)]
    own = {id(value.held): value for value in tensors if isinstance(value, OnDevice)}
    foreign = [value for value in tensors if not isinstance(value, OnDevice) and value.dim()]
    assert not (own and foreign), f"{func} was given tensors of the CPU, {[tuple(t.shape) for t in foreign]}"
    by_mask = name in INDEXED and any(
        t.dtype == torch.bool for t in pytree.tree_leaves(args[1]) if t is not None
    )
    waits[name] += name in READS or by_mask
    launches[name] += not func.is_view
    args, kwargs = pytree.tree_unflatten([on_cpu(value) for value in flat], form)
    there = torch.device(kwargs.get("device") or DEVICE).type == torch.device(DEVICE).type
    if "device" in kwargs:
        kwargs["device"] = "cpu" if there else kwargs["device"]
    made = func(*args, **kwargs)

    def back(value):
        if not there or not isinstance(value, Tensor):
            return value
        return own.get(id(value)) if id(value) in own else OnDevice(value)

    return pytree.tree_map(back, made)


def moved(source: Tensor, **kwargs) -> Tensor:
    """`Tensor.to`."""
    goal = torch.device(kwargs.pop("device", None) or source.device)
    non_blocking = kwargs.pop("non_blocking", False)
    if goal.type == "meta":
        return torch.ops.aten._to_copy(on_cpu(source), device="meta", **kwargs)
    there = goal.type == torch.device(DEVICE).type
    if (isinstance(source, OnDevice) and not there) or (not isinstance(source, OnDevice) and there):
        waits["a copy"] += isinstance(source, OnDevice) or not non_blocking
    else:
        launches["_to_copy"] += 1
    made = torch.ops.aten._to_copy(on_cpu(source), **kwargs)
    return OnDevice(made) if there else made


def _register() -> torch.library.Library:
    """Makes the device known to PyTorch; once in a process."""
    # a backward pass now, or the next would start a thread for the device, and processes with one cannot fork
    torch.ones((), requires_grad=True).backward()
    backend_registration._setup_privateuseone_for_python_backend(DEVICE.partition(":")[0])
    library = torch.library.Library("aten", "IMPL")

    def empty(size, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
        return OnDevice(
            torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format)
        )

    def empty_strided(size, stride, dtype=None, layout=None, device=None, pin_memory=None):
        return OnDevice(torch.empty_strided(size, stride, dtype=dtype))

    library.impl("empty.memory_format", empty, "PrivateUse1")
    library.impl("empty_strided", empty_strided, "PrivateUse1")
    library.impl("_copy_from", copied, "PrivateUse1")
    return library


available = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
library = _register() if available else None


@contextmanager
def simulated() -> Iterator[torch.device]:
    """The device, with its counters at 0; errors of a backward pass reach the caller."""
    launches.clear()
    waits.clear()
    with torch.autograd.set_multithreading_enabled(False):
        yield torch.device(DEVICE)
