"""The folder of a run: configuration, metrics, summary, and the final model."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from .errors import RunError
from .resolve import Resolved
from .state import ServerState

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
    """Writes what a run leaves behind. Nothing that exists is overwritten."""

    def __init__(self, resolved: Resolved, path: Path | None = None) -> None:
        """Makes the folder: `path`, or a new one under `output.root`.

        Raises RunError if `path` exists and is not an empty folder, or cannot be made.
        """
        self.resolved = resolved
        self.path = path or _free(resolved)
        refuse_taken(self.path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / "config.toml").write_text(resolved.toml(), encoding="utf-8")
            self._metrics = (self.path / "metrics.jsonl").open("w", encoding="utf-8")
        except OSError as error:
            raise RunError(f"cannot write to {self.path}: {error.strerror}") from None
        self.last: dict[str, Any] = {}
        self.best: dict[str, Any] = {}

    def record(self, metrics: Mapping[str, Any]) -> None:
        """Appends a line to `metrics.jsonl`."""
        self._metrics.write(json.dumps(metrics) + "\n")
        self._metrics.flush()
        self.last = {**self.last, **metrics}
        accuracy = metrics.get("test_accuracy")
        if accuracy is not None and accuracy > self.best.get("test_accuracy", -1.0):
            self.best = dict(metrics)

    def finish(
        self, state: ServerState, *, device: torch.device, wall_seconds: float, interrupted: bool = False
    ) -> dict[str, Any]:
        """Writes model, mask and `summary.json`; returns the summary."""
        self._metrics.close()
        tensors = {**state.params, **state.buffers}
        save_file(
            {name: t.contiguous().cpu() for name, t in tensors.items()}, self.path / "model.safetensors"
        )
        save_file(
            {name: m.contiguous().cpu() for name, m in state.mask.items()}, self.path / "mask.safetensors"
        )
        summary = {
            "final": {name: self.last[name] for name in SHOWN if name in self.last},
            "best": {name: self.best[name] for name in SHOWN if name in self.best},
            "seed": self.resolved.config.seed,
            "method": self.resolved.method.name,
            "swaps": dict(self.resolved.swaps),
            "interrupted": interrupted,
            "rounds": self.last.get("round", -1) + 1,
            "versions": versions(),
            "device": str(device),
            "workers": 1,
            "wall_seconds": round(wall_seconds, 2),
            "parameters": sum(p.numel() for p in state.params.values()),
            "nonzero": sum(int(p.count_nonzero()) for p in state.params.values()),
        }
        (self.path / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        return summary

    def fail(self, text: str) -> None:
        """Keeps the traceback of a failed run for the author of a plugin."""
        self._metrics.close()
        (self.path / "error.log").write_text(text, encoding="utf-8")


def refuse_taken(path: Path) -> None:
    """Raises RunError if `path` exists and is not an empty folder."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
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


def _free(resolved: Resolved) -> Path:
    """`runs/pffdst-digits-seed0`, with the first number at its end that is not taken."""
    config = resolved.config
    dataset = resolved.uses["task.dataset"]
    swaps = "".join(f"+{slot}={use}" for slot, use in resolved.swaps.items())
    name = f"{resolved.method.name}{swaps}-{dataset}-seed{config.seed}".replace("/", "_").replace(":", ".")
    path, number = config.output.root / name, 2
    while path.exists():
        path, number = config.output.root / f"{name}-{number}", number + 1
    return path
