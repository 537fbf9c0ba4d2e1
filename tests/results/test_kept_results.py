"""Figures that the README quotes come from kept summaries, and these from presets that are still there."""

import json
from pathlib import Path
from statistics import mean, stdev

import pytest
from scipy import stats

from fedsparse.core.resolve import resolve

PAPERS = Path(__file__).parents[2] / "configs" / "papers"
README = (PAPERS.parents[1] / "README.md").read_text(encoding="utf-8")
KEPT = sorted(PAPERS.glob("*/*-seed*.json"))
ROWS = sorted({path.with_name(path.stem.rpartition("-seed")[0]) for path in KEPT})


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_a_kept_summary_is_of_its_preset(path):
    name, _, seed = path.stem.rpartition("-seed")
    summary = json.loads(path.read_text(encoding="utf-8"))
    made = resolve(configs=[f"papers/{path.parent.name}/{name}"])
    assert summary["seed"] == int(seed)
    assert summary["method"] == made.method.name
    assert summary["rounds"] == made.config.federation.rounds
    assert not summary["interrupted"]
    assert summary["final"]["sparsity"] == pytest.approx(made.config.sparsity.target, abs=0.001)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_readme_quotes_the_kept_summaries(row):
    """To the digits shown, seeds in order."""
    kept = [
        json.loads(path.read_text(encoding="utf-8")) for path in KEPT if path.stem.startswith(f"{row.name}-")
    ]
    (line,) = [
        line for line in README.splitlines() if line.startswith(f"| `papers/{row.parent.name}/{row.name}`")
    ]
    _, last, best, megabytes, flops = (cell.strip() for cell in line.strip("|").split("|"))
    final = [summary["final"] for summary in kept]
    assert last == ", ".join(f"{figures['client_accuracy']:.3f}" for figures in final)
    assert megabytes == ", ".join(
        f"{(f['upload_bytes_total'] + f['download_bytes_total']) / 1e6:,.0f}" for f in final
    )
    assert flops == ", ".join(f"{figures['flops_total'] / 1e12:.2f}" for figures in final)
    assert best == ", ".join(f"{summary['best']['client_accuracy']:.3f}" for summary in kept)


@pytest.mark.parametrize(
    ("claim", "one", "other"),
    [
        ("PFFDST beats dense FedAvg", "pffdst-350", "fedavg-42"),
        ("FedDST beats dense FedAvg", "feddst-200", "fedavg-42"),
        ("PFFDST beats FedDST", "pffdst-350", "feddst-200"),
    ],
)
def test_the_readme_states_the_paired_differences(claim, one, other):
    """In points, mean over seeds with Student's 95 % interval."""

    def accuracies(name, which):
        kept = [path for path in KEPT if path.stem.startswith(f"{name}-")]
        return [json.loads(path.read_text(encoding="utf-8"))[which]["client_accuracy"] for path in kept]

    (line,) = [line for line in README.splitlines() if line.startswith(f"| {claim} at equal traffic |")]
    stated = [cell.strip() for cell in line.strip("|").split("|")][1:3]
    for which, said in zip(("final", "best"), stated, strict=True):
        pairs = zip(accuracies(one, which), accuracies(other, which), strict=True)
        points = [100 * (a - b) for a, b in pairs]
        half = stats.t.ppf(0.975, len(points) - 1) * stdev(points) / len(points) ** 0.5
        low, high = mean(points) - half, mean(points) + half
        assert said == f"{mean(points):+.1f} [{low:+.1f}, {high:+.1f}]".replace("-", "−")
