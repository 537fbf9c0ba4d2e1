"""Checkpoints: the whole state of a run in a folder of two files, replaced atomically."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import RunError
from .state import ServerState, moved_to

FORMAT = 1


def save(folder: Path, state: ServerState, ledger: dict[str, Any]) -> None:
    """Writes a checkpoint into `folder`, replacing the one there only when the new one is complete."""
    tensors: dict[str, Tensor] = {}
    plain = {
        "format": FORMAT,
        "round": state.round,
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
    fresh.mkdir(parents=True)
    save_file(tensors, fresh / "tensors.safetensors")
    with (fresh / "state.json").open("w", encoding="utf-8") as file:
        file.write(json.dumps(plain))  # six times as fast as json.dump: it lists every client seen
        file.flush()
        os.fsync(file.fileno())
    if folder.exists():  # a kill between the two renames leaves the old one, whole
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def load(folder: Path, device: torch.device | str = "cpu") -> tuple[ServerState, dict[str, Any]]:
    """The state and the ledger's of the last good checkpoint. Raises RunError if there is none to read."""
    old = folder.with_name(folder.name + ".old")
    source = folder if folder.exists() else old
    if not source.exists():
        raise RunError(
            f"{folder} does not exist: the run ended before its first checkpoint (output.checkpoint_every); "
            "start it anew"
        )
    try:
        plain = json.loads((source / "state.json").read_text(encoding="utf-8"))
        tensors = load_file(source / "tensors.safetensors")
        if plain["format"] != FORMAT:
            raise RunError(f"checkpoint {source} has format {plain['format']}; this version reads {FORMAT}")
        state = _join(plain["state"], tensors)
        rows = {int(client): row for client, row in state.pop("rows").items()}
        ledger: dict[str, Any] = state.pop("ledger")  # it and the rows rest on the host
        return ServerState(round=plain["round"], rows=rows, **moved_to(state, device)), ledger
    except (OSError, AttributeError, KeyError, TypeError, ValueError, SafetensorError) as error:
        what = f"{type(error).__name__} {error}"
        raise RunError(f"cannot read the checkpoint {source}, it is damaged: {what}") from None


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
    return content
