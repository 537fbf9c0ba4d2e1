"""A paper's table: what is refused, what is derived, and that played rows are runs."""

import json
import math
import re
import subprocess
import sys
from statistics import mean, stdev

import pytest

from fedsparse.core import ablation, reproduction, runner
from fedsparse.core.ablation import Interval, paired
from fedsparse.core.errors import ConfigError
from fedsparse.core.provenance import about
from fedsparse.core.reproduction import judged, load, other_settings, verdict
from fedsparse.core.reproduction_page import claims_of, page, plain, write
from fedsparse.core.resolve import resolve

PRESET = '# tiny\n[method]\nplugin = "{plugin}"\n[federation]\nrounds = 4\nlocal_epochs = 1\n'
TABLE = """
title = "Tiny | digits"
about = "Four rounds."
source = "nowhere"
metric = "client_accuracy"
[[row]]
preset = "sparse"
label = "PFFDST"
group = "Sparse"
published = "44.1 ± 1.0"
[[row]]
preset = "dense"
label = "FedAvg"
[[claim]]
says = "sparse beats dense"
better = "sparse"
than = "dense"
note = "for a reason"
"""
METHODS = {"sparse": "pffdst", "dense": "fedavg"}
ACCURACIES = {"sparse": (0.442, 0.467, 0.401), "dense": (0.332, 0.302, 0.303)}


def figures(accuracy):
    return {
        "test_accuracy": accuracy / 2,
        "client_accuracy": accuracy,
        "upload_bytes_total": 2_000_000,
        "download_bytes_total": 3_000_000,
        "flops_total": 1.5e12,
        "sparsity": 0.8,
    }


@pytest.fixture
def table(tmp_path):
    """The folder of a table without kept runs."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for row, method in METHODS.items():
        (folder / f"{row}.toml").write_text(PRESET.format(plugin=method))
    (folder / "table.toml").write_text(TABLE)
    return folder


@pytest.fixture
def kept(table):
    """The same with three kept runs of each row, which were a point better in their best rounds."""
    for row, accuracies in ACCURACIES.items():
        for seed, accuracy in enumerate(accuracies):
            summary = {"seed": seed, "method": METHODS[row], "rounds": 4, "interrupted": False}
            summary |= {"final": figures(accuracy), "best": figures(accuracy + 0.01)}
            (table / f"{row}-seed{seed}.json").write_text(json.dumps(summary))
    return table


def problems(folder):
    with pytest.raises(ConfigError) as caught:
        load(str(folder))
    return [str(problem) for problem in caught.value.problems]


def interval(low, high):
    return Interval((low + high) / 2, low, high, 3)


@pytest.mark.parametrize(
    ("final", "best", "expected"),
    [
        ((0.1, 0.2), (0.1, 0.2), "holds"),
        ((-0.2, -0.1), (-0.2, -0.1), "does not hold"),
        ((0.1, 0.2), (-0.1, 0.2), "holds in part: at the end"),
        ((-0.1, 0.2), (0.1, 0.2), "holds in part: in the best round"),
        ((0.1, 0.2), (-0.2, -0.1), "contradictory"),
        ((-0.2, -0.1), (0.1, 0.2), "contradictory"),
        ((-0.1, 0.2), (-0.1, 0.2), "not shown"),
        ((-0.1, 0.2), (-0.2, -0.1), "not shown: worse in the best round"),
        ((-0.2, -0.1), (-0.1, 0.2), "not shown: worse at the end"),
        ((0.0, 0.0), (0.1, 0.2), "holds in part: in the best round"),
    ],
)
def test_a_verdict_follows_from_the_intervals(final, best, expected):
    assert verdict(interval(*final), interval(*best)) == expected


def test_one_seed_gives_no_verdict():
    alone = paired([(0.1, 0.9)])
    assert verdict(alone, alone) == "one seed only: no verdict"


def test_differences_are_paired_by_the_seeds_that_both_rows_have(kept):
    (kept / "dense-seed0.json").unlink()
    (claim,) = plain(load(str(kept)))["claims"]
    found = claim["kept"]
    assert found["seeds"] == (1, 2)
    pairs = [ACCURACIES["sparse"][seed] - ACCURACIES["dense"][seed] for seed in (1, 2)]
    half = 12.7062047362 * stdev(pairs) / math.sqrt(2)  # Student's quantile for one degree of freedom
    assert found["final"]["mean"] == pytest.approx(mean(pairs))
    assert found["final"]["low"] == pytest.approx(mean(pairs) - half)
    assert found["final"]["high"] == pytest.approx(mean(pairs) + half)
    assert found["verdict"] == "not shown"


def test_the_page_has_each_seed_the_spread_and_the_verdict(kept):
    said = page(load(str(kept))).splitlines()
    last, best = "43.7 ± 3.3 (44.2, 46.7, 40.1)", "44.7 ± 3.3 (45.2, 47.7, 41.1)"
    assert (
        f"| PFFDST | [`sparse`](sparse.toml) | 3 | {last} | {best} | 0.800 | 5.00 | 1.50 | 44.1 ± 1.0 |"
        in said
    )
    assert said.index("## Sparse") < said.index("## Rows")
    both = "+12.4 [+3.6, +21.3]"
    assert f"| sparse beats dense | the paper | {both} | {both} | 3 | holds |" in said
    assert "* sparse beats dense: for a reason" in said
    assert "fedsparse run --config mine/sparse.toml --seed 0 --set task.data_root=/data" in said


def test_where_networks_grow_sparser_only_the_end_counts(kept):
    """A best round with a denser model is another network than the row names."""
    for row, accuracies in ACCURACIES.items():
        for seed, accuracy in enumerate(accuracies):
            path = kept / f"{row}-seed{seed}.json"
            summary = json.loads(path.read_text())
            summary["best"] = figures(0.5 - accuracy) | {"sparsity": 0.3}
            path.write_text(json.dumps(summary))
    assert judged_of(kept).verdict == "contradictory"
    (kept / "table.toml").write_text(f'judged = "end"\n{TABLE}')
    found = judged_of(kept)
    assert (found.best, found.verdict) == (None, "holds")
    said = page(load(str(kept)))
    assert "| 0.800 (0.300) |" in said
    assert "Claims are judged at the end" in said


def test_claims_whose_rows_share_no_seed_are_listed_with_that_verdict(kept):
    for seed in (1, 2):
        (kept / f"sparse-seed{seed}.json").unlink()
    (kept / "dense-seed0.json").unlink()
    said = claims_of([load(str(kept))])
    assert "| no seed in common: no verdict. For a reason |" in said
    assert "not run yet" not in said


def test_verdicts_are_counted_by_whose_claims_they_are(kept):
    more = '[[claim]]\nsays = "dense beats sparse"\nby = "us"\nbetter = "dense"\nthan = "sparse"\n'
    (kept / "table.toml").write_text(TABLE + more)
    said = claims_of([load(str(kept))]).splitlines()
    assert said[0] == "| claims by | holds | does not hold |"
    assert said[2:4] == ["| the paper | 1 |  |", "| us |  | 1 |"]


def test_the_page_says_of_how_many_runs_the_settings_are_not_recorded(kept):
    assert "Of the 6 kept runs 6 are from before" in page(load(str(kept)))
    for path in kept.glob("*-seed*.json"):
        summary = json.loads(path.read_text())
        path.write_text(json.dumps(summary | {"settings": {"federation.rounds": 4}}))
    assert "from before" not in page(load(str(kept)))


def test_a_page_that_somebody_else_wrote_is_not_overwritten(kept, cli):
    (kept / "README.md").write_text("My notes\n")
    result = cli("reproduce", "--write", str(kept))
    assert result.exit_code != 0
    assert "README.md is not a page that this command wrote" in result.output
    assert (kept / "README.md").read_text() == "My notes\n"


def judged_of(folder):
    table = load(str(folder))
    return judged(table.description.claim[0], table.kept, table.description)


def test_the_page_shows_pictures_and_cards_and_how_they_are_made(kept):
    before = page(load(str(kept)))
    assert "fedsparse report runs/mine/*-seed* --accuracy client --out report" in before
    assert "fedsparse card runs/mine/sparse-seed0 --markdown" in before
    described = '[[picture]]\nfile = "masks.png"\nsays = "How masks move"\nruns = ["sp*", "dense"]\n'
    (kept / "table.toml").write_text(f"{TABLE}\n{described}")
    (kept / "masks.png").touch()
    (kept / "sparse-card.md").touch()
    after = page(load(str(kept)))
    assert "![How masks move](masks.png)" in after
    assert "| [`sparse`](sparse.toml) ([card](sparse-card.md)) |" in after
    assert "| [`dense`](dense.toml) |" in after
    drawn = "runs/mine/sp*-seed* runs/mine/dense-seed*"
    assert f"fedsparse report {drawn} --accuracy client --out report" in after


def test_a_picture_that_is_missing_or_of_no_row_is_refused(kept):
    (kept / "table.toml").write_text(f'{TABLE}\n[[picture]]\nfile = "a.png"\nsays = "A"\nruns = ["spare"]\n')
    said = problems(kept)
    assert any("picture.0.file: there is no a.png beside it" in line for line in said), said
    assert any("'spare' matches no row. Did you mean 'sparse'?" in line for line in said), said


def test_what_was_published_is_a_column_only_if_a_row_has_it(kept):
    assert "published" in page(load(str(kept)))
    (kept / "table.toml").write_text(TABLE.replace('published = "44.1 ± 1.0"\n', ""))
    assert "published" not in page(load(str(kept)))


def test_everything_wrong_in_a_description_is_said_at_once(table):
    text = TABLE.replace('label = "FedAvg"', 'labl = "FedAvg"').replace('"client_accuracy"', '"accuracy"')
    text = text.replace('preset = "sparse"', 'preset = "sparce"').replace('than = "dense"', 'than = "dens"')
    (table / "table.toml").write_text(text)
    said = problems(table)
    for expected in (
        "metric: must be 'client_accuracy' or 'test_accuracy'; given 'accuracy'",
        "row.1.label: missing",
        "row.1.labl: unknown key. Did you mean 'label'?",
        "row.0.preset: there is no preset sparce.toml beside it. Did you mean 'sparse'?",
        "claim.0.better: 'sparse' is no row. Did you mean 'sparce'?",
        "claim.0.than: 'dens' is no row. Did you mean 'dense'?",
    ):
        assert any(expected in line for line in said), said
    assert all(str(table / "table.toml") in line for line in said)


def test_a_kept_run_of_another_row_is_refused(kept):
    """It would count as a run of the row that it is named after."""
    (kept / "dense-seed1.json").replace(kept / "sparse-seed1.json")
    summary = json.loads((kept / "dense-seed0.json").read_text())
    (kept / "dense-seed0.json").write_text(json.dumps(summary | {"rounds": 5}))
    said = "\n".join(problems(kept))
    assert "sparse-seed1.json ran with method.plugin = 'fedavg', but sparse.toml has 'pffdst'" in said
    assert "dense-seed0.json ran with federation.rounds = 5, but dense.toml has 4" in said


def recorded(kept, row, **changes):
    """The kept runs with the settings of their presets, seed 0 of a row with changes; None drops one."""
    for name in METHODS:
        settings = about(resolve(configs=[str(kept / f"{name}.toml")]))["settings"]
        for seed in range(3):
            own = settings | (changes if (name, seed) == (row, 0) else {})
            path = kept / f"{name}-seed{seed}.json"
            summary = json.loads(path.read_text())
            summary["settings"] = {path: value for path, value in own.items() if value is not None}
            path.write_text(json.dumps(summary))
    return load(str(kept))


CHANGED = {
    "federation.local_epochs": (7, "1"),
    "federation.momentum": (0.5, "0.0"),
    "task.dataset.use": ("mnist", "'digits'"),
    "task.model.use": ("lenet", "'mlp'"),
    "task.partition.alpha": (0.1, "0.5"),
    "method.readjust.use": ("feddst:Regrow", "'pffdst:ServerReadjust'"),
    "faults.deadline": (1.5, "None"),
}
OWN = '[task]\ndataset = "digits"\nmodel = "mlp"\n[task.partition]\nuse = "dirichlet"\nalpha = 0.5\n'


@pytest.mark.parametrize("setting", CHANGED)
def test_kept_runs_of_other_settings_are_refused_when_pages_are_written(kept, setting):
    with (kept / "sparse.toml").open("a") as preset:
        preset.write(OWN)
    given, there = CHANGED[setting]
    table = recorded(kept, "sparse", **{setting: given})
    said = f"sparse-seed0.json ran with {setting} = {given!r}, but sparse.toml has {there}"
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        write([table], [])
    assert len(caught.value.problems) == 1
    assert write([recorded(kept, "sparse")], [])


def test_a_setting_that_came_after_a_run_had_its_default(kept):
    """Unless the preset sets it, which the run cannot have known."""
    assert not other_settings(recorded(kept, "sparse", **{"federation.weight_decay": None}))
    (problem,) = other_settings(recorded(kept, "sparse", **{"federation.local_epochs": None}))
    assert "sparse-seed0.json ran without federation.local_epochs, but sparse.toml has 1" in str(problem)


def test_kept_files_that_are_no_finished_runs_of_rows_are_refused(kept):
    (kept / "sparse-seed0.json").rename(kept / "sparse-seed7.json")
    summary = json.loads((kept / "dense-seed0.json").read_text())
    (kept / "dense-seed0.json").write_text(json.dumps(summary | {"interrupted": True}))
    (kept / "dens-seed1.json").write_text("{}")
    said = "\n".join(problems(kept))
    assert "sparse-seed7.json is of seed 0" in said
    assert "dense-seed0.json is no summary of a finished run: interrupted" in said
    assert "dens-seed1.json is no kept run" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["lenet-cifar"], "no such table: 'lenet-cifar'. Did you mean 'lenet-cifar10'?"),
        (["./none"], "cannot read none/table.toml"),
        (["lenet-cifar10", "--rows", "pffdst-35"], "has no row 'pffdst-35'. Did you mean 'pffdst-350'?"),
        (["lenet-cifar10", "--seeds", "a"], "expected whole numbers from 0 on"),
        (["lenet-cifar10", "--seeds", "1,1"], "1 given more than once"),
        (["lenet-cifar10", "--set", "seed=1"], "seeds are given by --seeds"),
        (["lenet-cifar10", "--set", "federation.round=1"], "federation.round: unknown key"),
        (["lenet-cifar10", "--kept", "--set", "seed=1"], "--set: nothing is played with --kept"),
        (["--kept"], "--kept: give a table, too"),
        (["--write", "--json"], "--json: nothing that --write heeds"),
    ],
)
def test_wrong_input_ends_with_one_message_and_no_folder(arguments, said, cli, tmp_path):
    done = cli("reproduce", *arguments)
    assert done.exit_code == 2
    assert said in " ".join(done.output.split())
    assert not [*tmp_path.iterdir()]


def test_missing_data_is_the_runs_own_message(cli):
    done = cli("reproduce", "lenet-cifar10", "--rows", "fedavg-42", "--out", "a")
    assert done.exit_code == 1
    assert "fedavg-42-seed0: data set cifar10: its files are missing" in done.output


def test_played_rows_stand_beside_the_kept_ones_and_are_not_played_again(kept, cli, tmp_path):
    done = cli("reproduce", "./mine", "--seeds", "0,1", "--set", "output.masks=0")
    assert done.exit_code == 0, done.output
    out = tmp_path / "runs" / "mine"
    runs = {path.name: path for path in out.iterdir() if path.is_dir()}
    assert sorted(runs) == ["dense-seed0", "dense-seed1", "sparse-seed0", "sparse-seed1"]
    assert "Settings were changed" not in done.output
    before = {name: (path / "metrics.jsonl").read_bytes() for name, path in runs.items()}
    again = cli("reproduce", "./mine", "--seeds", "0,1", "--set", "output.masks=0", "--json")
    assert {name: (path / "metrics.jsonl").read_bytes() for name, path in runs.items()} == before
    found = json.loads(again.stdout)
    for row in found["rows"]:
        ends = [json.loads((out / f"{row['preset']}-seed{k}/summary.json").read_text()) for k in (0, 1)]
        assert row["own"]["final"] == [end["final"]["client_accuracy"] for end in ends]
        assert row["kept"]["final"] == list(ACCURACIES[row["preset"]])
    assert found["claims"][0]["own"]["seeds"] == [0, 1]
    refused = cli("reproduce", "./mine", "--seeds", "0,1", "--set", "federation.rounds=5")
    assert refused.exit_code == 1
    assert "federation.rounds: 4 there, 5 here" in refused.output
    other = cli(
        "reproduce", "./mine", "--rows", "dense", "--seeds", "7", "--set", "federation.rounds=1", "--out", "b"
    )
    assert other.exit_code == 0, other.output
    assert "the kept figures are of other settings: federation.rounds = 1" in other.output


def test_a_folder_of_runs_belongs_to_one_table_and_one_process(table, cli):
    pytest.importorskip("fcntl")
    short = ("--rows", "dense", "--seeds", "0", "--set", "federation.rounds=1", "--out", "a")
    with ablation.holding(table.parent / "a", reproduction.RECORD, {"table": "mine"}, "a reproduction"):
        assert "a reproduction is going on in a" in cli("reproduce", "./mine", *short).output
    assert cli("reproduce", "./mine", *short).exit_code == 0
    table.rename(table.parent / "yours")
    done = cli("reproduce", "./yours", *short)
    assert done.exit_code == 1
    assert 'table: "mine" there, "yours" here' in done.output


def test_interrupted_it_goes_on_where_it_was(table, cli, tmp_path, monkeypatch):
    play = runner.run

    def interrupted(resolved, out, begun, watch, say, resume):
        def until(report):
            if resolved.method.name == "fedavg" and report.metrics["round"] == 1:
                raise KeyboardInterrupt
            watch(report)

        return play(resolved, out, begun, until, say, resume)

    arguments = ("reproduce", "./mine", "--seeds", "0", "--set", "output.checkpoint_every=1", "--out", "a")
    with monkeypatch.context() as patched:
        patched.setattr(runner, "run", interrupted)
        done = cli(*arguments)
    assert done.exit_code == 130
    assert "1 of 2 runs are finished. The same command with --out a goes on" in done.output
    done = cli(*arguments)
    assert done.exit_code == 0, done.output
    assert (done.output.count("(earlier)"), done.output.count("(resumed)")) == (1, 1)
    assert len((tmp_path / "a" / "dense-seed0" / "metrics.jsonl").read_text().splitlines()) == 4


def test_a_table_of_ones_own_gets_its_page(kept, cli):
    done = cli("reproduce", "--write", "./mine")
    assert done.exit_code == 0, done.output
    assert (kept / "README.md").read_text() == page(load(str(kept)))
    assert done.output.count("Wrote") == 1  # the project's README lists shipped tables only


def test_what_is_kept_is_shown_without_torch():
    code = (
        "import sys\nfrom fedsparse.cli.main import main\n"
        "for more in [], ['--markdown'], ['lenet-cifar10', '--kept'], ['--json']:\n"
        "    main(['reproduce', *more], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "+12.5 [+3.7, +21.2]" in done.stdout
