"""A run's card: what a reviewer asks for, read from the run's folder; imports no torch."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .config import CHOICES, leaves, toml_value
from .errors import RunError
from .hookspecs import SLOTS
from .results import Result

UNKNOWN = "not recorded"
"""What older runs, and runs that did not end, have not written."""

BUFFERS = "averaged over the round's clients, weighted by samples"
"""What the engine does with buffers, such as BatchNorm's running statistics, in every method."""


PRUNABLE = {"weights": "the weight of every convolution and linear layer", "all": "every parameter"}
"""Rules of `sparsity.prunable` in words; others are patterns of names."""


@dataclass(frozen=True)
class Section:
    """A table of texts under a title; a column without a heading holds labels."""

    title: str
    headings: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""


def card(result: Result) -> list[Section]:
    """The card of a run. Raises RunError if its files are damaged."""
    try:
        return [
            _method(result),
            _parts(result),
            _sparsity(result),
            *_layers(result),
            *_promise(result),
            _federation(result),
            _optimiser(result),
            _costs(result),
            _accuracy(result),
            _conditions(result),
            _settings(result),
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"{result.path} lacks what a run writes ({type(error).__name__}: {error}); was it edited?"
        ) from None


def markdown(title: str, sections: Sequence[Section]) -> str:
    """Sections as GitHub's Markdown."""
    lines = [f"# {_cell(title)}"]
    for section in sections:
        lines += ["", f"## {section.title}", ""]
        lines += table_lines(section)
        if section.note:
            lines += ["", section.note] if section.rows else [section.note]
    return "\n".join(lines) + "\n"


def table_lines(section: Section) -> list[str]:
    """A section's table as lines of GitHub's Markdown; none for a section without rows."""
    if not section.rows:
        return []
    return [_line(section.headings), _line(["---"] * len(section.headings)), *map(_line, section.rows)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_cell, cells))} |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _facts(title: str, rows: Sequence[tuple[str, str]], note: str = "") -> Section:
    return Section(title, ("", "value"), rows, note)


def _method(result: Result) -> Section:
    summary = result.summary
    swaps = ", ".join(f"{slot}={use}" for slot, use in summary.get("swaps", {}).items())
    return _facts(
        "Method",
        [
            ("method", str(summary.get("method", result.config["method"]["plugin"]))),
            ("paper", summary.get("paper") or UNKNOWN),
            ("swaps", swaps or ("none" if "swaps" in summary else UNKNOWN)),
        ],
    )


def _parts(result: Result) -> Section:
    tables, said = result.config["method"], result.summary.get("parts", {})
    rows = [(slot, tables[slot]["use"], _own(tables[slot]), said.get(slot, UNKNOWN)) for slot in SLOTS]
    extras = tables.get("extras", {})
    rows += [
        ("extras", table.get("use", name), _own(table), said.get(name, UNKNOWN))
        for name, table in extras.items()
    ]
    return Section("Parts", ("slot", "part", "settings", "what it does"), rows)


def _own(table: Mapping[str, Any]) -> str:
    """A component's settings but its name."""
    return ", ".join(f"{key}={toml_value(value)}" for key, value in table.items() if key != "use")


def _sparsity(result: Result) -> Section:
    sparsity, final = result.config["sparsity"], _figures(result)
    shapes = _mask(result)
    weights = sum(size for _, size, _ in shapes)
    total = result.summary.get("parameters")
    rows = [
        ("target sparsity", f"{sparsity['target']:g} of the prunable weights are zero at the end"),
        ("allocation rule", sparsity["allocation"]),
        (
            "prunable",
            ", ".join(PRUNABLE.get(rule, f"what {rule!r} matches") for rule in sparsity["prunable"]),
        ),
        (
            "prunable weights",
            f"{weights:,} in {len(shapes)} tensors, of {total:,} parameters" if shapes and total else UNKNOWN,
        ),
        ("sparsity reached", _shown(final, "sparsity", "{:.6f}")),
        ("initial weights", "rescaled for the mask" if sparsity["rescale_init"] else "as for the dense net"),
    ]
    return _facts("Sparsity", rows)


def _layers(result: Result) -> list[Section]:
    layers = _mask(result)
    rows = [
        (name, "x".join(map(str, shape)), f"{size:,}", f"{active:,}", f"{active / max(size, 1):.4f}")
        for (name, shape), size, active in layers
    ]
    headings = ("tensor", "shape", "weights", "active", "density")
    return [Section("Prunable tensors", headings, rows)] if rows else []


def _mask(result: Result) -> list[tuple[tuple[str, tuple[int, ...]], int, int]]:
    """Name and shape, weights and active ones of each prunable tensor; empty without a final mask."""
    from safetensors import SafetensorError, safe_open

    path = result.path / "mask.safetensors"
    if not path.is_file():
        return []
    found = []
    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                entries = file.get_tensor(name)
                found.append(((name, entries.shape), entries.size, int(np.count_nonzero(entries))))
    except (OSError, SafetensorError) as error:
        raise RunError(f"cannot read {path}: {error}") from None
    return found


def _promise(result: Result) -> list[Section]:
    """What the run's accountant promises, if it has one."""
    final = _figures(result)
    if final.get("epsilon") is None:
        return []
    rows = [
        ("ε", f"{final['epsilon']:.4g} after {len(result.rounds):,} rounds"),
        ("δ", f"{final['delta']:g}"),
    ]
    note = "For runs that differ in one client's training data; `plugins show` says what is not covered."
    return [_facts("Promise to clients (ε, δ)", rows, note)]


def _federation(result: Result) -> Section:
    config, summary = result.config, result.summary
    federation, task = config["federation"], config["task"]
    draws = "with" if federation["replacement"] else "without"
    holding = f", {summary['clients']:,} of them with data" if "clients" in summary else ""
    aggregate = summary.get("parts", {}).get("aggregate", "")
    buffers = summary.get("buffers")
    rows = [
        ("rounds", f"{len(result.rounds):,} played of {federation['rounds']:,} planned"),
        ("clients", f"{federation['clients']:,} in the pool{holding}"),
        (
            "sampling",
            f"{federation['clients_per_round']:,} a round, uniformly {draws} replacement, by the seed",
        ),
        ("data", _component(task["dataset"])),
        ("augmentation", task["augment"]),
        ("model", _component(task["model"])),
        ("partition", _component(task["partition"])),
        ("weighting", f"{config['method']['aggregate']['use']}: {aggregate or UNKNOWN}"),
        ("BatchNorm and other buffers", "the model has none" if buffers == 0 else BUFFERS),
    ]
    return _facts("Federation", rows)


def _component(table: Mapping[str, Any]) -> str:
    own = _own(table)
    return f"{table['use']} ({own})" if own else str(table["use"])


def _optimiser(result: Result) -> Section:
    federation = result.config["federation"]
    step = result.config["method"]["local_step"]["use"]
    said = result.summary.get("parts", {}).get("local_step", UNKNOWN)
    rate, final = federation["learning_rate"], federation.get("learning_rate_final")
    schedule = federation["learning_rate_schedule"]
    rows = [
        ("local step", f"{step}: {said}"),
        ("local epochs", str(federation["local_epochs"])),
        ("batch size", f"{federation['batch_size']}, {'shuffled' if federation['shuffle'] else 'fixed'}"),
        ("learning rate", f"{rate:g}, {schedule}" + ("" if final is None else f" to {final:g} over rounds")),
        ("momentum", f"{federation['momentum']:g}, from zero every round unless the method keeps it"),
        ("weight decay", f"{federation['weight_decay']:g} (L2, every parameter)"),
    ]
    return _facts("Local training", rows)


def _costs(result: Result) -> Section:
    final = _figures(result)
    sent = sum(len(line.get("clients", ())) for line in result.rounds)

    def size(name: str) -> str:
        total = final.get(name)
        if total is None:
            return UNKNOWN
        each = f"; {total / sent:,.0f} B a client and round" if sent else ""
        return f"{total:,.0f} B ({total / 1e6:,.2f} MB){each}"

    formula = result.summary.get("paper_formula", UNKNOWN)
    flops = _shown(final, "flops_total", "{:.4g}")
    rows = [
        ("uploaded", size("upload_bytes_total")),
        ("downloaded", size("download_bytes_total")),
        ("both, by the paper's formula", size("paper_bytes_total")),
        ("the paper's formula", formula),
        ("training FLOPs", f"{flops}, all clients and rounds" if flops != UNKNOWN else UNKNOWN),
    ]
    note = f"{_convention('ledger/accounts.py')}\n\nFLOPs: {_convention('ledger/flops.py')}"
    return _facts("Costs", rows, note)


def _convention(module: str) -> str:
    """All but the first line of a module's docstring, without importing it, in which torch would follow."""
    tree = ast.parse((Path(__file__).parent / module).read_text(encoding="utf-8"))
    doc = (ast.get_docstring(tree) or "").partition("\n")[2].strip()
    # lines join up to paragraphs and list items, which are laid out again where they are shown
    return re.sub(r"(?<!\n)\n(?!\n|\* )\s*", " ", doc).removeprefix("Convention: ")


def _accuracy(result: Result) -> Section:
    final, best = _figures(result), result.summary.get("best", {})

    def row(label: str, name: str, pattern: str) -> tuple[str, str, str]:
        return label, _shown(final, name, pattern), _shown(best, name, pattern)

    rows = [
        ("round", *(f"{f['round'] + 1}" if "round" in f else UNKNOWN for f in (final, best))),
        row("test accuracy (pooled)", "test_accuracy", "{:.4f}"),
        row("client accuracy (mean)", "client_accuracy", "{:.4f}"),
        row("test loss", "test_loss", "{:.4f}"),
        row("training loss", "train_loss", "{:.4f}"),
    ]
    note = (
        "The best round is chosen by accuracy on the test set itself, so that its figures are optimistic; "
        f"output.evaluate_every is {result.config['output']['evaluate_every']}."
    )
    return Section("Accuracy", ("", "final", "best"), rows, note)


def _conditions(result: Result) -> Section:
    summary, execution = result.summary, result.config["execution"]
    versions = ", ".join(f"{name} {number}" for name, number in summary.get("versions", {}).items())
    played = math.fsum(line.get("seconds") or 0.0 for line in result.rounds)
    wall = f"; {summary['wall_seconds']:.1f} s with loading" if "wall_seconds" in summary else ""
    ended = "ended" if result.finished else "interrupted" if summary else "did not end"
    rows = [
        ("seed", str(result.config["seed"])),
        ("state", ended),
        ("versions", versions or UNKNOWN),
        ("device", str(summary.get("device", UNKNOWN))),
        ("workers", str(summary.get("workers", UNKNOWN))),
        ("executor, precision", f"{execution['executor']}, {execution['precision']}"),
        ("wall time", f"{played:.1f} s in rounds{wall}"),
    ]
    return _facts("Run", rows)


def _settings(result: Result) -> Section:
    sources = result.sources
    if not sources:
        return Section("Settings that are not defaults", (), (), f"Where settings came from: {UNKNOWN}.")
    slots = {".".join(path) for path in CHOICES}
    rows = [
        (path, toml_value(value), sources.get(path, UNKNOWN))
        for path, value in leaves(result.config)
        if sources.get(path) != "default"
        # the parts that the method itself names are in their own table
        and not (path.rpartition(".")[0] in slots and sources.get(path, "").startswith("method "))
    ]
    note = "" if rows else "None: every setting is a default."
    return Section("Settings that are not defaults", ("setting", "value", "from"), rows, note)


def _figures(result: Result) -> dict[str, Any]:
    """The latest value of each figure, of a run that did not end, too."""
    last: dict[str, Any] = {}
    for line in result.rounds:
        last |= line
    return {**last, **result.summary.get("final", {})}


def _shown(figures: Mapping[str, Any], name: str, pattern: str) -> str:
    value = figures.get(name)
    return UNKNOWN if value is None else pattern.format(value)
