"""Measures a work: all contenders in turn, round by round, in every worker."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...core import task as tasks
from ...core.errors import FedsparseError, RunError
from ...core.execution import workers
from .contenders import Contender, configured, gather
from .floor import floor

BASES = ("bare", "fedavg")  # whom every contender is compared with


class Plan(NamedTuple):
    """What to measure on each work."""

    methods: tuple[str, ...]
    repeats: int
    executors: bool = True


def measure(work: str, plan: Plan) -> dict[str, Any]:
    """The figures of a work, among the workers that this process belongs to; the first one's count."""
    resolved = configured(work)
    me = workers.join(device=resolved.config.execution.device)
    task = tasks.build(resolved.config)
    contenders, refused = gather(work, task, plan.methods, plan.executors)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    # what a graph computes with lies in a pool of its own, and is in no peak
    memory: dict[str, int | None] = {name: None if one.captures else 0 for name, one in contenders.items()}
    for number in range(plan.repeats + 1):
        for name, contender in list(contenders.items()):
            try:
                taken, peak = _timed(name, contender, number, task.device, me)
            except (RunError, torch.OutOfMemoryError) as error:
                if me.size > 1 or name in BASES:
                    raise
                refused[name] = str(error)  # alone, the others go on without it
                del contenders[name], seconds[name]
                continue
            if number:  # round 0 warms up, and captures
                seconds[name].append(taken)
                if (most := memory[name]) is not None:
                    memory[name] = max(most, peak)
    gpu = task.device.type == "cuda"
    found = {
        "work": work,
        "workers": me.size,
        "device": torch.cuda.get_device_name(task.device) if gpu else "cpu",
        "parameters": sum(p.numel() for p in task.model.parameters()),
        "contenders": {
            name: summary(seconds, name) | ({"gpu_bytes": memory[name]} if gpu else {}) for name in seconds
        },
        "floor": floor(task, resolved.config.execution.precision, range(1, plan.repeats + 1), me.size),
        "refused": refused,
        "settings": resolved.tree(),
    }
    workers.leave()
    return found


def _timed(
    name: str, contender: Contender, number: int, device: torch.device, me: workers.Workers
) -> tuple[float, int]:
    """Seconds of one round, started by all workers together, and what it takes of the GPU's memory, bytes.

    That is its peak, less what all contenders hold between rounds: data, models, captured graphs.
    """
    gpu, held = device.type == "cuda", 0
    if gpu:
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
    me.wait()
    started = time.perf_counter()
    try:
        contender.round(number)
    except FedsparseError as error:
        raise RunError(f"{name}: {error}") from error
    if gpu:
        torch.cuda.synchronize(device)
    return time.perf_counter() - started, torch.cuda.max_memory_allocated(device) - held if gpu else 0


def _bytes(peak: int) -> int:
    """Peak memory as the system counts it: macOS in bytes, Linux in KiB."""
    return peak if sys.platform == "darwin" else peak * 1024


def summary(seconds: dict[str, list[float]], name: str) -> dict[str, Any]:
    """A contender's seconds, and its ratios to each base, paired by round."""
    own = seconds[name]
    ratios = {
        base: spread([mine / theirs for mine, theirs in zip(own, seconds[base], strict=True)])
        for base in BASES
    }
    return {"seconds": own, **spread(own), "ratios": ratios}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def single_round(work: str, count: int) -> dict[str, float]:
    """Seconds and peak memory of `fedsparse run` for one round: start, data, round, evaluation.

    The memory is that of the largest of its processes.
    """
    code = "from fedsparse.cli.main import main; main()"
    with tempfile.TemporaryDirectory(prefix="fedsparse-") as folder:
        where = ["--workers", str(count), "--out", str(Path(folder) / "r")]
        run = ["run", "--config", work, "--set", "federation.rounds=1", "--quiet", *where]
        command = [sys.executable, "-c", code, *run]
        started = time.perf_counter()
        with (Path(folder) / "said").open("w+") as said:
            process = subprocess.Popen(command, stdout=said, stderr=said)
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            taken = time.perf_counter() - started
            said.seek(0)
            if process.returncode:
                raise RunError(f"a run of {work} failed: {said.read().strip()}")
        return {"seconds": taken, "peak_resident_bytes": _bytes(used.ru_maxrss)}
