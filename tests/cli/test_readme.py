"""The README's example is a plugin of at most 40 lines that runs, and its tables name what exists."""

import inspect
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from fedsparse.cli.main import main
from fedsparse.core.hookspecs import SLOTS, Extras, hooks_of

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(start):
    """The one block of Python that begins so."""
    (found,) = (b for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if b.startswith(start))
    return found


def test_the_example_in_python_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    scope = {}
    code = blocks("import fedsparse").replace("federation__rounds=20", "federation__rounds=2")
    exec(compile(code, "README", "exec"), scope)
    assert scope["again"].rounds == scope["result"].rounds
    assert capsys.readouterr().out.endswith(" MB\n")


def section(title):
    """The text below a heading, down to the next."""
    return README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def commands(text):
    """Each command of its `sh` blocks, in order; one that goes on over lines as one."""
    found = "".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL))
    return found.replace("\\\n", "").splitlines()


TUTORIAL = commands(section("Tutorial: ten minutes"))


def test_the_tutorial_is_whole():
    words = {" ".join(line.split()[:2]) for line in TUTORIAL}
    assert words >= {
        f"fedsparse {name}" for name in ("run", "compare", "ablate", "card", "export", "new-plugin")
    }
    assert "pip install" in words


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [2, None], ids=["short", "as printed"])
def test_the_tutorial_command_by_command(rounds, tmp_path):
    """In a new folder, in a shell; `pip install` installs into a folder, from no index. `rounds`: fewer."""
    programs, site = tmp_path / "bin", tmp_path / "site"
    paths = os.pathsep.join([str(site), str(ROOT.parent), os.environ.get("PYTHONPATH", "")])
    offline = "--no-index --no-deps --no-build-isolation"
    pip = f"-m pip -q --disable-pip-version-check install {offline} --target {shlex.quote(str(site))}"
    for name, body in {
        "fedsparse": '-c \'from fedsparse.cli.main import main; main(prog_name="fedsparse")\' "$@"',
        "pip": f'{pip} "./$3"',
    }.items():
        path = programs / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\nexec {shlex.quote(sys.executable)} {body}\n")
        path.chmod(0o755)
    work = tmp_path / "work"
    work.mkdir()
    (work / "regrow.py").write_text(blocks("# regrow.py"))
    environment = {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": paths,
        "COLUMNS": "120",
    }
    said = ""
    for line in TUTORIAL:
        if rounds:
            line = re.sub(r"federation\.rounds=\d+", f"federation.rounds={rounds}", line)
            line = line.replace(
                "plugins --check my_method", "plugins show my_method"
            )  # as long as all others
        done = subprocess.run(
            line, shell=True, cwd=work, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        assert "Traceback" not in done.stderr
        said += done.stdout
    assert (work / "tutorial" / "ablation" / "ablation.csv").is_file()
    assert (work / "tutorial" / "pffdst" / "export" / "model.packed.safetensors").is_file()
    mine = json.loads((work / "tutorial" / "mine" / "summary.json").read_text())
    assert mine["method"] == "my_method"
    if not rounds:
        assert re.search(r"my_method: (\d+) of \1 checks passed", said)
        if torch.__version__.startswith("2.15"):  # whose numbers they are, as the tutorial says
            for figure in re.findall(r"0\.\d{4}|\d\d\.\d\d(?=\sMB)", section("Tutorial: ten minutes")):
                assert figure in said


@pytest.mark.parametrize("file", ["metrics.jsonl", "summary.json"])
def test_every_figure_of_a_run_is_explained(file, tmp_path):
    out = tmp_path / "run"
    sets = ["federation.rounds=1", "federation.local_epochs=1"]
    arguments = [word for setting in sets for word in ("--set", setting)]
    done = CliRunner().invoke(main, ["run", "-q", "--plugin", "pffdst", *arguments, "--out", str(out)])
    assert done.exit_code == 0, done.output
    first, _, second = section("Metrics").partition("`summary.json` is written")
    table = first if file == "metrics.jsonl" else second
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    explained = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    lacking = set(json.loads((out / file).read_text())) - explained
    assert not lacking, f"README.md, Metrics: no row of the table of {file} explains {sorted(lacking)}"


def test_every_hook_is_listed_with_its_signature():
    """In the order of the specification, each under its slot."""
    listed = blocks("# mask_init\n")
    lines = " ".join(listed.split())
    at = -1
    for slot, spec in {**SLOTS, "extras": Extras}.items():
        assert f"# {slot}\n" in listed
        for name in hooks_of(spec):
            signature = str(inspect.signature(getattr(spec, name))).replace("'", "").replace("(self, ", "(")
            found = lines.find(f"{name}{signature}")
            assert found > at, f"{name}{signature}"
            at = found


def test_the_example_plugin_runs_and_swaps(tmp_path):
    example = blocks("# regrow.py")
    assert len(example.splitlines()) <= 40
    path = tmp_path / "regrow.py"
    path.write_text(example)
    short = ["--quiet", "--set", "federation.rounds=4", "--set", "method.readjust.period=1"]
    for number, arguments in enumerate(
        [["--plugin", str(path)], ["--plugin", "pffdst", "--swap", f"readjust={path}"]]
    ):
        out = tmp_path / str(number)
        result = CliRunner().invoke(main, ["run", *arguments, *short, "--out", str(out)])
        assert result.exit_code == 0, result.output
        changed = [
            int(count) for count in re.findall(r'"mask_changed": (\d+)', (out / "metrics.jsonl").read_text())
        ]
        assert max(changed) > 0


def test_every_slot_and_task_choice_is_in_the_tables():
    from fedsparse.core.data import DATASETS, PARTITIONS
    from fedsparse.core.models import MODELS

    for slot in SLOTS:
        assert f"| `{slot}` |" in README
    tables = {"dataset": DATASETS, "model": MODELS, "partition": PARTITIONS}
    for setting, choices in tables.items():
        (row,) = [line for line in README.splitlines() if line.startswith(f"| `task.{setting}` |")]
        assert set(re.findall(r"`([\w-]+)`", row)) == set(choices)


LOOKING = r"^fedsparse (?:config|plugins)(?! --check).*$"


@pytest.mark.parametrize("line", re.findall(LOOKING, README, re.MULTILINE))
def test_commands_that_only_look(line):
    arguments = line.partition("#")[0].split()[1:]
    assert CliRunner().invoke(main, arguments).exit_code == 0


def test_ci_runs_the_readmes_test_command():
    script = (ROOT / ".ci" / "run").read_text()
    (command,) = re.findall(r"^.*pip install -e '\.\[test\]'.*$", README, re.MULTILINE)
    assert command.endswith(" && .venv/bin/python -m pytest -n 2")
    assert "README.md" in script
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert any(requirement.startswith("pytest") for requirement in extras["test"])
