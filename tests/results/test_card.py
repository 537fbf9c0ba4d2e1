"""Provenance kept in a run's folder; the card and the difference of runs."""

import re
import shutil
import subprocess
import sys
import tomllib

import pytest

import fedsparse
from fedsparse.core.card import card, markdown
from fedsparse.core.config import to_toml
from fedsparse.core.diff import differences
from fedsparse.core.errors import RunError
from fedsparse.core.provenance import written_sources
from fedsparse.core.results import Result

SHORT = ["--set", "federation.rounds=4", "--set", "federation.local_epochs=1", "--quiet"]


@pytest.fixture(scope="module")
def swapped(tmp_path_factory):
    """A run from the command line with a swap and a seed."""
    from click.testing import CliRunner

    from fedsparse.cli.main import main

    out = tmp_path_factory.mktemp("card") / "run"
    arguments = ["--plugin", "pffdst", "--swap", "readjust=feddst", "--seed", "3", *SHORT, "--out", str(out)]
    done = CliRunner().invoke(main, ["run", *arguments])
    assert done.exit_code == 0, done.output
    return out


def test_a_runs_config_keeps_where_settings_came_from(swapped, cli):
    result = Result.load(swapped)
    sources = result.sources
    assert sources["federation.rounds"] == "--set federation.rounds"
    assert sources["method.readjust.use"] == "--swap readjust=feddst"
    assert sources["sparsity.target"] == "preset pffdst"
    assert sources["federation.clients"] == "default"
    again = cli("run", "--config", swapped / "config.toml", "--quiet", "--out", "again")
    assert again.exit_code == 0, again.output
    assert Result.load("again").config == result.config
    assert Result.load("again").sources["federation.clients"] == f"config {swapped / 'config.toml'}"


def test_a_resumed_run_keeps_them_too(tmp_path, cli):
    def interrupt(line):
        if line["round"] == 1:
            raise KeyboardInterrupt

    short = {"federation__rounds": 4, "federation__local_epochs": 1, "output__checkpoint_every": 1}
    result = fedsparse.run("fedavg", out=tmp_path / "a", progress=interrupt, **short)
    assert not result.finished
    assert cli("resume", tmp_path / "a", "--quiet").exit_code == 0
    resumed = Result.load(tmp_path / "a")
    assert resumed.finished
    assert resumed.sources == result.sources
    assert resumed.sources["federation.rounds"] == "fedsparse.run"


def test_sources_survive_any_value_and_any_file_name():
    tree = {"a": {"x # y": 'he said " # no', "list": [1, 2], "b.c": {"d": "# 1"}}, "seed": 1}
    notes = {
        "a.x # y": "config odd\nname # 2.toml",
        "a.list": "default",
        "a.b.c.d": "--set",
        "seed": "--seed",
    }
    text = to_toml(tree, notes)
    assert tomllib.loads(text) == tree
    assert written_sources(text) == {**notes, "a.x # y": "config odd name # 2.toml"}
    assert written_sources(to_toml(tree)) == {}
    assert written_sources("x = [ # half\n1]\n[[y]]\n= # z\n") == {}


def rows(result):
    return {(section.title, row[0]): row[1:] for section in card(result) for row in section.rows}


def test_the_card_has_what_a_reviewer_asks_for(swapped):
    result = Result.load(swapped)
    final, found = result.summary["final"], rows(result)
    assert "AAAI 25" in found["Method", "paper"][0]
    assert found["Method", "swaps"] == ("readjust=feddst:Regrow",)
    part, settings, said = found["Parts", "readjust"]
    assert part == "feddst:Regrow"
    assert "period=15" in settings
    assert "grow" in said
    assert found["Sparsity", "target sparsity"][0].startswith("0.8 ")
    assert found["Sparsity", "prunable weights"] == ("52,768 in 4 tensors, of 53,002 parameters",)
    active = sum(int(row[2].replace(",", "")) for key, row in found.items() if key[0] == "Prunable tensors")
    assert 1 - active / 52_768 == pytest.approx(final["sparsity"], abs=1e-12)
    assert found["Federation", "rounds"] == ("4 played of 4 planned",)
    total, each = re.match(r"([\d,]+) B .*; ([\d,]+) B a client", found["Costs", "uploaded"][0]).groups()
    assert int(total.replace(",", "")) == final["upload_bytes_total"]
    assert int(each.replace(",", "")) == round(final["upload_bytes_total"] / 40)
    assert found["Costs", "the paper's formula"][0].startswith("CodeCost: ")
    assert found["Accuracy", "test accuracy (pooled)"][0] == f"{final['test_accuracy']:.4f}"
    assert found["Settings that are not defaults", "seed"] == ("3", "--seed")
    assert found["Settings that are not defaults", "sparsity.target"] == ("0.8", "preset pffdst")
    assert not any(row[-1] == "default" for key, row in found.items() if key[0].startswith("Settings"))
    text = markdown("a | b", card(result))
    assert "multiply-accumulate (MAC) is 2 FLOPs" in text
    assert "chosen by accuracy on the test set" in text
    assert text.startswith("# a \\| b\n")


def test_the_card_of_a_run_without_sources_or_without_an_end(swapped, tmp_path, cli):
    shutil.copytree(swapped, tmp_path / "old")
    config = tmp_path / "old" / "config.toml"
    config.write_text(re.sub(r" +# .*", "", config.read_text()))
    assert "came from: not recorded" in markdown("", card(Result.load(tmp_path / "old")))
    for name in ("summary.json", "mask.safetensors", "model.safetensors"):
        (tmp_path / "old" / name).unlink()
    found = rows(Result.load(tmp_path / "old"))
    assert found["Run", "state"] == ("did not end",)
    assert found["Run", "versions"] == ("not recorded",)
    assert found["Costs", "uploaded"] == rows(Result.load(swapped))["Costs", "uploaded"]
    config.write_text("seed = 1\n")
    with pytest.raises(RunError, match=r"lacks what a run writes .*'method'"):
        card(Result.load(tmp_path / "old"))
    (swapped.parent / "empty").mkdir()
    refused = cli("card", swapped.parent / "empty")
    assert refused.exit_code == 1
    assert "is no run" in refused.stderr


def test_equal_runs_do_not_differ_and_others_differ_in_what_was_set(swapped, tmp_path, cli):
    assert cli("diff", swapped, swapped).stdout == "no difference (but in time)\n"
    arguments = ["--plugin", "pffdst", "--seed", "4", *SHORT]
    assert cli("run", *arguments, "--out", tmp_path / "b").exit_code == 0
    found = {
        section.title: {row[0]: row[1:] for row in section.rows}
        for section in differences(Result.load(swapped), Result.load(tmp_path / "b"))
    }
    assert found["Settings"]["seed"] == ("3", "4", "--seed", "--seed")
    assert found["Settings"]["method.readjust.window"] == ("unset", "0.125", "", "default")
    assert "federation.rounds" not in found["Settings"]
    assert "Conditions" not in found
    assert len(set(found["Figures"]["final test loss"])) == 2
    assert found["Course"]["first round whose metrics differ"][0].startswith("1, in ")
    assert found["Course"]["model.safetensors"] == ("not the same bits",)
    shown = cli("diff", swapped, tmp_path / "b", "--markdown")
    assert "| seed | 3 | 4 | --seed | --seed |" in shown.stdout


def test_card_and_diff_are_quick(swapped):
    code = (
        "import sys\nfrom fedsparse.cli.main import main\n"
        f"for words in (['card', {str(swapped)!r}], ['diff', {str(swapped)!r}, {str(swapped)!r}]):\n"
        "    main(words, standalone_mode=False)\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_parts_name_is_broken_on_a_narrow_screen(swapped, cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    done = cli("card", swapped)
    parts = Result.load(swapped).config["method"]
    for slot in ("mask_init", "freeze_policy", "readjust"):
        assert parts[slot]["use"] in done.output


@pytest.mark.parametrize("width", [80, 97, 120])
def test_no_word_of_a_card_is_cut_off(swapped, cli, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    shown = cli("card", swapped).output
    assert max(map(len, shown.splitlines()[1:])) <= width
    table = shown.partition("\nParts\n")[2].partition("\nSparsity\n")[0]
    told = " ".join(line.split("│")[3].strip() for line in table.splitlines() if line.count("│") == 3)
    parts = Result.load(swapped).summary["parts"]
    for sentence in parts.values():
        assert sentence.replace(" ", "") in told.replace(" ", "")


def test_a_runs_files_are_readable_for_whom_the_umask_lets_read(tmp_path):
    import os

    before = os.umask(0o027)
    try:
        fedsparse.run("fedavg", out=tmp_path / "a", federation__rounds=1, federation__local_epochs=1)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "a").rglob("*") if path.is_file()}
    assert {"model.safetensors", "tensors.safetensors"} <= set(modes)
    assert set(modes.values()) == {0o640}, modes
