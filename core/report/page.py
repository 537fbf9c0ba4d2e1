"""A comparison as one HTML file that needs no other, with its figures as files, too."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

from ..errors import RunError
from .compare import Comparison, Table
from .figures import Figures, draw
from .picture import Picture

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff;
  max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.wide { overflow-x: auto; }
table { border-collapse: separate; border-spacing: 0; font-variant-numeric: tabular-nums; font-size: .9rem; }
h3 { font-size: .9rem; margin: 1.4rem 0 .3rem; }
th, td { padding: .3rem .6rem; border-top: 1px solid #ccc; text-align: right; white-space: nowrap; }
th:first-child { text-align: left; padding-left: 0; white-space: normal; font-weight: 500;
  min-width: 7rem; max-width: min(24rem, 45vw); overflow-wrap: anywhere;
  position: sticky; left: 0; background: #fff; }
thead th { border-top: 0; font-weight: 600; }
tbody tr:first-child > * { border-top: 2px solid #666; }
tbody tr:last-child > * { border-bottom: 1px solid #ccc; }
figure { margin: 1rem 0 2rem; } figure img { width: 100%; min-width: 32rem; height: auto; display: block; }
figcaption, li { font-size: .9rem; color: #444; }
code { overflow-wrap: anywhere; }
.narrow { display: none; font-size: .9rem; color: #444; }
@media (max-width: 36rem) { .narrow { display: block; } }
@media print {
  .narrow { display: none; }
  body { font-size: 10pt; max-width: none; margin: 0; padding: 0; }
  .wide { overflow: visible; } figure img { min-width: 0; }
  figure, tr { break-inside: avoid; } h2, h3 { break-after: avoid; }
  table { font-size: 7.5pt; } th, td { padding: .2rem .35rem; white-space: normal; }
}
"""


def write(comparison: Comparison, folder: Path) -> None:
    """Writes `report.html`, `compare.json` and the PNGs.

    Raises RunError if it cannot, or without matplotlib.
    """
    figures = draw(comparison.groups)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for picture in figures.pictures:
            (folder / f"{picture.name}.png").write_bytes(picture.png)
        (folder / "compare.json").write_text(as_json(comparison), encoding="utf-8")
        (folder / "report.html").write_text(page(comparison, figures), encoding="utf-8")
    except OSError as error:
        raise RunError(f"cannot write to {folder}: {error}") from None


def as_json(comparison: Comparison) -> str:
    """The numbers as JSON text."""
    return json.dumps(comparison.tree(), indent=1, allow_nan=False) + "\n"


def page(comparison: Comparison, drawn: Figures) -> str:
    """The HTML text; pictures are inside it."""
    names = [group.name for group in comparison.groups]
    figures = "\n".join(map(_figure, drawn.pictures)) or "<p>The runs hold nothing to draw yet.</p>"
    left_out = _list(drawn.notes)
    tables = "\n".join(_table(table, names) for table in comparison.tables)
    notes = _list(comparison.notes)
    runs = "\n".join(
        f"<li><b>{escape(group.name)}</b>: "
        + ", ".join(
            f"<code>{escape(str(run.path))}</code> (seed {seed})"
            for run, seed in zip(group.runs, group.seeds, strict=True)
        )
        + "</li>"
        for group in comparison.groups
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Runs compared by fedsparse</title>
<style>{STYLE}</style>
</head>
<body>
<h1>Runs compared</h1>
<p class="narrow">Tables and figures scroll sideways.</p>
<h2>Tables</h2>
{tables}
{notes}
<h2>Figures</h2>
{figures}
{left_out}
<h2>Runs</h2>
<ul>
{runs}
</ul>
</body>
</html>
"""


def _table(table: Table, names: Sequence[str]) -> str:
    head = "".join(f'<th scope="col">{escape(column.heading)}</th>' for column in table.columns)
    rows = "\n".join(
        f'<tr><th scope="row">{escape(name)}</th>' + "".join(f"<td>{escape(t)}</td>" for t in texts) + "</tr>"
        for name, texts in zip(names, table.texts(), strict=True)
    )
    return (
        f'<h3 id="{table.key}">{escape(table.title)}</h3>\n'
        f'<div class="wide" tabindex="0"><table aria-labelledby="{table.key}">\n'
        f"<thead><tr><th></th>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>"
    )


def _list(texts: Sequence[str]) -> str:
    items = "\n".join(f"<li>{escape(text)}</li>" for text in texts)
    return f"<ul>\n{items}\n</ul>" if texts else ""


def _figure(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode("ascii")
    return (
        f'<figure><div class="wide" tabindex="0"><img src="data:image/png;base64,{data}" '
        f'alt="{escape(picture.title)}"></div>'
        f"<figcaption><b>{escape(picture.title)}.</b> {escape(picture.caption)}</figcaption></figure>"
    )
