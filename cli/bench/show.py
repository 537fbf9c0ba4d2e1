"""The command's course: what is asked for, measured work by work, as tables and as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ...core.config import preset_names
from ...core.errors import ConfigError, Problem, nearest
from ...core.execution.workers import launch
from ...core.registry import Registry
from ...core.tracking import versions
from .contenders import SPARSITY, configured
from .measure import BASES, Plan, measure, single_round

FOLDER = "bench/"  # of the presets
FOR_GPUS = ("pffdst-resnet18",)  # a CPU takes hours; there they are measured if they are named
WIDTH = 110  # of tables in a file or a pipe


def bench(
    works: Sequence[str], counts: Sequence[int], repeats: int, methods: str, out: Path | None, quick: bool
) -> None:
    """Measures each work with each number of workers, prints a table each and writes all to `out`."""
    console = Console(highlight=False)
    console = console if console.is_terminal else Console(highlight=False, width=WIDTH)
    chosen, plan = found_works(works), Plan(found_methods(methods), 1 if quick else repeats, not quick)
    if out is not None and not out.absolute().parent.is_dir():
        raise ConfigError(f"--out {out}: there is no folder {out.parent}")
    for work in chosen:
        _check(work, counts)
    alone = len(chosen) == 1 and list(counts) == [1]
    figures = []
    for work in chosen:
        for count in counts:
            # a process of its own for each: its peak memory, and no threads or GPU behind a fork
            got = measure(work, plan) if alone else launch(count, measure, work, plan)
            got["single_round_run"] = None if quick else single_round(work, count)
            figures.append(got)
            show(console, got)
            if out is not None:  # each time: what ends a later work leaves what there is
                _write(out, plan, figures)
    if len(counts) > 1:
        console.print("Worker counts were measured one after another: ratios between them are less certain.")
    if out is not None:
        console.print(f"Figures: {out}", soft_wrap=True, markup=False)


def _write(out: Path, plan: Plan, figures: Sequence[Mapping[str, Any]]) -> None:
    written = {
        "versions": versions(),
        "cores": os.cpu_count(),
        "repeats": plan.repeats,
        "sparsity_of_methods": SPARSITY,
        "interleaved": "all contenders of a work and worker count, round by round",
        "figures": figures,
    }
    out.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


def found_works(names: Sequence[str]) -> list[str]:
    """References for --config: of the shipped works, all by default, or TOML files."""
    shipped = [name.removeprefix(FOLDER) for name in preset_names() if name.startswith(FOLDER)]
    unknown = [name for name in names if not name.endswith(".toml") and name not in shipped]
    if unknown:
        raise ConfigError(
            Problem("", f"unknown work {name!r}. {nearest(name, shipped)}, or a .toml file")
            for name in unknown
        )
    if not names:
        # asking whether CUDA is available would keep this process from starting workers
        names = [name for name in shipped if name not in FOR_GPUS or torch.cuda.device_count()]
    return [name if name.endswith(".toml") else FOLDER + name for name in names]


def found_methods(names: str) -> tuple[str, ...]:
    """The methods of a comma list; "all" are those that are installed, FedAvg left out."""
    registry = Registry()
    if names == "none":
        return ()
    if names == "all":
        loaded = [(name, plugin) for name, plugin in registry.all() if name != "fedavg"]
        return tuple(n for n, plugin in loaded if not isinstance(plugin, ConfigError) and plugin.method)
    wanted = tuple(dict.fromkeys(name.strip() for name in names.split(",")))
    unknown = [name for name in wanted if not name.endswith(".py") and name not in registry.names()]
    if unknown:
        allowed = ["all", "none", *registry.names()]
        raise ConfigError(
            Problem("", f"--methods: unknown method {n!r}. {nearest(n, allowed)}") for n in unknown
        )
    return wanted


def _check(work: str, counts: Sequence[int]) -> None:
    """Refuses what cannot be measured before anything is."""
    cohort = configured(work).config.federation.clients_per_round
    if max(counts) > cohort:
        raise ConfigError(f"--workers {max(counts)}: {work} has {cohort} clients a round; at most one each")


def show(console: Console, figures: Mapping[str, Any]) -> None:
    """The table of one work."""
    count = figures["workers"]
    title = f"{figures['work']}, {count} worker{'s' if count > 1 else ''} on {figures['device']}"
    table = Table(title=escape(title))
    table.add_column("contender", no_wrap=True)
    headings = ["seconds a round", *(f"ratio to {base}" for base in BASES)]
    rows = figures["contenders"]
    gpu = any("gpu_bytes" in row for row in rows.values())
    for heading in [*headings, "GPU memory"] if gpu else headings:
        table.add_column(heading, justify="right", overflow="fold")
    for name, row in rows.items():
        texts = [_spread(row, 3), *(_spread(row["ratios"][base], 2) for base in BASES)]
        taken = row.get("gpu_bytes")
        table.add_row(name, *texts, *(["–" if taken is None else f"{taken / 1e6:,.0f} MB"] if gpu else []))
    console.print(table)
    console.print("Medians (smallest to largest) over rounds; ratios are paired round by round.", style="dim")
    bound, fedavg = figures["floor"], figures["contenders"]["fedavg"]["median"]
    console.print(
        f"FedAvg takes {fedavg / bound['seconds']:.1f} times the floor of {bound['seconds']:.3g} s a round: "
        f"{bound['flops'] / 1e9:,.4g} GFLOP at {bound['peak_flops_a_second'] / 1e9:,.4g} GFLOP/s of a matrix "
        f"product, {bound['bytes'] / 1e9:,.3g} GB at {bound['peak_bytes_a_second'] / 1e9:,.3g} GB/s of a copy"
        f"{f', on each of {count} workers' if count > 1 else ''}."
    )
    if run := figures["single_round_run"]:
        console.print(
            f"`fedsparse run` of one round takes {run['seconds']:.1f} s with start and evaluation, and up to "
            f"{run['peak_resident_bytes'] / 1e6:,.0f} MB of memory a process."
        )
    for method, reason in figures["refused"].items():
        console.print(f"[yellow]{escape(f'{method} does not suit this work: {reason}')}[/yellow]")


def _spread(values: Mapping[str, float], digits: int) -> str:
    median, least, largest = (f"{values[key]:.{digits}f}" for key in ("median", "min", "max"))
    return f"{median} ({least}–{largest})"
