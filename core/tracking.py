"""The folder of a run: configuration, metrics, summary, and the final model."""

from __future__ import annotations

import itertools
import json
import math
import platform
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .errors import RunError
from .packing import save_model
from .provenance import about
from .resolve import Resolved
from .state import Params, ServerState

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]

SHOWN = (
    "round",
    "test_accuracy",
    "client_accuracy",
    "test_loss",
    "train_loss",
    "sparsity",
    "upload_bytes_total",
    "download_bytes_total",
    "paper_bytes_total",
    "flops_total",
)


class RunFolder:
    """Writes what a run leaves behind. Nothing that exists is overwritten, unless its run is resumed."""

    def __init__(self, resolved: Resolved, path: Path | None = None, *, resume_at: int | None = None) -> None:
        """Makes the folder: `path`, or a new one under `output.root`; or goes on in it at a round.

        Raises RunError if `path` exists and is not an empty folder, or cannot be made.
        """
        self.resolved = resolved
        self.last: dict[str, Any] = {}
        self.best: dict[str, Any] = {}
        try:
            if path is not None and resume_at is not None:
                self._go_on(path, resume_at)
                return
            if path is None:
                path = _make_free(resolved)
            else:
                refuse_taken(path)
                path.mkdir(parents=True, exist_ok=True)
            self.path = path
            # "x": two runs that start together cannot share a folder
            with (path / "config.toml").open("x", encoding="utf-8") as file:
                file.write(resolved.toml(provenance=True))
            self._hold()
            self._metrics = (path / "metrics.jsonl").open("x", encoding="utf-8")
        except (OSError, ValueError) as error:
            raise RunError(f"cannot write to {path or resolved.config.output.root}: {error}") from None

    def _go_on(self, path: Path, round_: int) -> None:
        """Opens a folder again; lines of rounds that the checkpoint does not know are played anew."""
        self.path = path
        self._hold()
        try:
            lines = (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[:round_]
            kept = [json.loads(line) for line in lines]
        except (OSError, ValueError) as error:
            raise RunError(f"cannot read {path / 'metrics.jsonl'}: {error}") from None
        if [line.get("round") for line in kept] != list(range(round_)):
            self._held.close()
            raise RunError(f"{path / 'metrics.jsonl'} lacks rounds that the checkpoint has; it is damaged")
        (path / "error.log").unlink(missing_ok=True)
        self._metrics = (path / "metrics.new").open("w", encoding="utf-8")
        for line in kept:
            self.record(line)
        (path / "metrics.new").rename(path / "metrics.jsonl")

    def _hold(self) -> None:
        """Keeps other runs out of the folder until this process ends. Raises RunError if one is in it."""
        self._held = (self.path / "config.toml").open("r", encoding="utf-8")
        if fcntl is None:
            return  # Windows has no such lock
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._held.close()
            raise RunError(f"a run is going on in {self.path}; wait for its end") from None

    def record(self, metrics: Mapping[str, Any]) -> None:
        """Appends a line to `metrics.jsonl`."""
        plain = {name: _plain(value) for name, value in metrics.items()}
        self._metrics.write(json.dumps(plain) + "\n")
        self._metrics.flush()
        self.last = {**self.last, **metrics}
        accuracy = metrics.get("test_accuracy")
        if accuracy is not None and accuracy > self.best.get("test_accuracy", -1.0):
            self.best = dict(metrics)

    def finish(
        self,
        state: ServerState,
        weights: Params,
        *,
        device: torch.device,
        workers: int,
        clients: int,
        wall_seconds: float,
        interrupted: bool = False,
    ) -> dict[str, Any]:
        """Writes model, mask and `summary.json`; returns the summary.

        `weights` are what the layers use, `clients` those of the pool that hold data.
        """
        self._metrics.close()
        self._held.close()
        tensors = {**weights, **state.buffers}
        save_model(self.path / "model.safetensors", tensors)
        save_model(self.path / "mask.safetensors", state.mask)
        summary = {
            "final": {name: self.last[name] for name in SHOWN if name in self.last},
            "best": {name: self.best[name] for name in SHOWN if name in self.best},
            "seed": self.resolved.config.seed,
            "method": self.resolved.method.name,
            "swaps": dict(self.resolved.swaps),
            **about(self.resolved),
            "interrupted": interrupted,
            "rounds": self.last.get("round", -1) + 1,
            "versions": versions(),
            "device": str(device),
            "workers": workers,
            "clients": clients,
            "wall_seconds": round(wall_seconds, 2),
            "parameters": sum(p.numel() for p in state.params.values()),
            "buffers": sum(b.numel() for b in state.buffers.values()),
            "nonzero": sum(int(w.count_nonzero()) for w in weights.values()),
        }
        (self.path / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        return summary

    def fail(self, text: str) -> None:
        """Keeps the traceback of a failed run for the author of a plugin."""
        self._metrics.close()
        self._held.close()
        (self.path / "error.log").write_text(text, encoding="utf-8")


def refuse_taken(path: Path) -> None:
    """Raises RunError if `path` exists and is not an empty folder."""
    try:
        taken = path.exists() and (not path.is_dir() or any(path.iterdir()))
    except (OSError, ValueError) as error:
        raise RunError(f"cannot write to {path}: {error}") from None
    if taken:
        raise RunError(f"{path} exists and is not an empty folder; name another with --out")


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    found = {"python": platform.python_version()}
    for name in ("fedsparse", "torch", "torchvision", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _make_free(resolved: Resolved) -> Path:
    """Makes `runs/pffdst-digits-seed0`, with the first number at its end that is not taken."""
    config = resolved.config
    swaps = "".join(f"+{slot}={Path(use).name}" for slot, use in resolved.swaps.items())
    name = f"{resolved.method.name}{swaps}-{resolved.uses['task.dataset']}-seed{config.seed}"
    name = re.sub(r"[^\w+=.-]", ".", name)
    for number in itertools.count(1):
        path = config.output.root / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        break
    return path
