"""Packages of others: the example and a generated one, installed from their folders, found and run."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import fedsparse
from fedsparse.cli.main import main

EXAMPLE = Path(__file__).parents[1] / "third_party" / "fedsparse-rlr"
CLI = """
import json, sys
from fedsparse.cli.main import main
for command in json.loads(sys.argv[1]):
    main(command, standalone_mode=False)
"""
SHORT = ["--quiet", "--set", "federation.rounds=3", "--set", "federation.local_epochs=1"]


class Site:
    """A folder that packages are installed into, and commands that see them."""

    def __init__(self, path):
        self.path = path
        paths = [str(path), str(Path(fedsparse.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        self.environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "120"}

    def install(self, folder):
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
        self.run(*pip, "--no-deps", "--no-build-isolation", "--target", self.path, folder)

    def run(self, *command, cwd=None, status=0):
        done = subprocess.run(
            [str(word) for word in command],
            cwd=cwd or self.path,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    def fedsparse(self, *commands):
        """Runs commands one after another in one new process."""
        return self.run(sys.executable, "-c", CLI, json.dumps([[str(w) for w in c] for c in commands]))


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """A site with the example package, and the copy that it was installed from."""
    folder = tmp_path_factory.mktemp("example")
    shutil.copytree(EXAMPLE, folder / "source")
    site = Site(folder / "site")
    site.path.mkdir()
    site.install(folder / "source")
    return site, folder / "source"


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    """A site with a package that `new-plugin` wrote, and its folder."""
    folder = tmp_path_factory.mktemp("generated")
    result = CliRunner().invoke(main, ["new-plugin", "my_method", "--in", str(folder)])
    assert result.exit_code == 0, result.output
    site = Site(folder / "site")
    site.path.mkdir()
    shutil.copytree(folder / "fedsparse-my-method", folder / "copy")  # building leaves files
    site.install(folder / "copy")
    return site, folder / "fedsparse-my-method"


@pytest.mark.parametrize(
    ("package", "name", "slot"), [("example", "rlr", "aggregate"), ("generated", "my_method", "readjust")]
)
def test_installed_it_is_listed_run_and_swapped_into_a_method(package, name, slot, request, tmp_path):
    site, _ = request.getfixturevalue(package)
    own, swapped = tmp_path / "own", tmp_path / "swapped"
    listed = site.fedsparse(
        ["plugins"],
        ["run", "--plugin", name, *SHORT, "--out", own],
        ["run", "--plugin", "pffdst", "--swap", f"{slot}={name}", *SHORT, "--out", swapped],
    )
    assert re.search(rf"\b{name}\b.*{slot}", listed)
    assert f"fedsparse-{name.replace('_', '-')} 0.1.0" in listed.replace("_", "-")
    run, swap = (json.loads((out / "summary.json").read_text()) for out in (own, swapped))
    assert run["rounds"] == swap["rounds"] == 3
    assert (run["method"], swap["method"]) == (name, "pffdst")
    assert swap["swaps"][slot].startswith(f"{name}:")


@pytest.mark.parametrize("package", ["example", "generated"])
def test_its_own_tests_pass_where_it_is_installed(package, request):
    site, source = request.getfixturevalue(package)
    said = site.run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=source)
    assert int(re.search(r"(\d+) passed", said)[1]) >= 9


def test_the_example_passes_the_check_of_the_command_line(example):
    said = example[0].fedsparse(["plugins", "check", "rlr"])
    assert re.search(r"rlr: (\d+) of \1 checks passed", said)
    assert "failed" not in said


@pytest.mark.parametrize("package", ["example", "generated"])
def test_it_is_formatted_and_linted(package, request):
    site, source = request.getfixturevalue(package)
    assert "already formatted" in site.run(
        sys.executable, "-m", "ruff", "format", "--check", "--no-cache", source
    )
    assert "All checks passed" in site.run(
        sys.executable, "-m", "ruff", "check", "--no-cache", "--select", "E,F,W,I,UP,B,N", source
    )


@pytest.mark.slow
def test_both_are_typed(example, generated, tmp_path):
    (tmp_path / "fedsparse").symlink_to(Path(fedsparse.__file__).parent)
    files = [source / folder for _, source in (example, generated) for folder in ("src", "tests")]
    example[0].environment["MYPYPATH"] = os.pathsep.join([str(tmp_path), str(files[0])])
    strict = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent"]
    assert "Success" in example[0].run(*strict, "--cache-dir", tmp_path / "cache", *files)


@pytest.mark.parametrize("package", ["example", "generated"])
def test_its_method_is_at_most_forty_lines(package, request):
    (module,) = request.getfixturevalue(package)[1].glob("src/*/__init__.py")
    text = module.read_text(encoding="utf-8")
    method = text[text.index("\nclass ") :]
    assert len([line for line in method.splitlines() if line.strip()]) <= 40


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("9lives", "expected a Python identifier"),
        ("my-method", "expected a Python identifier"),
        ("My", "lower-case"),
        ("class", "no word of the language"),
        ("../up", "expected a Python identifier"),
        ("feddst", "is installed, by fedsparse"),
    ],
)
def test_names_that_are_none_or_taken_are_refused_and_nothing_is_written(name, said, tmp_path):
    result = CliRunner().invoke(main, ["new-plugin", name, "--in", str(tmp_path / "in")])
    assert result.exit_code == 2
    assert said in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_folder_that_exists_is_left_alone(tmp_path):
    taken = tmp_path / "fedsparse-mine"
    taken.mkdir()
    result = CliRunner().invoke(main, ["new-plugin", "mine", "--in", str(tmp_path)])
    assert result.exit_code == 1
    assert f"{taken} exists" in result.stderr
    assert not list(taken.iterdir())
