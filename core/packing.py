"""Files of sparse models: `packed`, values and a bitmap, and `csr`, compressed sparse rows.

Both are safetensors. What is stored sparsely has its shape in the metadata and its pieces under `KIND/NAME`;
the rest is under `dense/NAME`. Positions whose bits are all 0 are left out, so that a negative zero comes
back, too. A SHA-256 over everything is in the metadata.

packed: `bitmap/NAME`, a bit for each position in C order, the first in the highest bit of the first byte
(`numpy.packbits`), and `values/NAME`. csr: `rows/NAME`, where each row begins and the last ends,
`columns/NAME`, both int32, and `values/NAME`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .disk import save_tensors
from .errors import RunError

Params = dict[str, Tensor]

LARGEST = 2**34
"""Bytes of a dense matrix that a csr file may name; a bitmap's length limits what a packed file may."""


class Stored(NamedTuple):
    """A file's pieces by `KIND/NAME`, and the shapes of what is stored sparsely."""

    pieces: Params
    shapes: dict[str, tuple[int, ...]]


def save_packed(path: Path, model: Mapping[str, Tensor], sparse: Iterable[str]) -> list[str]:
    """Writes a model, the tensors named `sparse` packed where that is shorter; returns these names."""

    def pieces(tensor: Tensor) -> Params:
        held = _held(tensor)
        bitmap = torch.from_numpy(np.packbits(held.numpy()))
        return {"bitmap": bitmap, "values": tensor.reshape(-1)[held]}

    return _save(path, "packed", model, sparse, pieces)


def load_packed(path: str | Path) -> Params:
    """The tensors of a packed file by name, bit for bit. Raises RunError if it is none, or is damaged."""
    path = Path(path)
    stored = _read(path, "packed", ("bitmap", "values"))

    def dense(name: str, shape: tuple[int, ...]) -> Tensor:
        bitmap, values = (stored.pieces[f"{kind}/{name}"] for kind in ("bitmap", "values"))
        size = math.prod(shape)
        _must(bitmap.dtype == torch.uint8 and bitmap.shape == (-(-size // 8),), f"the bitmap of {name}")
        bits = np.unpackbits(bitmap.numpy())
        _must(not bits[size:].any() and values.shape == (int(bits.sum()),), f"the values of {name}")
        flat = torch.zeros(size, dtype=values.dtype)
        flat[torch.from_numpy(bits[:size].astype(bool))] = values
        return flat.reshape(shape)

    return _restored(path, stored, dense)


def save_csr(path: Path, model: Mapping[str, Tensor], matrices: Iterable[str]) -> list[str]:
    """Writes a model, the `matrices` as CSR where that is shorter; returns the names of these."""

    def pieces(tensor: Tensor) -> Params:
        held = _held(tensor).reshape(tensor.shape)
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), held.sum(1).cumsum(0)])
        return {
            "rows": starts.to(torch.int32),
            "columns": held.nonzero()[:, 1].to(torch.int32),
            "values": tensor[held],
        }

    return _save(path, "csr", model, matrices, pieces)


def load_csr(path: str | Path) -> Params:
    """The dense tensors of a csr file by name, bit for bit. Raises RunError if it is none, or is damaged."""
    path = Path(path)
    stored = _read(path, "csr", ("rows", "columns", "values"))

    def dense(name: str, shape: tuple[int, ...]) -> Tensor:
        starts, columns, values = (stored.pieces[f"{kind}/{name}"] for kind in ("rows", "columns", "values"))
        fits = len(shape) == 2 and math.prod(shape) * values.element_size() <= LARGEST
        _must(fits and starts.dtype == torch.int32 and starts.shape == (shape[0] + 1,), f"the rows of {name}")
        counts = starts.diff()
        rising = int(starts[0]) == 0 and bool((counts >= 0).all())
        _must(rising and values.shape == (int(starts[-1]),), f"the rows of {name}")
        within = columns.dtype == torch.int32 and columns.shape == values.shape
        _must(within and bool(((columns >= 0) & (columns < shape[1])).all()), f"the columns of {name}")
        rows = torch.arange(shape[0]).repeat_interleave(counts)
        flat = rows * shape[1] + columns
        _must(bool((flat.diff() > 0).all()), f"the columns of {name}")
        matrix = torch.zeros(math.prod(shape), dtype=values.dtype)
        matrix[flat] = values
        return matrix.reshape(shape)

    return _restored(path, stored, dense)


def save_model(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors whole, with their SHA-256 in the metadata."""
    made = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    save_tensors(path, made, {"sha256": _digest(made, "")})


def load_model(path: Path) -> Params:
    """The tensors of `save_model`. Raises RunError if the file cannot be read or is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        raise RunError(f"cannot read {path}: {error}") from None
    if _digest(tensors, "") != metadata.get("sha256"):
        raise RunError(f"cannot read {path}: its SHA-256 is not the one that was written; play the run again")
    return tensors


class _DamageError(ValueError):
    """What is wrong in a file."""


def _must(fine: bool, what: str) -> None:
    if not fine:
        raise _DamageError(f"{what} and their shape do not fit")


def _held(tensor: Tensor) -> Tensor:
    """Which of the flat positions have a bit that is not 0."""
    raw = tensor.contiguous().reshape(-1).view(torch.uint8)
    return (raw.reshape(-1, tensor.element_size()) != 0).any(1)


def _save(
    path: Path,
    kind: str,
    model: Mapping[str, Tensor],
    sparse: Iterable[str],
    pieces: Callable[[Tensor], Params],
) -> list[str]:
    chosen = set(sparse)
    stored: Params = {}
    shapes: dict[str, list[int]] = {}
    for name, tensor in model.items():
        own = pieces(tensor) if name in chosen else {}
        if own and sum(piece.nbytes for piece in own.values()) < tensor.nbytes:
            shapes[name] = list(tensor.shape)
            stored |= {f"{piece}/{name}": t.contiguous() for piece, t in own.items()}
        else:
            stored[f"dense/{name}"] = tensor.contiguous()
    metadata = {"format": f"fedsparse.{kind}", "shapes": json.dumps(shapes)}
    try:
        save_tensors(path, stored, {**metadata, "sha256": _digest(stored, metadata["shapes"])})
    except (OSError, SafetensorError) as error:
        raise RunError(f"cannot write {path}: {error}") from None
    return list(shapes)


def _digest(pieces: Mapping[str, Tensor], shapes: str) -> str:
    digest = hashlib.sha256(shapes.encode())
    for name, tensor in sorted(pieces.items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(path: Path, kind: str, kinds: tuple[str, ...]) -> Stored:
    """The pieces of a file whose digest is right. Raises RunError."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != f"fedsparse.{kind}":
                raise RunError(f"{path} is no {kind} model: write one with `fedsparse export`")
            pieces = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        if _digest(pieces, metadata.get("shapes", "")) != metadata.get("sha256"):
            raise _DamageError("its SHA-256 is not the one that was written")
        listed = json.loads(metadata["shapes"])
        expected = {f"{piece}/{name}" for name in listed for piece in kinds}
        if {name for name in pieces if not name.startswith("dense/")} != expected:
            raise _DamageError("tensors are missing, or have no shape")
        if not all(type(size) is int and size >= 0 for shape in listed.values() for size in shape):
            raise _DamageError("a shape is none")
    except (OSError, SafetensorError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(path, error) from None
    return Stored(pieces, {name: tuple(shape) for name, shape in listed.items()})


def _restored(path: Path, stored: Stored, dense: Callable[[str, tuple[int, ...]], Tensor]) -> Params:
    whole = {n.removeprefix("dense/"): t for n, t in stored.pieces.items() if n.startswith("dense/")}
    try:
        return whole | {name: dense(name, shape) for name, shape in stored.shapes.items()}
    except _DamageError as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> RunError:
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return RunError(f"cannot read {path}: {reason}; export the run again")
