"""The folder of a run: configuration, metrics, summary, and the final model."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import math
import os
import platform
import re
import traceback
from collections import Counter
from collections.abc import Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .disk import DiskError, replace, writing
from .errors import RunError
from .folders import refuse_taken
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
    "epsilon",
    "delta",
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
        self.lost: Counter[str] = Counter()
        self.seconds_before = 0.0
        """of the rounds that earlier sessions of a resumed run played"""
        made = False
        try:
            if path is not None and resume_at is not None:
                self.path = path
                self._hold()
                try:
                    self._go_on(path, resume_at)
                except BaseException:
                    self._held.close()  # the same process may try again
                    raise
                return
            if path is None:
                path = _make_free(resolved)
            else:
                refuse_taken(path)
                path.mkdir(parents=True, exist_ok=True)
            self.path = path
            # "x": two runs that start together cannot share a folder
            with (path / "config.toml").open("x", encoding="utf-8") as file:
                made = True
                file.write(resolved.toml(provenance=True))
            self._hold()
            try:
                self._metrics = (path / "metrics.jsonl").open("x", encoding="utf-8")
            except OSError:
                self._held.close()
                raise
        except (OSError, ValueError) as error:
            if path is not None and made:  # the same command works when there is space
                (path / "config.toml").unlink(missing_ok=True)
            raise RunError(f"cannot write to {path or resolved.config.output.root}: {error}") from None

    def _go_on(self, path: Path, round_: int) -> None:
        """Opens a folder again; lines of rounds that the checkpoint does not know are played anew."""
        try:
            lines = (path / "metrics.jsonl").read_bytes().splitlines()[:round_]  # a later one may be half
            kept = [json.loads(line) for line in lines]
        except (OSError, ValueError) as error:
            raise RunError(f"cannot read {path / 'metrics.jsonl'}: {error}") from None
        if [line.get("round") for line in kept] != list(range(round_)):
            raise RunError(f"{path / 'metrics.jsonl'} lacks rounds that the checkpoint has; it is damaged")
        for log in path.glob("error*.log"):
            log.unlink()
        fresh = path / "metrics.new"
        with writing(fresh):
            self._metrics = fresh.open("w", encoding="utf-8")
        try:
            for line in kept:
                self.record(line)
        except DiskError:
            fresh.unlink(missing_ok=True)
            self.close()
            raise
        fresh.rename(path / "metrics.jsonl")
        self.seconds_before = sum(line["seconds"] for line in kept)

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
        """Appends a line to `metrics.jsonl`. Raises DiskError if it cannot, or if the file was removed."""
        plain = {name: _plain(value) for name, value in metrics.items()}
        path = self.path / "metrics.jsonl"
        with writing(path):
            self._metrics.write(json.dumps(plain) + "\n")
            self._metrics.flush()
            if not os.fstat(self._metrics.fileno()).st_nlink:
                raise FileNotFoundError(errno.ENOENT, "it was removed while the run went on")
        self.last = {**self.last, **metrics}
        self.lost.update({reason: len(clients) for reason, clients in metrics.get("lost", {}).items()})
        accuracy = metrics.get("test_accuracy")
        if accuracy is not None and accuracy > self.best.get("test_accuracy", -1.0):
            self.best = dict(metrics)

    def settle(self) -> None:
        """Returns when the lines so far are on the disk, so that no checkpoint is ahead of them."""
        with writing(self.path / "metrics.jsonl"):
            os.fsync(self._metrics.fileno())

    def close(self) -> None:
        """Lets the folder go."""
        with contextlib.suppress(OSError):  # what a full disk did not take is tried once more, and lost
            self._metrics.close()
        self._held.close()

    def finish(
        self,
        state: ServerState,
        weights: Params,
        *,
        device: torch.device,
        workers: int,
        clients: int,
        wall_seconds: float,
        ended_by: str | None = None,
    ) -> dict[str, Any]:
        """Writes model, mask and, when these are whole, `summary.json`; returns the summary.

        `weights` are what the layers use, `clients` those of the pool that hold data, `wall_seconds` those of
        this session, `ended_by` names the signal that ended the run early. Raises DiskError.
        """
        self.close()
        for name, tensors in (("model", {**weights, **state.buffers}), ("mask", state.mask)):
            replace(self.path / f"{name}.safetensors", partial(save_model, tensors=tensors))
        summary = {
            "final": _shown(self.last),
            "best": _shown(self.best),
            "seed": self.resolved.config.seed,
            "method": self.resolved.method.name,
            "swaps": dict(self.resolved.swaps),
            "extras": dict(self.resolved.extras),
            **about(self.resolved),
            "interrupted": ended_by is not None,
            **({} if ended_by is None else {"signal": ended_by}),
            "rounds": self.last.get("round", -1) + 1,
            **({"lost": dict(sorted(self.lost.items()))} if self.lost else {}),
            "versions": versions(),
            "device": str(device),
            "workers": workers,
            "clients": clients,
            "wall_seconds": round(self.seconds_before + wall_seconds, 2),
            "parameters": sum(p.numel() for p in state.params.values()),
            "buffers": sum(b.numel() for b in state.buffers.values()),
            "nonzero": sum(int(w.count_nonzero()) for w in weights.values()),
        }
        text = json.dumps(summary, indent=2) + "\n"
        replace(self.path / "summary.json", lambda fresh: fresh.write_text(text, encoding="utf-8"))
        return summary


def finished(path: Path) -> bool:
    """Whether the run in a folder has written all that it leaves."""
    try:
        return json.loads((path / "summary.json").read_bytes()).get("interrupted") is False
    except (OSError, ValueError, AttributeError):
        return False


def keep_traceback(folder: Path, worker: int = 0) -> Path | None:
    """Keeps the traceback that is being handled for the author of a plugin; None if it cannot be written."""
    log = folder / (f"error-worker{worker}.log" if worker else "error.log")
    try:
        log.write_text(traceback.format_exc(), encoding="utf-8")
    except OSError:
        return None
    return log


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    found = {"python": platform.python_version()}
    for name in ("fedsparse", "torch", "torchvision", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def _shown(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The figures that a summary shows; a round that nobody reported in has no training loss."""
    return {name: metrics[name] for name in SHOWN if _plain(metrics.get(name)) is not None}


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _make_free(resolved: Resolved) -> Path:
    """Makes `runs/pffdst-digits-seed0`, with the first number at its end that is not taken."""
    config = resolved.config
    swaps = "".join(f"+{slot}={Path(use).name}" for slot, use in resolved.swaps.items())
    swaps += "".join(f"+{extra}" for extra in resolved.extras)
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
