"""An ablation: what it plans and refuses, that it repeats no finished run, and its statistics."""

import csv
import io
import json
import math
import shutil
import subprocess
import sys

import pytest
from rich.console import Console

import fedsparse
from fedsparse.cli.ablate import show
from fedsparse.core import ablation, runner
from fedsparse.core.ablation import paired, parse_axis, plan, spread
from fedsparse.core.errors import ConfigError, RunError

SHORT = ["federation.rounds=2", "federation.local_epochs=1"]
SETS = [argument for setting in SHORT for argument in ("--set", setting)]
SWAP = ("ablate", "--plugin", "pffdst", "--swap", "freeze_policy=fedavg", *SETS, "--seeds", "0,1")
BROKEN = """
from fedsparse import Method, Part, Readjusted, hookimpl
class Breaks(Part):
    @hookimpl
    def due(self, clock):
        return True
    @hookimpl
    def readjust(self, params, mask, memory):
        raise ValueError("on purpose")
METHOD = Method("breaks", readjust=Breaks())
"""


def files(folder):
    """Every file's time and bytes."""
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()
    }


def in_process(trial, folder, resume):
    return runner.run(trial.resolved, folder, resume=resume)["interrupted"]


def names(planned):
    return [trial.folder for trial in planned.trials]


def problems(*arguments, **named):
    with pytest.raises(ConfigError) as caught:
        plan(*arguments, **named)
    return [str(problem) for problem in caught.value.problems]


def test_the_table_and_the_csv_hold_what_the_runs_left(tmp_path, cli):
    done = cli(*SWAP, "--grid", "sparsity.target=0.5,0.8", "--out", "a")
    assert done.exit_code == 0, done.output
    folders = {path.name for path in (tmp_path / "a").iterdir() if path.is_dir()}
    assert folders == {
        f"{variant}_sparsity.target={target}_seed{seed}"
        for variant in ("base", "freeze_policy=fedavg")
        for target in ("0.5", "0.8")
        for seed in (0, 1)
    }
    with (tmp_path / "a" / "ablation.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["variant"], row["sparsity.target"], row["seeds"]) for row in rows] == [
        ("base", "0.5", "2"),
        ("freeze_policy=fedavg", "0.5", "2"),
        ("base", "0.8", "2"),
        ("freeze_policy=fedavg", "0.8", "2"),
    ]

    def final(variant, target, seed, name):
        run = tmp_path / "a" / f"{variant}_sparsity.target={target}_seed{seed}" / "summary.json"
        return json.loads(run.read_text())["final"][name]

    row = rows[3]
    base, swapped = (
        [final(variant, "0.8", seed, "test_accuracy") for seed in (0, 1)]
        for variant in ("base", "freeze_policy=fedavg")
    )
    assert float(row["test_accuracy_mean"]) == pytest.approx(sum(swapped) / 2)
    assert float(row["test_accuracy_sd"]) == pytest.approx(abs(swapped[0] - swapped[1]) / math.sqrt(2))
    difference = sum(swapped) / 2 - sum(base) / 2
    assert float(row["test_accuracy_difference"]) == pytest.approx(difference)
    assert rows[2]["test_accuracy_difference"] == ""
    uploads = [final("freeze_policy=fedavg", "0.8", seed, "upload_bytes_total") for seed in (0, 1)]
    assert float(row["upload_bytes"]) == pytest.approx(sum(uploads) / 2)
    shown = next(
        line for line in done.output.splitlines() if line.split()[:3] == ["freeze_policy=fedavg", "0.8", "2"]
    )
    assert f"{sum(swapped) / 2:.4f} ± {float(row['test_accuracy_sd']):.4f}" in shown
    assert f"{difference:+.4f} [" in shown


def test_a_run_of_an_ablation_is_the_run_alone(tmp_path):
    planned = plan("pffdst", sets=SHORT, swaps=["readjust=feddst"], seeds=[3])
    ablation.carry_out(planned, tmp_path / "a", in_process, lambda *_: None)
    alone = fedsparse.run(
        "pffdst",
        swaps={"readjust": "feddst"},
        out=tmp_path / "b",
        seed=3,
        federation={"rounds": 2, "local_epochs": 1},
    )
    result = fedsparse.Result.load(tmp_path / "a" / "readjust=feddst_seed3")
    assert result.config == alone.config
    assert [{**line, "seconds": 0} for line in result.rounds] == [
        {**line, "seconds": 0} for line in alone.rounds
    ]


def test_started_again_it_repeats_no_finished_run(tmp_path, cli, monkeypatch):
    def interrupted_in_the_third(trial, folder, resume):
        def watch(report):
            if trial.folder == names(planned)[2] and report.metrics["round"] == 1:
                raise KeyboardInterrupt

        return runner.run(trial.resolved, folder, watch=watch, resume=resume)["interrupted"]

    sets = [*SHORT[1:], "federation.rounds=4", "output.checkpoint_every=1"]
    planned = plan("pffdst", sets=sets, swaps=["freeze_policy=fedavg"], seeds=[0, 1])
    out, told = tmp_path / "a", []
    outcome = ablation.carry_out(planned, out, interrupted_in_the_third, lambda *said: told.append(said))
    assert outcome.interrupted
    assert [trial.folder for trial, _, _ in told] == names(planned)[:2]
    before = {name: files(out / name) for name in names(planned)[:2]}
    told.clear()
    outcome = ablation.carry_out(planned, out, in_process, lambda *said: told.append(said))
    assert not outcome.interrupted
    assert [remark for _, _, remark in told] == ["earlier", "earlier", "resumed", ""]
    assert {name: files(out / name) for name in names(planned)[:2]} == before
    whole = fedsparse.run(
        "pffdst",
        swaps={"freeze_policy": "fedavg"},
        out=tmp_path / "b",
        federation={"rounds": 4, "local_epochs": 1},
        output__checkpoint_every=1,
    )
    resumed = told[2][1]
    assert [{**line, "seconds": 0} for line in resumed.rounds] == [
        {**line, "seconds": 0} for line in whole.rounds
    ]


def test_a_run_without_summary_or_checkpoint_is_played_anew_and_no_other(tmp_path, cli):
    assert cli(*SWAP, "--out", "a").exit_code == 0
    first = (tmp_path / "a" / "ablation.csv").read_text()
    lost = tmp_path / "a" / "freeze_policy=fedavg_seed0"
    played = (lost / "metrics.jsonl").read_text()
    (lost / "summary.json").unlink()  # as if killed, or out of space, after the last checkpoint
    half_made = tmp_path / "a" / "base_seed1"
    for path in [*half_made.glob("*.*")]:
        path.unlink()
    for name in ("checkpoint", "masks"):
        shutil.rmtree(half_made / name)
    (half_made / "config.toml").touch()  # as if killed while the folder was being made
    kept = [tmp_path / "a" / name for name in ("base_seed0", "freeze_policy=fedavg_seed1")]
    before = [files(folder) for folder in kept]
    done = cli(*SWAP, "--out", "a")
    assert done.exit_code == 0, done.output
    assert [files(folder) for folder in kept] == before
    assert done.output.count("earlier") == 2
    assert done.output.count("started anew") == 1
    assert done.output.count("resumed") == 1  # of it no round is played again, only its end is written
    assert (lost / "metrics.jsonl").read_text() == played
    again = (tmp_path / "a" / "ablation.csv").read_text()

    def without_seconds(text):
        return [line.rpartition(",")[0] for line in text.splitlines()]

    assert without_seconds(again) == without_seconds(first)


def test_ctrl_c_exits_130_and_says_how_to_go_on(cli, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run", interrupted)
    done = cli(*SWAP, "--out", "a")
    assert done.exit_code == 130
    assert "0 of 4 runs are finished. The same command with --out a goes on" in done.output


def test_another_plan_and_foreign_folders_are_refused_with_what_differs(tmp_path, cli):
    assert cli(*SWAP, "--out", "a").exit_code == 0
    before = files(tmp_path / "a")
    other = ("ablate", "--plugin", "pffdst", "--swap", "readjust=rigl", *SETS, "--seeds", "0")
    said = cli(*other, "--set", "sparsity.target=0.7", "--out", "a")
    assert said.exit_code == 1
    assert 'variants: ["base", "freeze_policy=fedavg"] there, ["base", "readjust=rigl"] here' in said.output
    assert "seeds: [0, 1] there, [0] here" in said.output
    assert "base.sparsity.target: 0.8 there, 0.7 here" in said.output
    assert files(tmp_path / "a") == before
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine").touch()
    assert "is not an empty folder" in cli(*SWAP, "--out", "b").output
    config = tmp_path / "a" / "base_seed1" / "config.toml"
    config.write_text(config.read_text().replace("rounds = 2", "rounds = 3"))
    said = cli(*SWAP, "--out", "a")
    assert said.exit_code == 1
    assert "federation.rounds: 3 there, 2 here" in said.output


def test_what_stops_the_first_run_binds_nobody_to_the_plan(tmp_path, cli):
    said = cli(*SWAP, "--set", "task.dataset=cifar10", "--out", "a")
    assert said.exit_code == 1
    assert "base_seed0: data set cifar10: its files are missing" in said.output
    assert cli(*SWAP, "--out", "a").exit_code == 0


def test_a_variant_that_fails_does_not_keep_the_others(tmp_path, cli):
    (tmp_path / "breaks.py").write_text(BROKEN)
    arguments = list(SWAP)
    arguments[3:3] = ["--swap", "readjust=breaks.py"]
    done = cli(*arguments, "--out", "a")
    assert done.exit_code == 1
    assert "2 of 6 runs failed" in done.output
    assert "ValueError: on purpose" in done.output
    rows = (tmp_path / "a" / "ablation.csv").read_text().splitlines()
    assert [row.partition(",")[0] for row in rows] == ["variant", "base", "freeze_policy=fedavg"]
    (tmp_path / "breaks.py").write_text(
        BROKEN.replace('raise ValueError("on purpose")', "return Readjusted(params, mask, memory)")
    )
    done = cli(*arguments, "--out", "a")
    assert done.exit_code == 0, done.output
    assert done.output.count("earlier") == 4


def test_each_run_is_shared_by_so_many_workers(tmp_path):
    command = [sys.executable, "-c", "from fedsparse.cli.main import main; main()"]
    arguments = (*SWAP[:-1], "0", "--workers", "2", "--out", tmp_path / "a")
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "a" / "freeze_policy=fedavg_seed0" / "summary.json").read_text())
    assert summary["workers"] == 2
    assert "(one seed)" in done.stdout


def test_no_figure_is_cut_on_a_narrow_terminal(tmp_path):
    planned = plan("pffdst", swaps=["freeze_policy=fedavg"], grid=["sparsity.target=0.8,0.9"])
    rows = [
        ablation.Row(
            trial.variant,
            trial.point,
            {"test_accuracy": spread([0.5, 0.7, 0.9]), "client_accuracy": spread([0.5, 0.6, 0.7])},
            paired([(0.5, 0.6), (0.4, 0.6), (0.3, 0.6)]) if trial.variant != "base" else None,
            1e6,
            2.5e6,
            1.5e9,
            2.5,
            3,
        )
        for trial in planned.trials
        if trial.seed == 0
    ]
    for width in (200, 80, 40):
        file = io.StringIO()
        show(Console(file=file, width=width, force_terminal=True, color_system=None), planned, rows)
        for figure in ("0.7000 ± 0.2000", "0.6000 ± 0.1000", "+0.2000 [-0.0484, +0.4484]", "3.50", "1.5e+09"):
            assert figure in file.getvalue(), width


def test_all_slots_are_exactly_those_that_are_not_fedavgs_already():
    assert plan("pffdst", slots=["all"]).variants == (
        "base",
        "freeze_policy=fedavg",
        "readjust=fedavg",
        "aggregate=fedavg",
    )
    assert plan("fedprox", slots=["all"]).variants == ("base", "local_step=fedavg")
    once = plan("pffdst", swaps=["readjust=fedavg"], slots=["readjust", "freeze_policy"])
    assert once.variants == ("base", "readjust=fedavg", "freeze_policy=fedavg")


def test_a_swap_that_cannot_work_is_left_out_of_all_slots_with_the_reason():
    planned = plan("feddyn", slots=["all"])
    assert planned.variants == ("base", "local_step=fedavg")
    assert list(planned.refused) == ["aggregate=fedavg"]
    assert "works only with DynamicMean" in planned.refused["aggregate=fedavg"]
    (said,) = problems("feddyn", swaps=["aggregate=fedavg"])
    assert "works only with DynamicMean" in said


def test_swaps_are_alone_and_drop_the_settings_of_the_part_that_leaves():
    planned = plan(
        "pffdst",
        sets=["method.readjust.period=3"],
        swaps=["readjust=feddst", "freeze_policy=fedavg"],
        seeds=[0],
    )
    swaps = [dict(trial.resolved.swaps) for trial in planned.trials]
    assert [list(swap) for swap in swaps] == [[], ["readjust"], ["freeze_policy"]]
    readjusts = [trial.resolved.config.method.readjust for trial in planned.trials]
    assert [part.period for part in readjusts] == [3, 15, 3]


def test_everything_wrong_is_said_at_once():
    said = problems(
        "pffdst",
        sets=["seed=4"],
        swaps=["redjust=feddst", "readjust=feddts"],
        grid=["sparsity.targt=0.8", "sparsity.target=0.8,1.9", "seed=1", "foo"],
        slots=["al"],
        seeds=[1, 1],
        metric="accuracy",
    )
    for fragment in (
        "seed: given by --set",
        "unknown slot 'redjust'. Did you mean 'readjust'?",
        "unknown plugin 'feddts'. Did you mean 'feddst'?",
        "sparsity.targt: unknown key. Did you mean 'target'?",
        "must be less than 1; given 1.9 (from --grid sparsity.target)",
        "--grid seed: seeds are given by --seeds",
        "--grid foo: expected KEY=VALUE,VALUE",
        "--slots: unknown slot 'al'. Did you mean 'all'?",
        "--seeds: 1 given more than once",
        "unknown figure 'accuracy'. Did you mean 'test_accuracy'?",
    ):
        assert sum(fragment in line for line in said) == 1, (fragment, said)
    assert len(said) == 10


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ({}, "there is nothing to vary on pffdst"),
        ({"swaps": ["readjust=pffdst"]}, "readjust=pffdst is the same run as base"),
        ({"swaps": ["readjust=feddst", "readjust=feddst:Regrow"]}, "is the same run as readjust=feddst"),
        ({"grid": ["sparsity.target=0.8,0.80"]}, "--grid sparsity.target: 0.8 is given twice"),
        ({"grid": ["sparsity.target=0.8", "sparsity.target=0.9"]}, "--grid sparsity.target: is given twice"),
        (
            {"grid": ["method.readjust.period=2,3"], "slots": ["all"]},
            "readjust=fedavg takes the place of that part",
        ),
    ],
)
def test_what_would_compare_a_run_with_itself_is_refused(named, expected):
    (said,) = problems("pffdst", **named)
    assert expected in said


def test_grid_values_are_toml_or_strings():
    assert parse_axis("sparsity.target=0.8, 0.9") == ("sparsity.target", [0.8, 0.9])
    assert parse_axis("sparsity.allocation=erk,uniform") == ("sparsity.allocation", ["erk", "uniform"])
    assert parse_axis("task.model.hidden=[20, 12],[30]") == ("task.model.hidden", [[20, 12], [30]])
    product = plan("fedavg", grid=["sparsity.target=0.5,0.8", "sparsity.allocation=erk,uniform"], seeds=[0])
    assert [tuple(trial.point.values()) for trial in product.trials] == [
        (0.5, "erk"),
        (0.5, "uniform"),
        (0.8, "erk"),
        (0.8, "uniform"),
    ]


def test_statistics_are_those_worked_by_hand():
    found = spread([0.5, 0.7, 0.9])
    assert (found.mean, found.deviation, found.n) == (pytest.approx(0.7), pytest.approx(0.2), 3)
    assert spread([0.5]).deviation is None
    # differences 0.1, 0.2, 0.3: mean 0.2, sd 0.1; Student's t for 2 degrees of freedom is 4.30265
    interval = paired([(0.5, 0.6), (0.4, 0.6), (0.3, 0.6)])
    half = 4.30265 * 0.1 / math.sqrt(3)
    assert interval.mean == pytest.approx(0.2)
    assert (interval.low, interval.high) == (
        pytest.approx(0.2 - half, abs=1e-6),
        pytest.approx(0.2 + half, abs=1e-6),
    )
    one = paired([(0.5, 0.6)])
    assert (one.mean, one.low, one.high, one.n) == (pytest.approx(0.1), None, None, 1)
    assert math.isnan(paired([(0.5, 0.6), (math.nan, 0.6)]).mean)


def test_two_ablations_do_not_share_a_folder(tmp_path):
    pytest.importorskip("fcntl")
    planned = plan("pffdst", sets=SHORT, slots=["readjust"], seeds=[0])
    with (
        ablation.held(planned, tmp_path / "a"),
        pytest.raises(RunError, match="an ablation is going on"),
        ablation.held(planned, tmp_path / "a"),
    ):
        pass
