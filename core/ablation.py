"""An ablation: a base method and variants of it that differ in one slot, over settings and seeds.

Planned and refused as a whole before the first run; a folder a run; started again, what is finished stays.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
import statistics
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

from .errors import ConfigError, FedsparseError, Problem, RunError, nearest
from .registry import Registry, describe
from .results import Result

if TYPE_CHECKING:
    from .config import Layer, RunConfig
    from .resolve import Resolved

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]

BASE = "base"
CLIENTS = "client_accuracy"  # which papers report, so that every table has it
PLAN = "ablation.json"
NAME_LENGTH = 120  # of a run's folder; file systems end at 255 bytes


@dataclass(frozen=True)
class Variant:
    """The base, or the base with one slot swapped. `layer` is the swap's settings."""

    name: str
    layer: Layer | None = None


@dataclass(frozen=True)
class Trial:
    """One run of an ablation: a variant at a point of the grid with a seed, and its folder's name."""

    variant: str
    point: Mapping[str, Any]
    seed: int
    folder: str
    resolved: Resolved


@dataclass(frozen=True)
class Plan:
    """All runs of an ablation, in the order in which they are played."""

    method: str
    variants: tuple[str, ...]
    grid: Mapping[str, Sequence[Any]]
    seeds: tuple[int, ...]
    trials: tuple[Trial, ...]
    refused: Mapping[str, str]
    """swaps of `slots` that cannot work with the base's other parts, and why"""
    metric: str
    """the final figure that is compared"""

    @property
    def points(self) -> list[dict[str, Any]]:
        """The combinations of the grid's values; one empty one without a grid."""
        return _points(self.grid)

    def record(self) -> dict[str, Any]:
        """The plan as plain values, as `ablation.json` holds it."""
        record = {
            "method": self.method,
            "variants": self.variants,
            "grid": self.grid,
            "seeds": self.seeds,
            "refused": self.refused,
            "base": self.trials[0].resolved.tree(),
            "runs": [
                {"folder": t.folder, "variant": t.variant, "settings": t.point, "seed": t.seed}
                for t in self.trials
            ],
        }
        plain: dict[str, Any] = json.loads(json.dumps(record, default=str))
        return plain


def plan(
    plugin: str | None = None,
    configs: Sequence[str] = (),
    sets: Sequence[str] = (),
    *,
    swaps: Sequence[str] = (),
    extras: Sequence[str] = (),
    grid: Sequence[str] = (),
    slots: Sequence[str] = (),
    seeds: Sequence[int] = (0, 1, 2),
    metric: str = "test_accuracy",
    registry: Registry | None = None,
) -> Plan:
    """Plans the base, the base with each swap alone, and that for every combination of the grid and seed.

    `swaps` are SLOT=PLUGIN[:Part], `grid` PATH=VALUE,VALUE; `slots` ("all", or names) are swapped, each
    alone, for the default method's part, unless they hold it. `configs`, `sets` and `extras` are the
    base's settings; a swapped part has its own defaults. `metric` is a number of `final` in `summary.json`.
    Raises ConfigError with every problem found.
    """
    from .config import Layer
    from .resolve import DEFAULT_PLUGIN, find_part, parse_swap, resolve
    from .tracking import SHOWN

    registry = registry or Registry()
    problems = _seed_problems(seeds, sets)
    figures = [name for name in SHOWN if name != "round"]
    if metric not in figures:
        problems.append(Problem("", f"--metric: unknown figure {metric!r}. {nearest(metric, figures)}"))
    axes, variants = dict[str, list[Any]](), [Variant(BASE)]
    for text in grid:
        try:
            path, values = parse_axis(text)
            if path in axes:
                _refuse_axis(path, "is given twice; give it once")
            axes[path] = values
        except ConfigError as error:
            problems += error.problems
    for text in dict.fromkeys(swaps):
        try:
            variants.append(
                Variant("=".join(piece.strip() for piece in text.split("=", 1)), parse_swap(text))
            )
        except ConfigError as error:
            problems += error.problems
    slots = _known_slots(slots, problems)
    points = _points(axes)

    def resolved(variant: Variant, point: Mapping[str, Any], seed: int = 0) -> Resolved:
        layers = [_at(path, value) for path, value in point.items()]
        layers += [variant.layer] if variant.layer else []  # after the base's settings, which it drops
        layers += [Layer("--seeds", {"seed": seed})]
        return resolve(plugin, configs, sets=sets, extras=extras, layers=layers, registry=registry)

    found: dict[tuple[str, int], Resolved] = {}
    for number, point in enumerate(points):
        for variant in variants:
            try:
                found[variant.name, number] = resolved(variant, point)
            except ConfigError as error:
                problems += error.problems
    base = found.get((BASE, 0))
    refused: dict[str, str] = {}
    for slot in slots if base else ():
        default = type(find_part(DEFAULT_PLUGIN, slot, registry)[1])
        same = [base, *(found.get((v.name, 0)) for v in variants if v.name.startswith(f"{slot}="))]
        if any(run is not None and type(run.method.part(slot)) is default for run in same):
            continue
        name = f"{slot}={DEFAULT_PLUGIN}"
        variant = Variant(name, parse_swap(name))
        try:
            runs = [resolved(variant, point) for point in points]
        except ConfigError as error:
            refused[name] = "; ".join(map(str, error.problems))
            continue
        variants.append(variant)
        found |= {(name, number): run for number, run in enumerate(runs)}
    problems += _slot_in_grid(axes, variants)
    if base and len(variants) == 1 and not axes and not problems:
        problems.append(Problem("", _nothing(base.method.name, refused)))
    if not problems:
        problems = _same(points, variants, found)
    if problems:
        raise ConfigError(dict.fromkeys(problems))
    assert base is not None
    folders = dict[str, None]()
    trials = [
        Trial(
            variant.name, point, seed, _folder(variant, point, seed, folders), resolved(variant, point, seed)
        )
        for point in points
        for variant in variants
        for seed in seeds
    ]
    names = tuple(variant.name for variant in variants)
    return Plan(base.method.name, names, axes, tuple(seeds), tuple(trials), refused, metric)


def parse_axis(text: str) -> tuple[str, list[Any]]:
    """The path and the values of `--grid a.b=1,2`. Values are TOML, or strings if they are not."""
    path, equals, raw = (piece.strip() for piece in text.partition("="))
    if not equals or not raw or not all(path.split(".")):
        raise ConfigError(f"--grid {text}: expected KEY=VALUE,VALUE, such as --grid sparsity.target=0.8,0.9")
    try:
        values: list[Any] = tomllib.loads(f"values = [{raw}]")["values"]
    except tomllib.TOMLDecodeError:
        values = [_value(piece.strip()) for piece in raw.split(",")]
    if path == "seed":
        _refuse_axis(path, "seeds are given by --seeds")
    if path == "method.plugin":
        _refuse_axis(path, "an ablation has one base; start another one for another method")
    twice = [value for number, value in enumerate(values) if value in values[:number]]
    if twice:
        _refuse_axis(path, f"{', '.join(map(shown, dict.fromkeys(map(shown, twice))))} is given twice")
    return path, values


def shown(value: Any) -> str:
    """A setting's value in a table or a name."""
    from .config import toml_value

    return value if isinstance(value, str) else toml_value(value)


def _value(text: str) -> Any:
    """A TOML value, or the text if it is none, as for --set."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _at(path: str, value: Any) -> Layer:
    """The layer that sets `path`."""
    from .config import Layer, expand

    *tables, last = path.split(".")
    tree: dict[str, Any] = {last: value}
    for key in reversed(tables):
        tree = {key: tree}
    return Layer(f"--grid {path}", expand(tree))


def _refuse_axis(path: str, why: str) -> NoReturn:
    raise ConfigError([Problem("", f"--grid {path}: {why}")])


def _points(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def _seed_problems(seeds: Sequence[int], sets: Sequence[str]) -> list[Problem]:
    problems = []
    twice = sorted({seed for seed in seeds if seeds.count(seed) > 1})
    if twice:
        names = ", ".join(map(str, twice))
        problems.append(
            Problem("", f"--seeds: {names} given more than once; a seed's run is always the same")
        )
    if not seeds:
        problems.append(Problem("", "--seeds is empty; give at least one, such as --seeds 0,1,2"))
    if any(text.partition("=")[0].strip() == "seed" for text in sets):
        problems.append(Problem("seed", "given by --set; an ablation takes its seeds from --seeds"))
    return problems


def _known_slots(slots: Sequence[str], problems: list[Problem]) -> list[str]:
    from .hookspecs import SLOTS

    if "all" in slots:
        if len(slots) > 1:
            problems.append(Problem("", f"--slots: given {','.join(slots)!r}; all stands alone"))
        return list(SLOTS)
    problems += [
        Problem("", f"--slots: unknown slot {slot!r}. {nearest(slot, [*SLOTS, 'all'])}")
        for slot in slots
        if slot not in SLOTS
    ]
    return [slot for slot in dict.fromkeys(slots) if slot in SLOTS]


def _slot_in_grid(axes: Mapping[str, Any], variants: Sequence[Variant]) -> list[Problem]:
    """A grid over a part's settings says nothing about variants without that part."""
    return [
        Problem("", f"--grid {path}: {variant.name} takes the place of that part; ablate them apart")
        for path in axes
        for variant in variants[1:]
        if f"{path}.".startswith(f"method.{variant.name.partition('=')[0]}.")
    ]


def _nothing(method: str, refused: Mapping[str, str]) -> str:
    said = "".join(f"\n  {name} cannot work: {why}" for name, why in refused.items())
    return f"there is nothing to vary on {method}: give --swap SLOT=PLUGIN, --slots all or --grid{said}"


def _same(
    points: Sequence[Mapping[str, Any]],
    variants: Sequence[Variant],
    found: Mapping[tuple[str, int], Resolved],
) -> list[Problem]:
    """Two variants or points that come to the same settings: their difference would be no result."""
    problems: list[Problem] = []
    seen: list[tuple[RunConfig, str]] = []
    for number, point in enumerate(points):
        for variant in variants:
            name = ", ".join([variant.name, *(f"{path}={shown(value)}" for path, value in point.items())])
            config = found[variant.name, number].config
            twin = next((other for settings, other in seen if settings == config), None)
            if twin is not None:
                problems.append(Problem("", f"{name} is the same run as {twin}; leave one out"))
            seen.append((config, name))
    return problems


def _folder(variant: Variant, point: Mapping[str, Any], seed: int, taken: dict[str, None]) -> str:
    """A readable name that no other run has: `readjust=feddst_sparsity.target=0.8_seed0`."""
    slot, equals, use = variant.name.partition("=")
    pieces = [f"{slot}{equals}{Path(use).name}", *(f"{path}={shown(v)}" for path, v in point.items())]
    stem = re.sub(r"[^\w+=.-]", ".", "_".join(pieces), flags=re.ASCII)[:NAME_LENGTH]
    names = (f"{stem}{f'-{n}' if n > 1 else ''}_seed{seed}" for n in itertools.count(1))
    name = next(name for name in names if name not in taken)
    taken[name] = None
    return name


# running


Play = Callable[[Trial, Path, bool], bool]
"""Plays a run in a folder, anew or from its checkpoint; whether Ctrl-C ended it."""
Tell = Callable[[Trial, Result | None, str], object]
"""Is told what a run left and a remark; None and the reason if it failed."""


@dataclass(frozen=True)
class Outcome:
    """How playing went: the folders of runs that failed with why, and whether Ctrl-C ended it."""

    failed: Mapping[str, str]
    interrupted: bool


def carry_out(
    plan: Plan,
    out: Path,
    play: Play,
    tell: Tell,
    begun: Callable[[], object] = lambda: None,
) -> Outcome:
    """Plays what is not finished below `out`, which is new, empty, or holds this plan.

    `begun` is called when the folder has been found fit, `tell` after each run with what it left and a remark
    (None and the reason if it failed). A run that failed while it trained does not keep the others from being
    played. Raises RunError if the folder
    holds another plan, or runs of other settings, before anything is played.
    """
    with held(plan, out):
        return play_each(plan.trials, out, play, tell, begun)


def play_each(
    trials: Sequence[Trial], out: Path, play: Play, tell: Tell, begun: Callable[[], object]
) -> Outcome:
    """The same for any runs below `out`, which the caller keeps others out of."""
    states = {trial.folder: state_of(out / trial.folder, trial.resolved) for trial in trials}
    begun()
    failed: dict[str, str] = {}
    for trial in trials:
        folder, state = out / trial.folder, states[trial.folder]
        remark = {"finished": "earlier", "resume": "resumed"}.get(state, "")
        if state != "finished":
            if state == "anew":
                shutil.rmtree(folder)
                remark = "started anew, there was no checkpoint to go on from"
            try:
                if play(trial, folder, state == "resume"):
                    return Outcome(failed, interrupted=True)
            except KeyboardInterrupt:
                return Outcome(failed, interrupted=True)
            except Exception as error:
                if not (folder / "error.log").exists():
                    if not isinstance(error, FedsparseError):
                        raise
                    # not in the rounds: most likely the next run would meet it, too
                    stopped = RunError(f"{trial.folder}: {error}")
                    stopped.exit_code = error.exit_code
                    raise stopped from error
                failed[trial.folder] = str(error) if isinstance(error, FedsparseError) else describe(error)
                tell(trial, None, failed[trial.folder])
                continue
        tell(trial, Result.load(folder), remark)
    return Outcome(failed, interrupted=False)


def held(plan: Plan, out: Path) -> AbstractContextManager[None]:
    """Keeps other ablations out of the folder, which gets the plan. Raises RunError if it has another one."""
    return holding(out, PLAN, plan.record(), "an ablation")


@contextmanager
def holding(out: Path, name: str, record: Mapping[str, Any], what: str) -> Iterator[None]:
    """Keeps other processes out of a folder whose file `name` says in plain values what its runs are for.

    `what` names that in messages. Raises RunError if the file holds another record, if a process is at work
    there, or if the folder holds something else.
    """
    from .disk import writing
    from .folders import refuse_taken

    path = out / name
    if not path.exists():
        refuse_taken(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise RunError(f"cannot write to {out}: {error}") from None
    with file:
        _lock(file, out, what)
        if [*out.iterdir()] == [path]:  # a plan of which nothing began binds nobody
            with writing(path):
                path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        file.seek(0)
        try:
            there = json.load(file)
        except ValueError as error:
            raise RunError(f"{path} is damaged: {error}") from None
        changes = differences(there, record)
        if changes:
            lines = "".join(f"\n  {line}" for line in changes)
            raise RunError(
                f"{out} holds another {what.partition(' ')[2]}; name another folder with --out. "
                f"What differs:{lines}"
            )
        yield


def _lock(file: IO[str], out: Path, what: str) -> None:
    if fcntl is None:
        return  # Windows has no such lock
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise RunError(f"{what} is going on in {out}; wait for its end") from None


def differences(there: Any, here: Any, path: str = "") -> list[str]:
    """What differs between two trees of plain values, a line each: `a.b: 1 there, 2 here`."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        keys = [key for key in dict.fromkeys([*there, *here]) if path or key not in ("runs", "refused")]
        lines = []
        for key in keys:
            inner = f"{path}.{key}" if path else key
            lines += differences(there.get(key), here.get(key), inner)
        return lines
    if there == here:
        return []
    there, here = ("nothing" if value is None else json.dumps(value) for value in (there, here))
    return [f"{path}: {there} there, {here} here"]


def state_of(folder: Path, resolved: Resolved) -> str:
    """What is left to do in a run's folder: "new", "anew" (what is there is no use), "resume", or "finished".

    Raises RunError if it holds a run of other settings.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return "new"
    config = folder / "config.toml"
    try:
        there = tomllib.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read {config}: {error}") from None
    if not there and {path.name for path in folder.iterdir()} <= {"config.toml", "metrics.jsonl"}:
        return "anew"  # ended while it was being made
    changes = differences(there, tomllib.loads(resolved.toml()))
    if changes:
        lines = "".join(f"\n  {line}" for line in changes)
        raise RunError(f"{folder} holds a run of other settings; move it away:{lines}")
    summary = _json(folder / "summary.json")
    if summary and not summary.get("interrupted", True):
        return "finished"
    checkpoints = (folder / name / "state.json" for name in ("checkpoint", "checkpoint.old"))
    reached = next((_json(path).get("round") for path in checkpoints if path.exists()), None)
    return "anew" if reached is None else "resume"


def _json(path: Path) -> dict[str, Any]:
    """A JSON object; empty if it is not there, or not whole."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


# statistics


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (n - 1 in the denominator; None for one value) of n values."""

    mean: float
    deviation: float | None
    n: int


@dataclass(frozen=True)
class Interval:
    """A mean with the ends of its confidence interval; None for one value, which has no interval."""

    mean: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Row:
    """A variant at a point of the grid, over its finished seeds; bytes, FLOPs and seconds are means a run."""

    variant: str
    point: Mapping[str, Any]
    figures: Mapping[str, Spread]
    difference: Interval | None
    upload_bytes: float
    download_bytes: float
    flops: float
    seconds: float
    n: int


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value."""
    deviation = statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None
    return Spread(math.fsum(values) / len(values), deviation, len(values))


def paired(pairs: Sequence[tuple[float, float]], confidence: float = 0.95) -> Interval:
    """The mean of second minus first over at least one pair, with Student's t interval."""
    from scipy.special import stdtrit

    found = spread([second - first for first, second in pairs])
    if found.deviation is None:
        return Interval(found.mean, None, None, found.n)
    half = float(stdtrit(found.n - 1, (1 + confidence) / 2)) * found.deviation / math.sqrt(found.n)
    return Interval(found.mean, found.mean - half, found.mean + half, found.n)


def table(plan: Plan, out: Path) -> list[Row]:
    """A row a variant and point of which a run finished; differences to the base are of the plan's metric."""
    metrics = dict.fromkeys([plan.metric, CLIENTS])
    done: dict[tuple[str, int], dict[int, Result]] = {}
    points = plan.points
    for trial in plan.trials:
        if (out / trial.folder).exists() and state_of(out / trial.folder, trial.resolved) == "finished":
            runs = done.setdefault((trial.variant, points.index(dict(trial.point))), {})
            runs[trial.seed] = Result.load(out / trial.folder)
    rows = []
    for (variant, number), runs in done.items():
        base = done.get((BASE, number), {})
        pairs = [
            (final(base[s], plan.metric), final(run, plan.metric)) for s, run in runs.items() if s in base
        ]

        def mean(name: str, runs: Mapping[int, Result] = runs) -> float:
            return statistics.fmean(final(run, name) for run in runs.values())

        rows.append(
            Row(
                variant,
                points[number],
                {name: spread([final(run, name) for run in runs.values()]) for name in metrics},
                paired(pairs) if pairs and variant != BASE else None,
                mean("upload_bytes_total"),
                mean("download_bytes_total"),
                mean("flops_total"),
                # of rounds: without what a run takes to start
                statistics.fmean(float(run.metrics["seconds"].sum()) for run in runs.values()),
                len(runs),
            )
        )
    return rows


def final(run: Result, name: str) -> float:
    """A number of a run's end; NaN where it has none, as the loss of a run that diverged."""
    value = run.summary["final"].get(name)
    return math.nan if value is None else float(value)
