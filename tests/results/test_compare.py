"""`fedsparse compare`: hand-made runs whose budgets, targets and seconds can be counted on paper."""

import json
import statistics
import subprocess
import sys

import pytest

from fedsparse.core.errors import ConfigError, RunError
from fedsparse.core.report.bandwidth import Bandwidth
from fedsparse.core.report.compare import compare

MB = 1_000_000
FIVE = [None, 0.2, None, 0.4, 0.6]


def rows(comparison, key):
    """A table's texts by group."""
    (table,) = [table for table in comparison.tables if table.key == key]
    return dict(zip([group.name for group in comparison.groups], table.texts(), strict=True))


def test_accuracy_at_a_budget_is_the_last_one_evaluated_within_it(made):
    a = made("a", FIVE)  # evaluated at 4, 8 and 10 MB
    compared = compare([a], budgets=[2, 4, 7.999999, 8, 9, 10, 11], flops_budgets=[1e9, 2e9, 3.9e9, 5e9, 6e9])
    at = ["not evaluated", "0.2000", "0.2000", "0.4000", "0.4000", "0.6000", "not reached"]
    assert rows(compared, "test_accuracy_at_bytes") == {"alpha": at}
    half = ["not evaluated", "0.1000", "0.1000", "0.2000", "0.2000", "0.3000", "not reached"]
    assert rows(compared, "client_accuracy_at_bytes") == {"alpha": half}
    at = ["not evaluated", "0.2000", "0.2000", "0.6000", "not reached"]
    assert rows(compared, "test_accuracy_at_flops") == {"alpha": at}


def test_seeds_are_one_row_and_other_settings_are_not(made):
    runs = [
        made("a1", FIVE, seed=1),
        made("b", [0.1, 0.3], plugin="beta"),
        made("a0", [None, 0.1, None, 0.3, 0.5]),
        made("c", FIVE, settings="[sparsity]\ntarget = 0.9\n"),
        made("d", FIVE, swaps={"readjust": "beta:Regrow"}, settings='[method.readjust]\nuse = "beta"\n'),
    ]
    compared = compare(runs, budgets=[4])
    names = [group.name for group in compared.groups]
    assert names == [
        "alpha (sparsity.target=unset)",
        "beta",
        "alpha (sparsity.target=0.9)",
        "alpha + readjust=beta:Regrow",
    ]
    assert compared.groups[0].seeds == (0, 1)
    deviation = statistics.stdev([0.1, 0.2])
    assert rows(compared, "test_accuracy_at_bytes")[names[0]] == [f"0.1500 ± {deviation:.4f}"]
    cell = compared.tree()["groups"][0]["figures"]["test_accuracy_at_bytes"][0]
    assert cell == {
        "at": 4 * MB,
        "mean": pytest.approx(0.15),
        "std": pytest.approx(deviation),
        "n": 2,
        "values": [0.1, 0.2],
    }
    single = compared.tree()["groups"][1]["figures"]["final"]["test_accuracy"]
    assert single == {"mean": 0.3, "std": None, "n": 1, "values": [0.3]}
    assert "these settings differ: sparsity.target (unset, 0.9)" in " ".join(compared.notes)


def test_what_differs_in_a_part_names_it(made):
    part = '[method.readjust]\nuse = "alpha:Move"\nratio = {}\n'
    runs = [made(f"a{ratio}", FIVE, settings=part.format(ratio)) for ratio in (0.1, 0.2)]
    assert [group.name for group in compare(runs).groups] == [
        "alpha (method.readjust.ratio=0.1)",
        "alpha (method.readjust.ratio=0.2)",
    ]


def test_no_mean_where_a_run_lacks_the_figure(made):
    runs = [made("a0", FIVE), made("a1", [None, 0.2], seed=1)]  # the second ended after 4 MB
    compared = compare(runs, budgets=[4, 8], target=0.5)
    assert rows(compared, "test_accuracy_at_bytes") == {"alpha": ["0.2000", "1 of 2 runs"]}
    assert set(rows(compared, "to_target")["alpha"]) == {"1 of 2 runs"}
    cell = compared.tree()["groups"][0]["figures"]["to_target"]["rounds"]
    assert cell == {
        "mean": None,
        "std": None,
        "n": 2,
        "values": [5.0, None],
        "missing": [None, "not reached"],
    }


def test_what_a_target_cost(made):
    a, b = made("a", FIVE), made("b", [0.1, None, 0.9], plugin="beta", megabytes=3)
    compared = compare([a, b], target=0.4, bandwidth=Bandwidth(up=2, down=8, flops=5e8))
    # a round of a: its mean client sends and receives 0.5 MB and computes 0.5 GFLOPs; of b: 1.5 MB
    a_round, b_round = 4 / 8 + 1 + 4 / 2, 12 / 8 + 1 + 12 / 2
    assert rows(compared, "to_target") == {
        "alpha": ["4", "8.00", "4.00", f"{4 * a_round:.1f}"],
        "beta": ["3", "18.0", "3.00", f"{3 * b_round:.1f}"],
    }
    assert "download bytes · 8 / 8 Mbit/s + FLOPs / 5e+08 FLOP/s + upload bytes · 8 / 2 Mbit/s" in " ".join(
        compared.notes
    )
    default = compare([a, b])  # the lowest at the end among the methods
    assert default.tree()["target"] == {"accuracy": "test_accuracy", "value": 0.6}
    clients = compare([a, b], accuracy="client")
    assert clients.tree()["target"] == {"accuracy": "client_accuracy", "value": 0.3}
    assert rows(clients, "to_target")["alpha"][0] == "5"


def test_budgets_are_round_and_spread_up_to_the_largest_total(made):
    a = made("a", [0.1] * 200)  # from 2 MB to 400 MB
    b = made("b", [None, 0.5] * 30, plugin="beta")  # first evaluated at 4 MB, to 120 MB
    c = made("c", [0.5] * 50, plugin="gamma", megabytes=100)  # from 200 MB to 10 GB

    def chosen(*runs):
        cells = compare(runs).tree()["groups"][0]["figures"]["test_accuracy_at_bytes"]
        return [cell["at"] / MB for cell in cells]

    assert chosen(b) == [5, 10, 20, 50, 100]
    assert chosen(b, a) == [3, 10, 30, 100, 300]  # 2, 5, 10, 20, 50, 100, 200 would be too many
    assert chosen(b, a, c) == [10, 100, 1000, 10_000]
    cells = compare([b, a]).tree()["groups"][0]["figures"]["test_accuracy_at_bytes"]
    assert [cell.get("missing") for cell in cells] == [["not evaluated"], None, None, None, ["not reached"]]
    assert chosen(made("short", FIVE[:4], seed=3)) == [4, 5, 6, 7, 8]


def test_runs_without_evaluations_are_shown_as_such(made):
    none, empty = made("a", [None, None]), made("b", [], plugin="beta")
    compared = compare([none, empty])
    assert [table.key for table in compared.tables] == ["final"]
    final = rows(compared, "final")
    assert final["alpha"] == ["1", "2", "not evaluated", "not evaluated", "0.8000", "4.00", "2.00"]
    assert final["beta"][-2:] == ["no rounds", "no rounds"]
    assert "No target accuracy" in " ".join(compared.notes)
    asked = compare([none, made("c", FIVE, plugin="beta")], budgets=[4], target=0.5)
    assert rows(asked, "test_accuracy_at_bytes") == {"alpha": ["not evaluated"], "beta": ["0.2000"]}
    assert rows(asked, "to_target")["alpha"] == ["not evaluated"] * 4


def test_wrong_input_is_refused_all_at_once(made, tmp_path):
    a = made("a", FIVE)
    with pytest.raises(ConfigError) as caught:
        compare([a, a], budgets=[0], flops_budgets=[float("nan")], target=80)
    assert len(caught.value.problems) == 4
    assert "a fraction above 0" in str(caught.value)
    with pytest.raises(ConfigError, match=r"again repeats .*a: same settings, same seed"):
        compare([a, made("again", FIVE)])
    with pytest.raises(ConfigError, match="--up 0: expected a number above 0"):
        Bandwidth(up=0)
    with pytest.raises(RunError, match="is no run"):
        compare([tmp_path / "nothing"])


def test_the_command_prints_tables_or_json(made, cli):
    made("a", FIVE)
    made("b", [0.1, 0.3], plugin="beta")
    done = cli("compare", "a", "b", "--budgets", "1,4", "--target", "0.3")
    assert done.exit_code == 0, done.output
    assert "To a test accuracy of 0.3" in done.output
    assert "not evaluated" in done.output
    as_json = cli("compare", "a", "b", "--budgets", "1,4", "--target", "0.3", "--json")
    tree = json.loads(as_json.stdout)
    assert [group["name"] for group in tree["groups"]] == ["alpha", "beta"]
    assert tree["groups"][0]["figures"]["to_target"]["bytes"]["mean"] == 8 * MB
    wrong = cli("compare", "a", "--budgets", "1,x")
    assert wrong.exit_code == 2
    assert "expected numbers, such as 1,5,10" in wrong.output


def test_real_runs_compare(cli):
    short = ("federation.rounds=4", "federation.local_epochs=1", "output.evaluate_every=2")
    sets = [argument for setting in short for argument in ("--set", setting)]
    for plugin, seed in (("pffdst", 0), ("pffdst", 1), ("feddst", 0)):
        run = cli("run", "-q", "--plugin", plugin, "--seed", seed, "--out", f"{plugin}{seed}", *sets)
        assert run.exit_code == 0, run.output
    tree = json.loads(cli("compare", "pffdst0", "pffdst1", "feddst0", "--json").stdout)
    assert [(group["name"], group["seeds"]) for group in tree["groups"]] == [
        ("pffdst", [0, 1]),
        ("feddst", [0]),
    ]
    with open("feddst0/summary.json") as file:
        final = json.load(file)["final"]
    figures = tree["groups"][1]["figures"]["final"]
    assert figures["test_accuracy"]["mean"] == final["test_accuracy"]
    assert figures["bytes"]["mean"] == final["upload_bytes_total"] + final["download_bytes_total"]


def test_comparing_imports_neither_torch_nor_matplotlib(made):
    folder = made("a", FIVE)
    code = (
        "import sys\nfrom fedsparse.cli.main import main\n"
        f"main(['compare', {str(folder)!r}], standalone_mode=False)\n"
        "assert not {'torch', 'matplotlib', 'pandas'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
