"""Messages: what server and client really send, and its exact size.

A message is the header of `frame` and three sections:

1. masks: the mask (`send_mask`), as `codecs` writes it, or the 8 bytes of a seed that the receiver draws it
   from; and what is frozen (`send_frozen`), a flag for each *active* position, written as a mask (frozen ⊆
   mask, so the flags of inactive positions need no bytes);
2. values: the frozen ones (`send_frozen`), then those of the active positions that are not frozen, parameter
   after parameter, and parameters without a mask whole except for what is frozen;
3. the buffers whole.

Values are raw, in the type that `values.on_wire` gives (float32: 4 bytes, an int64 counter: 8). Which parts
a message has, and which mask an encoded mask refers to, follows from what both ends know of each other (the
versions of mask and frozen set that the client holds). That is its `Form`; names, shapes and types are
known, too. The checksum covers all of this, nothing of it is sent.

Tensors beside the model (scores, control variates) are a message of their own, `pack_beside`: values only.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import RunError
from ..state import Masks, Params
from .codecs import Reader, encode_masks, masks_size, read_masks
from .frame import HEADER, CorruptError, seal, unseal
from .values import TYPES, on_wire

SEED = 8
"""Bytes of a seed that stands for a mask."""


class Message(NamedTuple):
    """A model at one end of the wire: tensors by name.

    `mask` covers every prunable parameter. `frozen` covers any parameters (none: nothing is frozen); its
    names, like those of the mask, are the same at both ends.
    """

    params: Params
    buffers: Params
    mask: Masks
    frozen: Masks


class Seed(NamedTuple):
    """A mask that any end can draw: `masks(key)`; `key` is a signed 64-bit integer."""

    key: int
    masks: Callable[[int], Masks]


class Form(NamedTuple):
    """What a message has, and what is known of it at both ends."""

    send_mask: bool = False
    send_frozen: bool = False
    reference: Masks | None = None
    """the mask that the receiver holds, where the one sent is coded against it"""
    seed: Seed | None = None
    """sent instead of the mask"""
    values: torch.dtype = torch.float32
    label: str = "a message"
    """round, direction and client, for errors and the checksum"""

    @property
    def flags(self) -> int:
        """The header's byte."""
        parts = (self.send_mask, self.send_frozen, self.reference is not None, self.seed is not None)
        kind = list(TYPES.values()).index(self.values)
        return sum(part << bit for bit, part in enumerate(parts)) | kind << 4


class Count(NamedTuple):
    """Positions of one parameter: those that train (or have no mask) and those that are frozen."""

    live: int
    still: int


@dataclass(frozen=True)
class MessageSize:
    """Bytes of each part of a message; computed once, then `total` is arithmetic."""

    values: int
    """trainable active positions of masked parameters"""
    frozen_values: int
    """frozen positions of any parameter"""
    dense: int
    """parameters without a mask, except for frozen positions"""
    buffers: int
    mask: int
    """the code of the mask"""
    frozen_mask: int
    """the code of the frozen positions among the active ones"""

    def total(self, *, send_mask: bool = False, send_frozen: bool = False, seed: bool = False) -> int:
        """Bytes of the message with these parts, `len(pack(…))`; `seed`: one in place of the mask."""
        first = self.frozen_mask + self.frozen_values if send_frozen else 0
        mask = (SEED if seed else self.mask) if send_mask else 0
        return HEADER + self.values + self.dense + self.buffers + first + mask


def count(params: Mapping[str, Tensor], mask: Masks, frozen: Masks) -> dict[str, Count]:
    """Live and frozen positions of every parameter; one transfer to the host per kind."""
    active = _sums(mask)
    still = _sums({name: mask[name] & flags if name in mask else flags for name, flags in frozen.items()})
    return {
        name: Count(active.get(name, param.numel()) - still.get(name, 0), still.get(name, 0))
        for name, param in params.items()
    }


def measure(
    model: Message,
    reference: Masks | None = None,
    *,
    counts: Mapping[str, Count] | None = None,
    values: torch.dtype = torch.float32,
) -> MessageSize:
    """Size of each part of `model` as a message; `counts` are those of `count`, if they are at hand."""
    counts = counts or count(model.params, model.mask, model.frozen)
    width = {name: on_wire(param.dtype, values).itemsize for name, param in model.params.items()}
    return MessageSize(
        values=sum(counts[name].live * width[name] for name in model.mask),
        frozen_values=sum(counts[name].still * width[name] for name in model.params),
        dense=sum(counts[name].live * width[name] for name in model.params if name not in model.mask),
        buffers=sum(b.numel() * on_wire(b.dtype, values).itemsize for b in model.buffers.values()),
        mask=masks_size(model.mask, reference),
        frozen_mask=masks_size(_among_active(model)),
    )


def message_size(model: Message, form: Form = Form()) -> int:  # noqa: B008 - it cannot change
    """Bytes of `pack` with the same arguments, without building them."""
    size = measure(model, form.reference, values=form.values)
    return size.total(send_mask=form.send_mask, send_frozen=form.send_frozen, seed=form.seed is not None)


def pack(model: Message, form: Form = Form()) -> bytes:  # noqa: B008
    """The message. Floating-point values are rounded to the type of the form; see `values.rounded`."""
    places = {name: _places(model, name) for name in model.params}
    masks, values = [], []
    if form.send_mask:
        masks.append(_key(form.seed) if form.seed else encode_masks(model.mask, form.reference))
    if form.send_frozen:
        masks.append(encode_masks(_among_active(model)))
        values += [_raw(model.params[name][still], form.values) for name, (_, still) in places.items()]
    values += [_raw(model.params[name][live], form.values) for name, (live, _) in places.items()]
    buffers = [_raw(buffer, form.values) for buffer in model.buffers.values()]
    sections = [b"".join(parts) for parts in (masks, values, buffers)]
    return seal(form.flags, sections, _known(model, form))


def unpack(data: bytes, held: Message, form: Form = Form()) -> Message:  # noqa: B008
    """The model that was packed, on the devices of `held`; parameters are 0 wherever the mask is off.

    `held` is what the receiver has: names, shapes and dtypes; the mask unless it is sent; the frozen flags
    and the values under them unless they are sent. Raises RunError, naming the form's label, if `data` is
    not such a message; what it claims is held against the shapes before memory is taken.
    """
    with _Naming(form.label):
        masks, values, buffers = (Reader(part) for part in unseal(data, form.flags, _known(held, form)))
        mask, frozen = held.mask, held.frozen
        if form.send_mask:
            mask = _read_mask(masks, held.mask, form)
        if form.send_frozen:
            active = _sums(mask)
            shapes = {name: torch.Size([active.get(name, old.numel())]) for name, old in frozen.items()}
            frozen = {
                name: _spread(flags, mask.get(name), frozen[name])
                for name, flags in read_masks(masks, shapes).items()
            }
        masks.end()
        params = {name: param.detach().clone() for name, param in held.params.items()}
        model = Message(params, {}, mask, frozen)
        places = {name: _places(model, name) for name in params}
        for name, (_, still) in places.items():
            params[name].masked_fill_(~still, 0)
            if form.send_frozen:
                size = int(still.count_nonzero())
                params[name][still] = _read(values, params[name], size, form.values)
        for name, (live, _) in places.items():
            params[name][live] = _read(values, params[name], int(live.count_nonzero()), form.values)
        values.end()
        for name, old in held.buffers.items():
            model.buffers[name] = _read(buffers, old, old.numel(), form.values).reshape(old.shape)
        buffers.end()
        return model


def deliver(model: Message, size: int, form: Form = Form(), known: Params | None = None) -> Message:  # noqa: B008
    """Packs `model`, unpacks it with nothing but what its receiver holds, and returns what arrived.

    `known` are the values of the frozen positions that the receiver holds, flat, where the form does not send
    them (default: those of `model`). Raises RunError if the message has not the `size` charged, or if
    what arrives is not the model, bit for bit but for NaNs (it must be rounded, `values.rounded`).
    """
    data = pack(model, form)
    if len(data) != size:
        raise RunError(f"{form.label}: a message of {len(data)} bytes was charged as {size}")
    params = {name: torch.full_like(param, math.nan) for name, param in model.params.items()}
    for name, flags in {} if form.send_frozen else model.frozen.items():
        own = model.params[name].detach()[flags] if known is None else known[name].to(flags.device)
        params[name][flags] = own
    held = Message(
        params,
        {name: torch.zeros_like(buffer) for name, buffer in model.buffers.items()},
        {name: torch.zeros_like(m) for name, m in model.mask.items()} if form.send_mask else model.mask,
        {name: torch.zeros_like(f) for name, f in model.frozen.items()} if form.send_frozen else model.frozen,
    )
    got = unpack(data, held, form)
    sent = {
        name: param.detach().masked_fill(~model.mask[name], 0) if name in model.mask else param
        for name, param in model.params.items()
    }
    for kind, left, right in [
        ("parameter", sent, got.params),
        ("buffer", model.buffers, got.buffers),
        ("mask", model.mask, got.mask),
        ("frozen set", _held(model), _held(got)),
    ]:
        _compare(form.label, kind, left, right)
    return got


def beside_size(tensors: Mapping[str, Tensor], live: Mapping[str, int], values: torch.dtype) -> int:
    """Bytes of `pack_beside`; `live` counts the positions sent of those tensors that are not sent whole."""
    sizes = {name: live.get(name, t.numel()) for name, t in tensors.items()}
    return HEADER + sum(size * on_wire(tensors[name].dtype, values).itemsize for name, size in sizes.items())


def pack_beside(tensors: Mapping[str, Tensor], live: Masks, form: Form = Form()) -> bytes:  # noqa: B008
    """Tensors as a message without a model: where `live` names one, its positions there, else whole."""
    raw = (_raw(t[live[name]] if name in live else t, form.values) for name, t in tensors.items())
    return seal(form.flags, [b"", b"".join(raw), b""], _known_beside(tensors, live, form))


def unpack_beside(data: bytes, like: Mapping[str, Tensor], live: Masks, form: Form = Form()) -> Params:  # noqa: B008
    """The tensors that were packed, of the shapes and types of `like`; 0 where they are not live.

    Raises RunError, naming the form's label, if `data` is not such a message.
    """
    with _Naming(form.label):
        sections = unseal(data, form.flags, _known_beside(like, live, form))
        masks, values, buffers = (Reader(section) for section in sections)
        masks.end()
        buffers.end()
        made: Params = {}
        for name, old in like.items():
            made[name] = torch.zeros_like(old)
            if name in live:
                size = int(live[name].count_nonzero())
                made[name][live[name]] = _read(values, old, size, form.values)
            else:
                made[name].copy_(_read(values, old, old.numel(), form.values).reshape(old.shape))
        values.end()
        return made


def deliver_beside(tensors: Mapping[str, Tensor], live: Masks, size: int, form: Form) -> Params:
    """As `deliver`, for tensors beside the model."""
    data = pack_beside(tensors, live, form)
    if len(data) != size:
        raise RunError(f"{form.label}: a message of {len(data)} bytes was charged as {size}")
    got = unpack_beside(data, {name: torch.zeros_like(t) for name, t in tensors.items()}, live, form)
    _compare(form.label, "tensor", tensors, got)
    return got


class _Naming:
    """What is wrong with a message is said with its label."""

    def __init__(self, label: str) -> None:
        self.label = label

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, CorruptError):
            raise RunError(f"{self.label}: {error}") from error


def _compare(label: str, kind: str, sent: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> None:
    for name in sent:
        # which NaN it is need not survive: a type of two bytes rounds it in several ways
        if _raw(_with_one_nan(sent[name])) != _raw(_with_one_nan(got[name])):
            raise RunError(f"{label}: {kind} {name!r} does not survive its message")


def _known(model: Message, form: Form) -> int:
    """CRC-32 of what both ends know without being told."""
    parts = [form.label, form.values]
    for tensors in model:
        parts += [(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]
    held = [*([] if form.send_mask else [model.mask]), *([] if form.send_frozen else [model.frozen])]
    return _crc(parts, [*held, form.reference or {}])


def _known_beside(tensors: Mapping[str, Tensor], live: Masks, form: Form) -> int:
    parts = [form.label, "beside", *((name, tuple(t.shape), t.dtype) for name, t in tensors.items())]
    return _crc(parts, [live])


def _crc(parts: Iterable[object], masks: Iterable[Masks]) -> int:
    known = zlib.crc32(repr(list(parts)).encode())
    for name, mask in (item for group in masks for item in group.items()):
        bits = np.packbits(mask.detach().reshape(-1).cpu().numpy())
        known = zlib.crc32(bits.tobytes(), zlib.crc32(name.encode(), known))
    return known


def _key(seed: Seed) -> bytes:
    return seed.key.to_bytes(SEED, "little", signed=True)


def _read_mask(reader: Reader, held: Masks, form: Form) -> Masks:
    """The mask of a message, on the devices of `held`."""
    if form.seed is None:
        read = read_masks(reader, {name: old.shape for name, old in held.items()}, form.reference)
    else:
        read = form.seed.masks(int.from_bytes(reader.take(SEED).tobytes(), "little", signed=True))
    return {name: read[name].to(old.device) for name, old in held.items()}


def _held(model: Message) -> Masks:
    """What is frozen of the weights that there are."""
    return {n: f & model.mask[n] if n in model.mask else f for n, f in model.frozen.items()}


def _places(model: Message, name: str) -> tuple[Tensor, Tensor]:
    """Positions of a parameter that every message carries, and frozen ones."""
    param, mask, frozen = model.params[name], model.mask.get(name), model.frozen.get(name)
    active = torch.ones(param.shape, dtype=torch.bool, device=param.device) if mask is None else mask
    still = torch.zeros_like(active) if frozen is None else frozen & active
    return active & ~still, still


def _among_active(model: Message) -> Masks:
    return {
        name: flags[model.mask[name]] if name in model.mask else flags.reshape(-1)
        for name, flags in model.frozen.items()
    }


def _spread(flags: Tensor, mask: Tensor | None, like: Tensor) -> Tensor:
    """Flags of the active positions, at their places."""
    flags = flags.to(like.device)
    return flags.reshape(like.shape) if mask is None else torch.zeros_like(like).masked_scatter_(mask, flags)


def _sums(masks: Masks) -> dict[str, int]:
    totals: Iterable[int] = (
        torch.stack([mask.count_nonzero() for mask in masks.values()]).tolist() if masks else ()
    )
    return dict(zip(masks, totals, strict=True))


def _with_one_nan(tensor: Tensor) -> Tensor:
    return tensor.masked_fill(tensor.isnan(), math.nan) if tensor.is_floating_point() else tensor


def _raw(tensor: Tensor, values: torch.dtype = torch.float32) -> bytes:
    flat = tensor.detach().reshape(-1).to(on_wire(tensor.dtype, values)).contiguous()
    return flat.view(torch.uint8).cpu().numpy().tobytes()


def _read(reader: Reader, like: Tensor, size: int, values: torch.dtype) -> Tensor:
    kind = on_wire(like.dtype, values)
    raw = reader.take(size * kind.itemsize)
    flat = torch.empty(size, dtype=kind)
    flat.view(torch.uint8).numpy()[:] = raw
    return flat.to(like.device, like.dtype)
