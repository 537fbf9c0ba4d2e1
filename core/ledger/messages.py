"""Messages: what server and client really send, and its exact size.

A message is a row of sections without headers:

1. the mask (`send_mask`), as `codecs` writes it;
2. what is frozen (`send_frozen`): a flag for each *active* position, written as a mask, and then the values
   of the frozen positions. Frozen ⊆ mask, so the flags of inactive positions need no bytes;
3. the values of the active positions that are not frozen, parameter after parameter, and parameters without
   a mask whole except for what is frozen;
4. the buffers whole.

Values are raw, `element_size` bytes each (float32: 4, an int64 counter: 8). Which sections a message has,
and which mask an encoded mask refers to, follows from what both ends know of each other (the versions of
mask and frozen set that the client holds); that envelope, like names and shapes, is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import RunError
from ..state import Masks, Params
from .codecs import Reader, encode_masks, masks_size, read_masks


class Message(NamedTuple):
    """A model at one end of the wire: tensors by name.

    `mask` covers every prunable parameter. `frozen` covers any parameters (none: nothing is frozen); its
    names, like those of the mask, are the same at both ends.
    """

    params: Params
    buffers: Params
    mask: Masks
    frozen: Masks


class Count(NamedTuple):
    """Positions of one parameter: those that train (or have no mask) and those that are frozen."""

    live: int
    still: int


@dataclass(frozen=True)
class MessageSize:
    """Bytes of each section of a message; computed once, then `total` is arithmetic."""

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

    def total(self, *, send_mask: bool = False, send_frozen: bool = False) -> int:
        """Bytes of the message with these sections: `len(pack(…))`."""
        first = self.frozen_mask + self.frozen_values if send_frozen else 0
        return self.values + self.dense + self.buffers + first + (self.mask if send_mask else 0)


def count(params: Mapping[str, Tensor], mask: Masks, frozen: Masks) -> dict[str, Count]:
    """Live and frozen positions of every parameter; one transfer to the host per kind."""
    active = _sums(mask)
    still = _sums({name: mask[name] & flags if name in mask else flags for name, flags in frozen.items()})
    return {
        name: Count(active.get(name, param.numel()) - still.get(name, 0), still.get(name, 0))
        for name, param in params.items()
    }


def measure(
    model: Message, reference: Masks | None = None, *, counts: Mapping[str, Count] | None = None
) -> MessageSize:
    """Size of each section of `model` as a message; `counts` are those of `count`, if they are at hand."""
    counts = counts or count(model.params, model.mask, model.frozen)
    width = {name: param.element_size() for name, param in model.params.items()}
    return MessageSize(
        values=sum(counts[name].live * width[name] for name in model.mask),
        frozen_values=sum(counts[name].still * width[name] for name in model.params),
        dense=sum(counts[name].live * width[name] for name in model.params if name not in model.mask),
        buffers=sum(b.numel() * b.element_size() for b in model.buffers.values()),
        mask=masks_size(model.mask, reference),
        frozen_mask=masks_size(_among_active(model)),
    )


def message_size(
    model: Message, *, send_mask: bool = False, send_frozen: bool = False, reference: Masks | None = None
) -> int:
    """Bytes of `pack` with the same arguments, without building them."""
    return measure(model, reference).total(send_mask=send_mask, send_frozen=send_frozen)


def pack(
    model: Message, *, send_mask: bool = False, send_frozen: bool = False, reference: Masks | None = None
) -> bytes:
    """The message; `reference` is the mask that the receiver holds, if it is known."""
    places = {name: _places(model, name) for name in model.params}
    chunks: list[bytes] = []
    if send_mask:
        chunks.append(encode_masks(model.mask, reference))
    if send_frozen:
        chunks.append(encode_masks(_among_active(model)))
        chunks += [_raw(model.params[name][still]) for name, (_, still) in places.items()]
    chunks += [_raw(model.params[name][live]) for name, (live, _) in places.items()]
    chunks += [_raw(buffer) for buffer in model.buffers.values()]
    return b"".join(chunks)


def unpack(
    data: bytes,
    held: Message,
    *,
    send_mask: bool = False,
    send_frozen: bool = False,
    reference: Masks | None = None,
) -> Message:
    """The model that was packed, on the devices of `held`; parameters are 0 wherever the mask is off.

    `held` is what the receiver has: names, shapes and dtypes; the mask unless it is sent; the frozen flags
    and the values under them unless they are sent. Raises RunError if `data` is not such a message.
    """
    reader = Reader(data)
    mask, frozen = held.mask, held.frozen
    if send_mask:
        read = read_masks(reader, {name: old.shape for name, old in held.mask.items()}, reference)
        mask = {name: new.to(held.mask[name].device) for name, new in read.items()}
    if send_frozen:
        active = _sums(mask)
        shapes = {name: torch.Size([active.get(name, old.numel())]) for name, old in frozen.items()}
        frozen = {
            name: _spread(flags, mask.get(name), frozen[name])
            for name, flags in read_masks(reader, shapes).items()
        }
    params = {name: param.detach().clone() for name, param in held.params.items()}
    model = Message(params, {}, mask, frozen)
    places = {name: _places(model, name) for name in params}
    for name, (_, still) in places.items():
        params[name].masked_fill_(~still, 0)
        if send_frozen:
            params[name][still] = _read(reader, params[name], int(still.count_nonzero()))
    for name, (live, _) in places.items():
        params[name][live] = _read(reader, params[name], int(live.count_nonzero()))
    for name, old in held.buffers.items():
        model.buffers[name] = _read(reader, old, old.numel()).reshape(old.shape)
    reader.end()
    return model


def prove(
    model: Message,
    size: int,
    *,
    send_mask: bool = False,
    send_frozen: bool = False,
    reference: Masks | None = None,
) -> None:
    """Pack, unpack and compare bit for bit; RunError if the copy or the number of bytes is not as claimed."""
    data = pack(model, send_mask=send_mask, send_frozen=send_frozen, reference=reference)
    if len(data) != size:
        raise RunError(f"a message of {len(data)} bytes was charged as {size}")
    # the receiver has nothing but what the message may leave out
    known = {} if send_frozen else model.frozen
    held = Message(
        {
            name: param.detach().masked_fill(~known[name], math.nan)
            if name in known
            else torch.full_like(param, math.nan)
            for name, param in model.params.items()
        },
        {name: torch.zeros_like(buffer) for name, buffer in model.buffers.items()},
        {name: torch.zeros_like(mask) for name, mask in model.mask.items()} if send_mask else model.mask,
        {name: torch.zeros_like(flags) for name, flags in model.frozen.items()} if send_frozen else known,
    )
    got = unpack(data, held, send_mask=send_mask, send_frozen=send_frozen, reference=reference)
    sent = {
        name: param.detach().masked_fill(~model.mask[name], 0) if name in model.mask else param
        for name, param in model.params.items()
    }
    for kind, left, right in [
        ("parameter", sent, got.params),
        ("buffer", model.buffers, got.buffers),
        ("mask", model.mask, got.mask),
    ]:
        for name in left:
            if _raw(left[name]) != _raw(right[name]):
                raise RunError(f"{kind} {name!r} does not survive its message")


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


def _raw(values: Tensor) -> bytes:
    flat = values.detach().reshape(-1).contiguous()
    return flat.view(torch.uint8).cpu().numpy().tobytes()


def _read(reader: Reader, like: Tensor, size: int) -> Tensor:
    raw = reader.take(size * like.element_size())
    values = torch.empty(size, dtype=like.dtype)
    values.view(torch.uint8).numpy()[:] = raw
    return values.to(like.device)
