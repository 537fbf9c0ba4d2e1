"""What is shown of a paper's table: rows and claims as sections, as Markdown pages, and as plain values."""

from __future__ import annotations

import dataclasses
import re
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .ablation import Interval, Spread
from .card import Section, table_lines
from .config import toml_value
from .disk import replace
from .errors import ConfigError, RunError
from .reproduction import (
    KINDS,
    NOT_RUN,
    PAPERS,
    Judged,
    Measured,
    Row,
    Runs,
    Table,
    judged,
    measured,
    other_settings,
)

PAGE = "README.md"
WRITTEN = "<!-- written by `fedsparse reproduce --write"
CARD = "{row}-card.md"
"""A run card of a row, kept beside its preset."""
WIDTH = 120  # of prose in a page
MARKS = "<!-- claims: written by `fedsparse reproduce --write` -->", "<!-- end of claims -->"
"""The list of all claims lies between these lines of the project's README."""
_MAKING = """\
The whole table, one run of one row, pictures of runs, and a run's card. `/data` stands for the folder of the
data set as torchvision reads it; `--set task.download=true` fetches it."""
_DIFFERENCES = "Differences are in points, paired by seed, with Student's 95 % interval."
_VERDICTS = {
    "both": "A claim holds where both intervals lie above zero, and in part where one does and the other "
    "contains zero; it does not hold where both lie below; else it is not shown.",
    "end": "Claims are judged at the end: networks grow sparser until then, and a best round may be denser. "
    "A claim holds where the interval lies above zero, and does not where it lies below; else it is not "
    "shown.",
}
_EACH = "Every interval stands for itself: of twenty, one misses by chance."


class Own(NamedTuple):
    """Runs of one's own, and the settings that make them others than the kept ones."""

    runs: Runs
    changed: Mapping[str, Any]


def rows(table: Table, own: Own | None = None, linked: bool = False) -> list[Section]:
    """The rows, a section a group; with one's own runs beside the kept ones. `linked`: presets as links.

    The first two columns are the row's names.
    """
    groups: dict[str, list[Row]] = {}
    for row in table.description.row:
        groups.setdefault(row.group, []).append(row)
    published = any(row.published for row in table.description.row)
    sections = []
    for group, members in groups.items():
        cells = [_cells(table, row, own) for row in members]
        names = [(row.label, _links(table, row) if linked else row.preset) for row in members]
        more = [(row.published,) if published else () for row in members]
        headings = ("", "preset", *_headings(own is not None), *(("published",) if published else ()))
        found = [(*name, *cell, *text) for name, cell, text in zip(names, cells, more, strict=True)]
        sections.append(Section(group, headings, found))
    return sections


def _links(table: Table, row: Row) -> str:
    card = CARD.format(row=row.preset)
    more = f" ([card]({card}))" if (table.folder / card).is_file() else ""
    return f"[`{row.preset}`]({row.preset}.toml){more}"


def rows_note(table: Table) -> str:
    """What the columns of `rows` are."""
    metric = {"client_accuracy": "Client accuracy", "test_accuracy": "Test accuracy"}
    return (
        f"{metric[table.description.metric]} in %: mean ± sample standard deviation over seeds, in brackets "
        "each seed's, from the lowest seed on. The best round is that of the best test accuracy, chosen on "
        "the test set. Sparsity is the model's at the end, in brackets that in the best round if it differs. "
        "Sparsity, MB and TFLOPs are means a run."
    )


def _unrecorded(table: Table) -> str:
    """A sentence on kept runs whose summaries do not say their settings; empty if all do."""
    runs = [run for runs in table.kept.values() for run in runs.values()]
    older = sum(not run.settings for run in runs)
    if not older:
        return ""
    return (
        f"Of the {len(runs)} kept runs {older} are from before summaries recorded all settings: what ties "
        "these to their presets is method, seed, rounds and, where there is one, the row's card."
    )


def changes(own: Own) -> str:
    """A line on settings that were changed; empty if none was."""
    if not own.changed:
        return ""
    said = ", ".join(
        f"{path} = {'unset' if value is None else toml_value(value)}" for path, value in own.changed.items()
    )
    return f"Settings were changed, so that the kept figures are of other settings: {said}"


def claims(table: Table, own: Own | None = None) -> Section:
    """The claims with their differences and verdicts; with one's own runs, those and the kept verdict."""
    told, runs = table.description, table.kept if own is None else own.runs
    found = []
    for claim in told.claim:
        kept, mine = judged(claim, table.kept, told), judged(claim, runs, told)
        found.append((claim.says, claim.by, *_judged(mine), *([] if own is None else [kept.verdict])))
    headings: tuple[str, ...] = ("claim", "by", "at the end", "in the best round", "pairs", "verdict")
    notes = [f"* {claim.says}: {claim.note}" for claim in table.description.claim if claim.note]
    if own is not None:
        headings, notes = (*headings, "verdict, kept"), []  # they explain the kept runs
    said = f"{_DIFFERENCES} {_VERDICTS[told.judged]} {_EACH}"
    note = f"{said}\n\n" + "\n".join(notes) if notes else said
    return Section("Claims", headings, found, note)


def page(table: Table) -> str:
    """The table's page, from what is kept."""
    told = table.description
    lines = [
        f"{WRITTEN} {table.called}` from table.toml and the kept runs -->",
        f"# {told.title}",
        "",
        told.about.strip(),
        "",
        f"Source: {told.source.rstrip('.')}.",
    ]
    for section in rows(table, linked=True):
        lines += ["", f"## {section.title or 'Rows'}", "", *table_lines(section)]
    lines += ["", *textwrap.wrap(f"{rows_note(table)} {_unrecorded(table)}", WIDTH)]
    for picture in told.picture:
        lines += ["", f"![{picture.says}]({picture.file})", "", *textwrap.wrap(picture.says, WIDTH)]
    if told.claim:
        section = claims(table)
        lines += ["", f"## {section.title}", "", *table_lines(section), "", section.note]
    lines += ["", "## Make it again", "", _MAKING, "", "```sh"]
    lines += [*commands(table), "```"]
    return "\n".join(lines) + "\n"


def commands(table: Table) -> list[str]:
    """What makes the table again, one run of it, its pictures and a card."""
    row = next((row for row in table.presets if table.kept.get(row)), table.presets[0])
    data, accuracy = "--set task.data_root=/data", table.description.metric.removesuffix("_accuracy")
    runs = f"runs/{shlex.quote(table.name)}"
    reports = dict.fromkeys(picture.runs for picture in table.description.picture) or {("*",): None}
    return [
        f"fedsparse reproduce {shlex.quote(table.called)} {data}",
        f"fedsparse run --config {shlex.quote(table.reference(row))} --seed {table.seeds[0]} {data}",
        *(
            f"fedsparse report {' '.join(f'{runs}/{rows}-seed*' for rows in drawn)} --accuracy {accuracy} "
            f"--out report{number or ''}"
            for number, drawn in enumerate(reports)
        ),
        f"fedsparse card {runs}/{shlex.quote(f'{row}-seed{table.seeds[0]}')} --markdown",
    ]


def claims_of(tables: Sequence[Table]) -> str:
    """All claims of tables as one list in Markdown, each linked to its table below the project's folder.

    Above it the verdicts are counted by whose claims they are; claims of which one row or both were not run
    are counted in a line below it.
    """
    found, waiting = [], []
    for table in tables:
        folder = f"configs/papers/{table.name}" if table.shipped else str(table.folder)
        link = f"[{table.name}]({folder})"
        made = [(claim, judged(claim, table.kept, table.description)) for claim in table.description.claim]
        for claim, each in made:
            *figures, verdict = _judged(each)
            reason = f". {claim.note[0].upper()}{claim.note[1:]}" if claim.note else ""
            line = (claim.says, claim.by, link, *figures, f"{verdict}{reason}")
            found += [line] if verdict != NOT_RUN else []
        count = sum(each.verdict == NOT_RUN for _, each in made)
        waiting += [f"{count} of {link}"] if count else []
    headings = ("claim", "by", "table", "at the end", "in the best round", "pairs", "verdict")
    lines = []
    if found:
        lines = [*_counted(found), "", "<details>", f"<summary>All {len(found)} claims</summary>", ""]
        lines += [*table_lines(Section("", headings, found)), "", "</details>"]
    if waiting:
        said = f"Claims not run yet: {', '.join(waiting)}."
        lines += ["", *textwrap.wrap(said, WIDTH, break_on_hyphens=False, break_long_words=False)]
    return "\n".join(lines) + "\n"


def _counted(claims: Sequence[tuple[str, ...]]) -> list[str]:
    """How many claims of whom came to which verdict, from the lines of `claims_of`."""
    kinds = [(line[1], re.split("[:.]", line[-1])[0]) for line in claims]
    verdicts = [kind for kind in KINDS if kind in {verdict for _, verdict in kinds}]
    found = [
        (by, *(str(kinds.count((by, verdict)) or "") for verdict in verdicts))
        for by in dict.fromkeys(by for by, _ in kinds)
    ]
    return table_lines(Section("", ("claims by", *verdicts), found))


def with_claims(readme: str, tables: Sequence[Table]) -> str:
    """The project's README with the list between its marks. Raises ValueError if it has no marks."""
    before, first, rest = readme.partition(f"{MARKS[0]}\n")
    _, last, after = rest.partition(MARKS[1])
    if not first or not last:
        raise ValueError(f"no line {MARKS[0] if not first else MARKS[1]!r}")
    return f"{before}{first}\n{claims_of(tables)}\n{last}{after}"


def write(tables: Sequence[Table], every: Sequence[Table]) -> list[Path]:
    """Writes the tables' pages and, in a checkout, the README's list of the claims of `every` shipped table.

    The files that were written. Raises DiskError, RunError for a page that somebody else wrote, and
    ConfigError for kept runs of other settings than their presets'.
    """
    problems = [problem for table in tables for problem in other_settings(table)]
    if problems:
        raise ConfigError(problems)
    texts = {table.folder / PAGE: page(table) for table in tables}
    readme = PAPERS.parents[1] / PAGE
    if readme.is_file() and any(table.shipped for table in tables):  # no wheel has one
        texts[readme] = with_claims(readme.read_text(encoding="utf-8"), every)
    for path in texts.keys() - {readme}:
        if path.is_file() and not path.read_text(encoding="utf-8", errors="replace").startswith(WRITTEN):
            raise RunError(f"{path} is not a page that this command wrote; move it, or rename it")
    for path, text in texts.items():
        replace(path, lambda fresh, text=text: fresh.write_text(text, encoding="utf-8"))  # type: ignore[misc]
    return list(texts)


def plain(table: Table, own: Own | None = None) -> dict[str, Any]:
    """Everything as plain values in full digits: accuracies and differences as fractions, bytes and FLOPs."""
    told = table.description
    sources = {"kept": table.kept} if own is None else {"own": own.runs, "kept": table.kept}
    described = told.model_dump(exclude={"row", "claim"})
    return {
        "name": table.name,
        **described,
        **({} if own is None else {"changed": dict(own.changed)}),
        "rows": [
            row.model_dump() | {what: _plain_row(runs, row, told.metric) for what, runs in sources.items()}
            for row in told.row
        ],
        "claims": [
            claim.model_dump()
            | {what: dataclasses.asdict(judged(claim, runs, told)) for what, runs in sources.items()}
            for claim in told.claim
        ],
    }


def _plain_row(runs: Runs, row: Row, metric: str) -> dict[str, Any] | None:
    found = measured(runs.get(row.preset, {}), metric)
    if found is None:
        return None
    spreads = {f"{which}_mean": made.mean for which, made in found.spreads().items()}
    deviations = {f"{which}_sd": made.deviation for which, made in found.spreads().items()}
    return dataclasses.asdict(found) | spreads | deviations


def _headings(with_own: bool) -> tuple[str, ...]:
    names = ("seeds", "at the end", "in the best round", "sparsity", "MB up + down", "TFLOPs")
    if not with_own:
        return names
    return tuple(f"{name}{which}" for name in names for which in ("", ", kept"))


def _cells(table: Table, row: Row, own: Own | None) -> tuple[str, ...]:
    metric = table.description.metric
    kept = _figures(measured(table.kept.get(row.preset, {}), metric), values=own is None)
    if own is None:
        return kept
    mine = _figures(measured(own.runs.get(row.preset, {}), metric), values=True)
    return tuple(cell for pair in zip(mine, kept, strict=True) for cell in pair)


def _figures(found: Measured | None, values: bool) -> tuple[str, ...]:
    """Seeds, the metric at the end and in the best round, sparsity, MB, TFLOPs."""
    if found is None:
        return "0", NOT_RUN, "", "", "", ""
    count, spreads = len(found.seeds), found.spreads()
    seeds = (
        str(count)
        if found.seeds == tuple(range(count))
        else f"{count} (seed{'' if count == 1 else 's'} {', '.join(map(str, found.seeds))})"
    )
    return (
        seeds,
        _accuracy(spreads["final"], found.final if values else ()),
        _accuracy(spreads["best"], found.best if values else ()),
        _sparsities(found.sparsity, found.best_sparsity),
        _amount((found.upload_bytes + found.download_bytes) / 1e6),
        _amount(found.flops / 1e12),
    )


def _sparsities(end: float, best: float) -> str:
    """At the end and, where it is another, in the best round."""
    return f"{end:.3f}" if f"{end:.3f}" == f"{best:.3f}" else f"{end:.3f} ({best:.3f})"


def _accuracy(found: Spread, values: Sequence[float]) -> str:
    mean = f"{100 * found.mean:.1f}"
    if found.deviation is None:
        return f"{mean} (one seed)"
    each = f" ({', '.join(f'{100 * value:.1f}' for value in values)})" if values else ""
    return f"{mean} ± {100 * found.deviation:.1f}{each}"


def _amount(value: float) -> str:
    """Whole numbers from 100 on, else three digits."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"


def _judged(found: Judged) -> tuple[str, str, str, str]:
    return _interval(found.final), _interval(found.best), str(len(found.seeds)), found.verdict


def _interval(found: Interval | None) -> str:
    """In points, such as `+12.5 [+3.7, +21.2]`."""
    if found is None:
        return ""
    if found.low is None or found.high is None:
        return _points(found.mean)
    return f"{_points(found.mean)} [{_points(found.low)}, {_points(found.high)}]"


def _points(fraction: float) -> str:
    return f"{100 * fraction:+.1f}".replace("-", "−")
