"""Which executor a run gets, how many clients it stacks, and why."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

from ..compose import Hooks
from ..config import ExecutionConfig
from ..contracts import Contracts
from ..errors import ConfigError, Problem
from ..ledger import Ledger
from ..loss import ModelLoss
from ..registry import describe
from ..state import Batch, Params
from ..task import Task
from .graph import Graph
from .replay import Replays
from .sequential import Sequential
from .training import Executor
from .vectorised import Vectorised
from .workers import local_workers

SMALL = 2_000_000  # parameters; a client of a larger model keeps a GPU, or a core, busy alone
# a CPU computes smaller steps than these faster than Python calls its operations (measured: one after
# another 5 times slower at 0.75 million MACs and 6,000 parameters; at 7 million and 53,000 1.4 times where
# clients are of one size, equal where they are not)
TINY_STEP, TINY = 2_000_000, 20_000  # MACs, parameters
STREAMS = 4  # clients that graphs train side by side
COPIES = 6  # of the parameters, at the peak of a step: values, gradients, momentum, and their successors


class Chosen(NamedTuple):
    """An executor, and the reason in words."""

    executor: Executor
    why: str


def choose(
    config: ExecutionConfig,
    task: Task,
    hooks: Hooks,
    loss: ModelLoss,
    ledger: Ledger,
    contracts: Contracts | None,
    macs: float,
) -> Chosen:
    """The executor that the configuration names, or the one that "auto" finds best.

    `macs` are those of one sample's forward pass.
    """
    parameters = sum(p.numel() for p in task.model.parameters())
    kind, why = config.executor, "as set"
    if config.compile and kind != "graph":
        message = (
            f"compiled steps need tensors at fixed places; set execution.executor = 'graph' ({kind!r} now)"
        )
        raise ConfigError([Problem("execution.compile", message)])
    if kind == "auto":
        if task.device.type == "cpu":
            small = macs * task.federation.batch_size <= TINY_STEP and parameters <= TINY
            why = f"its steps are {'too small' if small else 'large enough'} for a CPU one after another"
        else:
            small = parameters <= SMALL
            why = f"{parameters:,} parameters {'leave a GPU idle' if small else 'keep a GPU busy'}"
        kind = "vectorised" if small else "sequential"
        trouble = unstackable(loss, task) if small else ""
        if trouble:
            kind, why = "sequential", f"its model cannot be stacked: {trouble}"
    elif kind == "vectorised" and (trouble := unstackable(loss, task)):
        message = f"'vectorised' cannot stack this model: {trouble}. Set 'auto' or 'sequential'"
        raise ConfigError([Problem("execution.executor", message)])
    parts = (task, hooks, loss, ledger, contracts)
    # a GPU has graphs for that; a larger model's steps gain next to nothing, and recording takes two of them
    records = config.replay and task.device.type == "cpu" and parameters <= SMALL
    replays = Replays() if records else None
    if kind == "sequential":
        alone = Sequential(*parts)
        alone.replays = replays
        return Chosen(alone, why)
    cohort, room = task.federation.clients_per_round, fitting(task, parameters)
    executor: Vectorised | Graph
    if kind == "graph":
        executor, room = Graph(*parts), min(room, STREAMS)
        executor.compile = config.compile
        why += "; compiled" if config.compile else ""
        why += "; a CPU has no graphs and runs the steps as they are" if task.device.type == "cpu" else ""
    else:
        executor = Vectorised(*parts)
        executor.replays = replays
    executor.size = min(cohort, config.chunk or room)
    return Chosen(executor, f"{why}; {executor.size} of {cohort} clients at once")


def unstackable(loss: ModelLoss, task: Task) -> str:
    """Why `torch.func.vmap` cannot take the model, tried with two clients of two samples; "" if it can."""

    def gradient(params: Params, buffers: Params, batch: Batch) -> Params:
        found: Params = torch.func.grad(lambda p: loss.plain(p, buffers, batch)[0])(params)
        return found

    tensors = task.initial()
    device, shape = task.device, task.dataset.input_shape
    batch = Batch(
        torch.zeros(2, 2, *shape, device=device), torch.zeros(2, 2, dtype=torch.int64, device=device)
    )
    params, buffers = ({name: t.expand(2, *t.shape) for name, t in group.items()} for group in tensors)
    loss.model.train()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.func.vmap(gradient, randomness="different")(params, buffers, batch)
    except Exception as error:
        return describe(error).partition("\n")[0]
    return ""


def fitting(task: Task, parameters: int) -> int:
    """How many clients fit into half of that memory: their parameters and their activations."""
    sample = 4 * task.activations()
    client = 4 * COPIES * parameters + 2 * task.federation.batch_size * sample
    workers = 1 if task.device.type == "cuda" else local_workers()  # that share a machine's memory
    return max(1, memory(task.device) // 2 // workers // client)


def memory(device: torch.device) -> int:
    """Bytes that are free on a GPU; half of what a host has, so that a resumed run stacks as many clients."""
    if device.type == "cuda":
        # what PyTorch holds for tensors to come is as good as free
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + held)
    if "SC_PHYS_PAGES" not in os.sysconf_names:
        return 2**31
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
