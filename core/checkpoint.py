"""Checkpoints: the whole state of a run in a folder of two files and their SHA-256, replaced atomically.

The one before stays beside it, as `checkpoint.old`. `sha256sum --check sha256` finds damage, too.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .disk import save_tensors, writing
from .errors import RunError
from .hookspecs import SLOTS
from .resolve import Resolved
from .state import Params, ServerState, moved_to
from .tracking import versions

FORMAT = 3
FILES = ("state.json", "tensors.safetensors")
SUMS = "sha256"


def save(folder: Path, state: ServerState, ledger: dict[str, Any], made_by: Mapping[str, Any]) -> None:
    """Writes a checkpoint into `folder`, replacing the one there only when the new one is complete.

    `made_by` says what decides how the run goes on (`identity` of a run); who goes on must say the same.
    Raises DiskError if it cannot be written; the one there is left as it is.
    """
    tensors: dict[str, Tensor] = {}
    plain = {
        "format": FORMAT,
        "round": state.round,
        "made_by": made_by,
        "state": _split(
            {
                "ledger": ledger,
                "params": state.params,
                "buffers": state.buffers,
                "mask": state.mask,
                "frozen": state.frozen,
                "memory": state.memory,
                "rows": {str(client): row for client, row in state.rows.items()},
            },
            "",
            tensors,
        ),
    }
    fresh, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    shutil.rmtree(fresh, ignore_errors=True)
    with writing(folder):
        try:
            fresh.mkdir()
            save_tensors(fresh / "tensors.safetensors", tensors)
            with (fresh / "tensors.safetensors").open("rb") as file:
                os.fsync(file.fileno())
            with (fresh / "state.json").open("w", encoding="utf-8") as file:
                file.write(json.dumps(plain))  # six times as fast as json.dump: it lists every client seen
                file.flush()
                os.fsync(file.fileno())
            with (fresh / SUMS).open("wb") as file:
                file.write(_sums(fresh))
                file.flush()
                os.fsync(file.fileno())
            if folder.exists():  # a kill between the two renames leaves the old one, whole
                shutil.rmtree(old, ignore_errors=True)
                folder.rename(old)
            fresh.rename(folder)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)  # on a full disk it would take the space of the next
            raise


def load(
    folder: Path,
    made_by: Mapping[str, Any],
    device: torch.device | str = "cpu",
    say: Callable[[str], None] = lambda text: None,
) -> tuple[ServerState, dict[str, Any]]:
    """The state and the ledger's of the last checkpoint, or of the one before if that is damaged.

    Raises RunError if there is none to read, or if `made_by` is another than it was saved with.
    """
    sources = [path for path in (folder, folder.with_name(folder.name + ".old")) if path.exists()]
    if not sources:
        raise RunError(
            f"{folder} does not exist: the run ended before its first checkpoint (output.checkpoint_every); "
            "start it anew"
        )
    try:
        return _read(sources[0], made_by, device)
    except DamagedError as error:
        if len(sources) == 1:
            raise
        say(f"{error}. Going on from the one before, {sources[1]}")
        return _read(sources[1], made_by, device)


def check(state: ServerState, params: Params, buffers: Params, masked: Iterable[str]) -> None:
    """Raises RunError unless the state is one of this model, whose `masked` parameters have masks."""
    flags = {name: torch.empty(params[name].shape, dtype=torch.bool, device="meta") for name in masked}
    others = {name: torch.empty(p.shape, dtype=torch.bool, device="meta") for name, p in params.items()}
    for what, given, wanted, allowed in (
        ("parameter", state.params, params, params),
        ("buffer", state.buffers, buffers, buffers),
        ("mask", state.mask, flags, flags),
        ("frozen set", state.frozen, flags, others),
    ):
        if not isinstance(given, dict):
            raise RunError(f"it has no {what}s")
        for name in {**wanted, **given}:
            like, got = allowed.get(name), given.get(name)
            if like is None or not isinstance(got, Tensor) or _form(got) != _form(like):
                raise RunError(f"its {what} {name!r} is not one of this run's model")
    if not isinstance(state.memory, dict):
        raise RunError("it has no memory")


def _form(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype


class DamagedError(RunError):
    """A checkpoint that cannot be read."""


def _read(
    source: Path, made_by: Mapping[str, Any], device: torch.device | str
) -> tuple[ServerState, dict[str, Any]]:
    try:
        sums = source / SUMS
        listed = sums.read_bytes() if sums.exists() else None
        if listed is not None and listed != _sums(source):
            raise ValueError(f"its files have not the SHA-256 that the file {SUMS} names")
        plain = json.loads((source / FILES[0]).read_text(encoding="utf-8"))
        if plain["format"] != FORMAT:
            raise RunError(f"checkpoint {source} has format {plain['format']}; this version reads {FORMAT}")
        if listed is None:
            raise ValueError(f"its file {SUMS} is missing")
        tensors = load_file(source / FILES[1])
        if different := differences(plain["made_by"], json.loads(json.dumps(made_by))):
            raise RunError(
                f"{source} was made by another run: {'; '.join(different)}. Go on with what made it, or "
                "start anew"
            )
        if type(plain["round"]) is not int or plain["round"] < 0:
            raise ValueError(f"its round is {plain['round']!r}")
        state = _join(plain["state"], tensors)
        rows = {int(client): row for client, row in state.pop("rows").items()}
        ledger: dict[str, Any] = state.pop("ledger")  # it and the rows rest on the host
        return ServerState(round=plain["round"], rows=rows, **moved_to(state, device)), ledger
    except (
        OSError,
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
        RecursionError,
        SafetensorError,
    ) as error:
        what = f"{type(error).__name__} {error}"
        raise DamagedError(f"cannot read the checkpoint {source}, it is damaged: {what}") from None


def identity(resolved: Resolved) -> dict[str, Any]:
    """What decides how a run goes on: its settings, its parts' code, and versions.

    Where data and results are, and how fast it runs, is left out.
    """
    settings = {
        name: values for name, values in resolved.tree().items() if name not in ("execution", "output")
    }
    for section, name in (("task", "data_root"), ("task", "download")):
        del settings[section][name]
    sources = {}
    for part in (*(resolved.method.part(slot) for slot in SLOTS), *resolved.config.method.extras):
        module = inspect.getsourcefile(type(part))
        name = f"{type(part).__name__} of {Path(module).name}" if module else type(part).__name__
        sources[name] = hashlib.sha256(_code(Path(module)) if module else b"").hexdigest()[:16]
    return {"settings": settings, "code": sources, "versions": versions()}


def _code(module: Path) -> bytes:
    """What a module does: its syntax tree without docstrings; comments are not in it."""
    tree = ast.parse(module.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            node.body = node.body[1:]
    return ast.dump(tree).encode()


def differences(there: Mapping[str, Any], here: Mapping[str, Any], path: str = "") -> list[str]:
    """What two nested tables differ in: "path: value there, value here"."""
    found = []
    for name in {**there, **here}:
        one, other, where = there.get(name), here.get(name), f"{path}.{name}" if path else str(name)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            found += differences(one, other, where)
        elif one != other:
            found.append(f"{where} was {one!r}, is {other!r}")
    return found


def _sums(folder: Path) -> bytes:
    """The SHA-256 of a checkpoint's files, as sha256sum writes them."""
    lines = []
    for name in FILES:
        with (folder / name).open("rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {name}\n")
    return "".join(lines).encode()


def _split(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Moves tensors out of nested dicts into `tensors`; {"tensor": path} marks their places."""
    if isinstance(value, Tensor):
        tensors[path] = value.detach().clone().contiguous().cpu()
        return {"tensor": path}
    if isinstance(value, dict):
        return {"dict": {name: _split(item, f"{path}/{name}", tensors) for name, item in value.items()}}
    return {"plain": value}


def _join(value: Any, tensors: dict[str, Tensor]) -> Any:
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {name: _join(item, tensors) for name, item in content.items()}
    if kind != "plain":
        raise ValueError(f"unknown kind of entry {kind!r}")
    return content
