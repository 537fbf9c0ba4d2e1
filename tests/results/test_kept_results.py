"""Every shipped table: its kept runs are of its presets, and what is written of it is what they say."""

import json
import re
import tomllib
from pathlib import Path
from statistics import mean

import pytest

from fedsparse.core import reproduction
from fedsparse.core.config import leaves, toml_value
from fedsparse.core.reproduction import NOT_RUN, judged, load, measured, other_settings, shipped
from fedsparse.core.reproduction_page import CARD, PAGE, page, with_claims
from fedsparse.core.resolve import resolve

ROOT = Path(__file__).parents[2]
TABLES = [load(name) for name in shipped()]
KEPT = [(table, row, seed) for table in TABLES for row, runs in table.kept.items() for seed in runs]


@pytest.mark.parametrize(("table", "row", "seed"), KEPT, ids=lambda value: getattr(value, "name", str(value)))
def test_a_kept_summary_is_of_its_preset(table, row, seed):
    summary = json.loads((table.folder / f"{row}-seed{seed}.json").read_text(encoding="utf-8"))
    made = resolve(configs=[table.reference(row)])
    assert summary["method"] == made.method.name
    assert summary["swaps"] == dict(made.swaps)
    assert summary["rounds"] == made.config.federation.rounds
    # some servers end denser than the target, by design; none ends sparser
    assert summary["final"]["sparsity"] <= made.config.sparsity.target + 0.001


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_every_preset_of_a_table_is_a_row_of_it(table):
    presets = {path.stem for path in table.folder.glob("*.toml")} - {Path(reproduction.FILE).stem}
    assert presets == set(table.presets)


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_kept_summaries_have_their_presets_settings(table):
    """Those that have any: the first ones were kept before summaries said so."""
    assert not other_settings(table)


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_the_page_of_a_table_is_what_its_runs_say(table):
    """If this fails: fedsparse reproduce --write."""
    assert (table.folder / PAGE).read_text(encoding="utf-8") == page(table)


def test_the_readme_lists_every_claim_with_its_verdict():
    """If this fails: fedsparse reproduce --write."""
    readme = (ROOT / PAGE).read_text(encoding="utf-8")
    assert with_claims(readme, TABLES) == readme
    listed = readme.partition("## Results on real data\n")[2].partition("\n## ")[0]
    for table in TABLES:
        for claim in table.description.claim:
            line = f"| {claim.says} | {claim.by} | [{table.name}](configs/papers/{table.name}) | "
            both = table.kept[claim.better] and table.kept[claim.than]
            assert (line in listed) == bool(both), claim.says


def test_the_readmes_headlines_are_of_kept_runs():
    told = {table.name: table for table in TABLES}
    readme = (ROOT / PAGE).read_text(encoding="utf-8")
    said = {line.split("|")[1].strip(): line for line in readme.splitlines() if line.startswith("| ")}

    def found(table, row):
        return measured(told[table].kept[row], told[table].description.metric)

    def less_traffic(table, row, dense):
        one, other = found(table, row), found(table, dense)
        return (other.upload_bytes + other.download_bytes) / (one.upload_bytes + one.download_bytes)

    def worse(table, row, dense):
        return 100 * (mean(found(table, dense).final) - mean(found(table, row).final))

    fashion, lenet = "fedsparsify-mlp-fashion", "sparsyfed-lenet-cifar10"
    points = [worse(fashion, f"{part}-s090-global", f"{part}-dense") for part in ("iid", "noniid")]
    assert f"is {points[0]:.1f} points worse (IID) and {points[1]:.1f} (2 classes" in said["FedSparsify"]
    times = less_traffic(fashion, "iid-s090-global", "iid-dense")
    assert f"at {times:.1f} times less traffic" in said["FedSparsify"]
    for part in ("lda01", "lda10"):
        row, dense = f"{part}-s095-sparsyfed-floor", f"{part}-dense"
        assert f"at {less_traffic(lenet, row, dense):.0f} times less traffic" in said["SparsyFed"]
        assert worse(lenet, row, dense) > 25


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_every_claim_that_falls_short_says_why(table):
    for claim in table.description.claim:
        made = judged(claim, table.kept, table.description)
        said = made.verdict in ("holds", NOT_RUN) or made.verdict.endswith("no verdict")
        assert claim.note or said, claim.says
        assert not claim.note or made.verdict != NOT_RUN, claim.says


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_the_runs_of_a_row_cost_about_the_same(table):
    """A run of another row, kept under this one's name, mostly does not."""
    for row, runs in table.kept.items():
        for amount in ("upload_bytes_total", "download_bytes_total", "flops_total"):
            values = [getattr(run.final, amount) for run in runs.values()]
            # seeds sample clients of other sizes, and masks end at other densities by layer
            assert not values or max(values) <= 1.15 * min(values), (row, amount)


NAMED = {f"task.{part}": f"task.{part}.use" for part in ("dataset", "model", "partition")}
CARDS = [(table, path) for table in TABLES for path in sorted(table.folder.glob("*-card.md"))]


@pytest.mark.parametrize(("table", "path"), CARDS, ids=lambda value: getattr(value, "name", str(value)))
def test_a_card_is_of_the_first_kept_run_of_its_row(table, path):
    row = path.name.removesuffix("-card.md")
    assert CARD.format(row=row) == path.name
    seed, run = next(iter(table.kept[row].items()))
    said = path.read_text(encoding="utf-8").splitlines()
    assert said[0] == f"# Run runs/{table.name}/{row}-seed{seed}"
    figures = " | ".join(f"{found.client_accuracy:.4f}" for found in (run.final, run.best))
    assert f"| client accuracy (mean) | {figures} |" in said
    assert f"| training FLOPs | {run.final.flops_total:.4g}, all clients and rounds |" in said
    told = "\n".join(said[said.index("## Settings that are not defaults") :])
    ran = re.findall(r"^\| ([\w.]+) \| (.*?) \| ([^|]*) \|$", told, re.MULTILINE)
    given = {path: text for path, text, source in ran if source.startswith(("config ", "--"))}
    preset = tomllib.loads((table.folder / f"{row}.toml").read_text(encoding="utf-8"))
    wanted = {NAMED.get(path, path): toml_value(value) for path, value in leaves(preset)}
    given = {path: text for path, text in given.items() if path not in ("seed", "task.data_root")}
    for path, part in given.items():
        if path.startswith("method.") and path.endswith(".use") and ":" not in wanted[path]:
            given[path] = f'{part.partition(":")[0]}"'  # a preset may name a method for its part
    assert wanted == given
