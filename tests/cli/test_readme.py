"""The README's example is a plugin of at most 40 lines that runs, and its tables name what exists."""

import inspect
import re
import tomllib
from pathlib import Path

import pytest
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


@pytest.mark.parametrize("line", re.findall(r"^fedsparse (?:config|plugins).*$", README, re.MULTILINE))
def test_commands_that_only_look(line):
    arguments = line.partition("#")[0].split()[1:]
    assert CliRunner().invoke(main, arguments).exit_code == 0


def test_ci_runs_the_readmes_test_command():
    script = (ROOT / ".ci" / "run").read_text()
    (command,) = re.findall(r"^.*pip install -e '\.\[test\]'.*$", README, re.MULTILINE)
    assert command.endswith(" && .venv/bin/python -m pytest")
    assert "README.md" in script
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert any(requirement.startswith("pytest") for requirement in extras["test"])
