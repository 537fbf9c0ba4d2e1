"""A paper's table: rows of presets, summaries of runs that were kept, and claims; imports no torch.

A table is a folder: `table.toml` describes it (`Description`), `ROW.toml` are the presets of its rows and
`ROW-seed0.json` kept runs of them, each the run's `summary.json`. Verdicts are derived from the figures.
"""

from __future__ import annotations

import fnmatch
import json
import re
import statistics
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .ablation import Interval, Spread, Trial, paired, spread, state_of
from .config import Layer, leaves, problems_of
from .errors import ConfigError, Problem, RunError, nearest
from .provenance import about, matters

PAPERS = Path(__file__).parents[1] / "configs" / "papers"
FILE = "table.toml"
RECORD = "reproduction.json"
"""In a folder of runs: whose rows they are."""
NOT_RUN, ONE_SEED, NO_SEED = "not run", "one seed only", "no seed in common"
KINDS = ("holds", "holds in part", "not shown", "does not hold", "contradictory", ONE_SEED, NO_SEED)
"""What a verdict begins with where both rows have runs."""
SEEDS = (0, 1, 2)
"""Of a table that keeps no run."""


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Row(_Table):
    """A row: a preset of the table's folder."""

    preset: str = Field(pattern=r"^[\w+.-]+$", description="name of the preset, without .toml")
    label: str = Field(min_length=1, description="what the row is called")
    group: str = Field("", description="rows of a group stand together under its name")
    published: str = Field("", description="the figure that the paper gives, as text")


class Claim(_Table):
    """A claim, the paper's or the table's own: one row is better than another."""

    says: str = Field(min_length=1)
    by: str = Field("the paper", min_length=1, description="whose claim it is")
    better: str = Field(description="preset of the row that should have more")
    than: str = Field(description="preset of the row that should have less")
    note: str = Field("", description="why it does not hold, where it does not, or what limits it")


class Picture(_Table):
    """A picture of a report on runs of the table, kept beside it."""

    file: str = Field(pattern=r"^[\w+.-]+\.png$", description="name of the PNG, as the report called it")
    says: str = Field(min_length=1, description="what it shows")
    runs: tuple[str, ...] = Field(("*",), min_length=1, description="patterns of the rows that are drawn")


class Description(_Table):
    """What `table.toml` says."""

    title: str = Field(min_length=1)
    about: str = Field(min_length=1, description="paragraphs, an empty line between them")
    source: str = Field(min_length=1, description="where it was published")
    metric: Literal["client_accuracy", "test_accuracy"] = Field(description="the figure that is compared")
    judged: Literal["both", "end"] = Field(
        "both",
        description="where claims are judged: at the end and in the best round, or at the end alone, as "
        "where networks grow sparser all the time",
    )
    row: tuple[Row, ...] = Field(min_length=1)
    claim: tuple[Claim, ...] = ()
    picture: tuple[Picture, ...] = ()


class Figures(BaseModel):
    """A run's figures after a round; accuracies are fractions, bytes and FLOPs totals until then."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    test_accuracy: float
    client_accuracy: float
    upload_bytes_total: float
    download_bytes_total: float
    flops_total: float
    sparsity: float


class Summary(BaseModel):
    """What of a run's `summary.json` a table needs."""

    model_config = ConfigDict(frozen=True)

    seed: int
    method: str
    rounds: int
    settings: dict[str, Any] = {}  # older runs say only method and rounds
    interrupted: Literal[False]
    final: Figures
    best: Figures


Runs = Mapping[str, Mapping[int, Summary]]
"""Runs by row and seed, both in order."""


@dataclass(frozen=True)
class Table:
    """A table with its kept runs. `shipped`: its presets are known as `papers/NAME/ROW`."""

    name: str
    folder: Path
    shipped: bool
    description: Description
    kept: Runs

    @property
    def called(self) -> str:
        """What a user types for it."""
        return self.name if self.shipped else f"./{self.name}"

    @property
    def presets(self) -> list[str]:
        return [row.preset for row in self.description.row]

    @property
    def seeds(self) -> tuple[int, ...]:
        """Every seed of which a run is kept; the usual ones if there is none."""
        return tuple(sorted({seed for runs in self.kept.values() for seed in runs})) or SEEDS

    def reference(self, row: str) -> str:
        """The row's preset as `--config` takes it, from the folder in which the table's lies."""
        return f"papers/{self.name}/{row}" if self.shipped else f"{self.name}/{row}.toml"

    def preset(self, row: str) -> str:
        """The row's preset as `resolve` takes it here."""
        return self.reference(row) if self.shipped else str(self.folder / f"{row}.toml")

    def only(self, rows: Sequence[str], seeds: Sequence[int] | None) -> Table:
        """The table with some rows (none named: all) and seeds, and the claims about these rows.

        Raises ConfigError for rows that it does not have.
        """
        unknown = [row for row in dict.fromkeys(rows) if row not in self.presets]
        if unknown:
            raise ConfigError(
                Problem("", f"--rows: {self.called} has no row {row!r}. {nearest(row, self.presets)}")
                for row in unknown
            )
        chosen = [row for row in self.presets if not rows or row in rows]
        description = self.description.model_copy(
            update={
                "row": tuple(row for row in self.description.row if row.preset in chosen),
                "claim": tuple(
                    # a note is about all kept seeds
                    claim if seeds is None else claim.model_copy(update={"note": ""})
                    for claim in self.description.claim
                    if {claim.better, claim.than} <= set(chosen)
                ),
            }
        )
        kept = {
            row: {s: run for s, run in self.kept.get(row, {}).items() if seeds is None or s in seeds}
            for row in chosen
        }
        return replace(self, description=description, kept=kept)


def shipped() -> list[str]:
    """Names of the tables that fedsparse ships."""
    return sorted(path.parent.name for path in PAPERS.glob(f"*/{FILE}"))


def load(reference: str) -> Table:
    """A shipped table by its name, or any by its folder. Raises ConfigError with everything wrong in it."""
    names = shipped()
    if reference in names:
        return _load(PAPERS / reference, shipped=True)
    folder = Path(reference)
    if not reference or not ((folder / FILE).is_file() or "/" in reference or folder.is_dir()):
        raise ConfigError(
            f"no such table: {reference!r}. {nearest(reference, names)}; or a folder that holds a {FILE}"
        )
    return _load(folder, shipped=False)


def _load(folder: Path, *, shipped: bool) -> Table:
    path = folder / FILE
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    problems: list[Problem] = []
    description = None
    try:
        description = Description.model_validate(raw)
    except ValidationError as error:
        problems += problems_of(error, "", raw, Description)
    problems += _wrong_names(raw, folder)
    kept: dict[str, dict[int, Summary]] = {}
    if description is not None and not problems:
        kept = _kept(folder, [row.preset for row in description.row], problems)
    if problems or description is None:
        raise ConfigError(replace(p, path=f"{path}: {p.path}" if p.path else str(path)) for p in problems)
    return Table(folder.resolve().name, folder, shipped, description, kept)


def _wrong_names(raw: Mapping[str, Any], folder: Path) -> list[Problem]:
    """Rows without a preset or given twice, claims about rows that are not there, and missing pictures."""
    rows = [(place, text) for place, text in _texts(raw.get("row"), "preset")]
    names = [text for _, text in rows]
    problems = []
    for number, (place, name) in enumerate(rows):
        if name in names[:number]:
            problems.append(Problem(f"row.{place}", f"{name!r} is a row already; give each once"))
        elif not (folder / f"{name}.toml").is_file() or f"{name}.toml" == FILE:
            there = [path.stem for path in folder.glob("*.toml") if path.name != FILE]
            problems.append(
                Problem(f"row.{place}", f"there is no preset {name}.toml beside it. {nearest(name, there)}")
            )
    for key in ("better", "than"):
        problems += [
            Problem(f"claim.{place}", f"{name!r} is no row. {nearest(name, set(names))}")
            for place, name in _texts(raw.get("claim"), key)
            if name not in names
        ]
    claims = raw.get("claim")
    for number, claim in enumerate(claims if isinstance(claims, list) else []):
        if isinstance(claim, dict) and "better" in claim and claim["better"] == claim.get("than"):
            problems.append(Problem(f"claim.{number}", "better and than are the same row"))
    problems += [
        Problem(f"picture.{place}", f"there is no {name} beside it; a report on the runs draws it")
        for place, name in _texts(raw.get("picture"), "file")
        if not (folder / name).is_file()
    ]
    for number, picture in enumerate(pictures if isinstance(pictures := raw.get("picture"), list) else []):
        runs = picture.get("runs") if isinstance(picture, dict) else None
        problems += [
            Problem(f"picture.{number}.runs", f"{pattern!r} matches no row. {nearest(pattern, set(names))}")
            for pattern in (runs if isinstance(runs, list) else [])
            if isinstance(pattern, str) and not fnmatch.filter(names, pattern)
        ]
    return problems


def _texts(tables: Any, key: str) -> list[tuple[str, str]]:
    """The texts at a key of a list of tables, with their places; what is no text is another's to report."""
    found = enumerate(tables if isinstance(tables, list) else [])
    return [
        (f"{number}.{key}", table[key])
        for number, table in found
        if isinstance(table, dict) and isinstance(table.get(key), str)
    ]


def _kept(folder: Path, rows: Sequence[str], problems: list[Problem]) -> dict[str, dict[int, Summary]]:
    kept: dict[str, dict[int, Summary]] = {row: {} for row in rows}
    for path in folder.glob("*.json"):
        named = re.fullmatch(r"(.+)-seed(0|[1-9]\d*)", path.stem)
        if named is None or named[1] not in kept:
            problems.append(
                Problem(
                    "", f"{path.name} is no kept run: expected ROW-seedK.json. {nearest(path.stem, rows)}"
                )
            )
            continue
        try:
            summary = read_summary(path)
        except RunError as error:
            problems.append(Problem("", str(error)))
            continue
        if summary.seed != int(named[2]):
            problems.append(Problem("", f"{path.name} is of seed {summary.seed}; name the file after it"))
        problems += _of_another_row(path, summary, folder / f"{named[1]}.toml")
        kept[named[1]][summary.seed] = summary
    return {row: dict(sorted(runs.items())) for row, runs in kept.items()}


def _of_another_row(path: Path, summary: Summary, preset: Path) -> list[Problem]:
    """That a run had another method or number of rounds than the preset sets, if it sets them."""
    try:
        settings = tomllib.loads(preset.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []  # whoever plays it is told
    ran = {"method.plugin": summary.method, "federation.rounds": summary.rounds}
    problems = []
    for name, there in ran.items():
        section, key = name.split(".")
        table = settings.get(section)
        wanted = table.get(key) if isinstance(table, dict) else None
        plugin_file = isinstance(wanted, str) and not wanted.isidentifier()
        if wanted is not None and wanted != there and not plugin_file:
            message = f"{path.name} ran with {name} = {there!r}, but {preset.name} has {wanted!r}"
            problems.append(Problem("", f"{message}; keep it beside its own preset"))
    return problems


def other_settings(table: Table) -> list[Problem]:
    """Where a kept run's settings, as far as its summary has them, are not those of its preset.

    Imports the presets' plugins, unlike `load`. Raises ConfigError for a preset that cannot be resolved.
    """
    from .resolve import resolve

    problems = []
    for row, runs in table.kept.items():
        if not any(run.settings for run in runs.values()):
            continue
        preset = resolve(configs=[table.preset(row)])
        wanted: dict[str, Any] = about(preset)["settings"]
        # a setting that came after the run has its default there, and must not be set here
        set_here = {path for path in wanted if preset.sources.get(path, "").startswith("config ")}
        for seed, run in runs.items():
            ran = run.settings or wanted
            for path in sorted(wanted.keys() & ran.keys() | set_here):
                if path not in ran or ran[path] != wanted[path]:
                    was = f"with {path} = {ran[path]!r}" if path in ran else f"without {path}"
                    message = f"{row}-seed{seed}.json ran {was}, but {row}.toml has {wanted[path]!r}"
                    problems.append(Problem("", f"{message}; keep it beside its own preset"))
    return problems


def read_summary(path: Path) -> Summary:
    """A finished run's `summary.json`. Raises RunError if it is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        return Summary.model_validate(value)
    except ValidationError as error:
        said = "; ".join(map(str, problems_of(error, "", value, Summary)))
        raise RunError(f"{path} is no summary of a finished run: {said}") from None
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read {path}: {error}") from None


# playing


def plan(table: Table, seeds: Sequence[int], sets: Sequence[str] = ()) -> tuple[list[Trial], dict[str, Any]]:
    """Every row with every seed; and what `sets` changed in them that makes them other runs, by path.

    Raises ConfigError with every problem found.
    """
    from .resolve import resolve

    problems: list[Problem] = []
    twice = sorted({seed for seed in seeds if seeds.count(seed) > 1})
    if twice:
        problems.append(Problem("", f"--seeds: {', '.join(map(str, twice))} given more than once"))
    if any(text.partition("=")[0].strip() == "seed" for text in sets):
        problems.append(Problem("seed", "given by --set; seeds are given by --seeds"))
    trials, changes = list[Trial](), dict[str, Any]()
    for row in table.presets:
        preset = table.preset(row)
        try:
            made = [
                resolve(configs=[preset], sets=sets, layers=[Layer("--seeds", {"seed": seed})])
                for seed in seeds
            ]
            plain = resolve(configs=[preset], layers=[Layer("--seeds", {"seed": seeds[0]})])
        except ConfigError as error:
            problems += [replace(p, message=f"{p.message} (row {row})") for p in error.problems]
            continue
        trials += [
            Trial(row, {}, seed, f"{row}-seed{seed}", resolved)
            for seed, resolved in zip(seeds, made, strict=True)
        ]
        was, now = dict(leaves(plain.tree())), dict(leaves(made[0].tree()))
        changes |= {
            path: now.get(path) for path in {**was, **now} if was.get(path) != now.get(path) and matters(path)
        }
    if problems:
        raise ConfigError(dict.fromkeys(problems))
    return trials, changes


def finished(trials: Sequence[Trial], out: Path) -> Runs:
    """What those of the runs left that are finished."""
    runs: dict[str, dict[int, Summary]] = {}
    for trial in trials:
        found = runs.setdefault(trial.variant, {})
        if state_of(out / trial.folder, trial.resolved) == "finished":
            found[trial.seed] = read_summary(out / trial.folder / "summary.json")
    return {row: dict(sorted(found.items())) for row, found in runs.items()}


# figures


@dataclass(frozen=True)
class Measured:
    """A row's runs: the metric by seed, after the last round and after that of best test accuracy.

    Bytes, FLOPs and sparsities are means a run: to its end, at its end, and in its best round.
    """

    seeds: tuple[int, ...]
    final: tuple[float, ...]
    best: tuple[float, ...]
    upload_bytes: float
    download_bytes: float
    flops: float
    sparsity: float
    best_sparsity: float

    def spreads(self) -> dict[str, Spread]:
        return {"final": spread(self.final), "best": spread(self.best)}


@dataclass(frozen=True)
class Judged:
    """A claim over the seeds that both of its rows have; differences are fractions.

    None without a pair, and in the best round where only the end counts.
    """

    seeds: tuple[int, ...]
    final: Interval | None
    best: Interval | None
    verdict: str


def measured(runs: Mapping[int, Summary], metric: str) -> Measured | None:
    """None without a run."""
    if not runs:
        return None
    ends = [run.final for run in runs.values()]
    return Measured(
        tuple(runs),
        tuple(getattr(end, metric) for end in ends),
        tuple(getattr(run.best, metric) for run in runs.values()),
        statistics.fmean(end.upload_bytes_total for end in ends),
        statistics.fmean(end.download_bytes_total for end in ends),
        statistics.fmean(end.flops_total for end in ends),
        statistics.fmean(end.sparsity for end in ends),
        statistics.fmean(run.best.sparsity for run in runs.values()),
    )


def judged(claim: Claim, runs: Runs, told: Description) -> Judged:
    """The claim's differences, paired by seed with Student's 95 % interval, and what they come to."""
    metric = told.metric
    better, than = runs.get(claim.better, {}), runs.get(claim.than, {})
    seeds = tuple(seed for seed in better if seed in than)
    if not seeds:
        return Judged((), None, None, NOT_RUN if not (better and than) else f"{NO_SEED}: no verdict")

    def difference(which: Literal["final", "best"]) -> Interval:
        return paired(
            [
                (getattr(getattr(than[s], which), metric), getattr(getattr(better[s], which), metric))
                for s in seeds
            ]
        )

    final, best = difference("final"), difference("best") if told.judged == "both" else None
    return Judged(seeds, final, best, verdict(final, best))


def verdict(final: Interval, best: Interval | None) -> str:
    """What the differences say of a claim that they are positive; no `best` where only the end counts."""
    signs = _sign(final), _sign(final if best is None else best)
    if None in signs:
        return f"{ONE_SEED}: no verdict"
    match signs:
        case (1, 1):
            return "holds"
        case (-1, -1):
            return "does not hold"
        case (1, 0):
            return "holds in part: at the end"
        case (0, 1):
            return "holds in part: in the best round"
        case (1, -1) | (-1, 1):
            return "contradictory"
        case (-1, 0):
            return "not shown: worse at the end"
        case (0, -1):
            return "not shown: worse in the best round"
    return "not shown"


def _sign(found: Interval) -> int | None:
    """1 or -1 if the interval lies on one side of zero, 0 if it holds it; None of one value."""
    if found.low is None or found.high is None:
        return None
    return (found.low > 0) - (found.high < 0)
