"""Values on the wire: the type in which floating-point numbers travel.

`float32` sends every tensor in its own type. `float16` and `bfloat16` round float32 and float64 to the
nearest value of that type (ties to even); the receiver goes on with the rounded values. Integers and bools
are never rounded. A finite value that would become infinite (above 65504 in float16) is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..errors import RunError

TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""Wire types by the name that the setting `ledger.values` gives them."""

ROUNDED = (torch.float32, torch.float64)


def on_wire(dtype: torch.dtype, values: torch.dtype) -> torch.dtype:
    """The type in which a tensor of `dtype` travels."""
    return values if values != torch.float32 and dtype in ROUNDED else dtype


def rounded(
    tensors: Mapping[str, Tensor], values: torch.dtype, where: Callable[[], str]
) -> dict[str, Tensor]:
    """The tensors as their receiver gets them, each in its own type; themselves under float32.

    Raises RunError, naming `where()`, for a finite value beyond the range of `values` (looks at the values:
    one transfer to the host).
    """
    if values == torch.float32:
        return dict(tensors)
    made = {name: t.to(on_wire(t.dtype, values)).to(t.dtype) for name, t in tensors.items()}
    beyond = {
        name: (t.isinf() & tensors[name].isfinite()).any()
        for name, t in made.items()
        if t.dtype in ROUNDED and t.numel()
    }
    if beyond:
        found = torch.stack([flag.reshape(()) for flag in beyond.values()]).tolist()
        for name, bad in zip(beyond, found, strict=True):
            if bad:
                kind = str(values).removeprefix("torch.")
                largest = tensors[name][tensors[name].isfinite()].abs().max().item()
                advice = "" if values == torch.bfloat16 else "'bfloat16' or "
                raise RunError(
                    f"{where()}: {name!r} holds {largest:g}, {kind} ends at {torch.finfo(values).max:g}; set "
                    f"ledger.values to {advice}'float32', or lower the learning rate"
                )
    return made
