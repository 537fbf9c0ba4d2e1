"""How long a round must take at least: its products and its memory traffic at the speed of the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...core.ledger import forward_macs
from ...core.task import Task

TRIES = 5
# side of a square product and bytes of a copy, for a GPU and for a CPU: large enough to reach the peak
SIDE, COPIED = {"cuda": 8192, "cpu": 1024}, {"cuda": 2**30, "cpu": 2**27}


def floor(task: Task, precision: str, rounds: Sequence[int], workers: int) -> dict[str, Any]:
    """FLOPs and bytes of a dense FedAvg round, mean over `rounds`, and the seconds that they take at least.

    FLOPs: forward and backward products, 6 a MAC and sample. Bytes: in each step parameters are read,
    gradients written and parameters written; activations are written and read once. The speeds are those
    of a large product, in the run's precision, and of a large copy, on this device now.
    """
    samples = steps = 0
    for number in rounds:
        for client in task.clients(number):
            own = len(task.partition.train_of(client))
            samples += own * task.federation.local_epochs
            steps += -(-own // task.federation.batch_size) * task.federation.local_epochs
    macs = sum(forward_macs(task.model, task.dataset.input_shape, ()).values())
    parameters = sum(p.numel() for p in task.model.parameters())
    flops = 6 * macs * samples / len(rounds)
    width = 2 if precision == "bfloat16" else 4  # of activations; parameters stay in float32
    moved = (12 * parameters * steps + 2 * width * task.activations() * samples) / len(rounds)
    peak, bandwidth = _product(task.device, precision), _copy(task.device)
    return {
        "flops": flops,
        "bytes": moved,
        "peak_flops_a_second": peak,
        "peak_bytes_a_second": bandwidth,
        "seconds": max(flops / peak, moved / bandwidth) / workers,
    }


def _product(device: torch.device, precision: str) -> float:
    """FLOPs a second of a large matrix product."""
    side = SIDE[device.type]
    kind = torch.bfloat16 if precision == "bfloat16" else torch.float32
    a, b = (torch.randn(side, side, device=device, dtype=kind) for _ in range(2))
    return 2 * side**3 / _best(lambda: a @ b, device)


def _copy(device: torch.device) -> float:
    """Bytes a second of a large copy, those read and those written."""
    source = torch.ones(COPIED[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * len(source) / _best(lambda: target.copy_(source), device)


def _best(work: Callable[[], object], device: torch.device) -> float:
    """Least seconds of several tries, after one that is not counted."""
    taken = []
    for _ in range(TRIES + 1):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - started)
    return min(taken[1:])
