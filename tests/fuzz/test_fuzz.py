"""Random command lines end with a message and with 0, 1 or 2, never with a traceback."""

import os
import resource
import shutil
import sys
import time
import traceback
import warnings

import pytest
from click.testing import CliRunner

from fedsparse.cli.main import main

from .cases import SMALL, Cases, folders

FAST, MANY = 300, 5000
SEED = int(os.environ.get("FEDSPARSE_FUZZ_SEED", "0"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run's folder, and damaged ones."""
    place = tmp_path_factory.mktemp("runs")
    words = [
        "run",
        "--plugin",
        "pffdst",
        *(w for s in SMALL for w in ("--set", s)),
        "--out",
        str(place / "good"),
    ]
    assert CliRunner().invoke(main, words).exit_code == 0
    return folders(place, place / "good")


def played(words):
    """What is wrong with how a command line ends; "" if nothing is."""
    begun = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = CliRunner().invoke(main, words, catch_exceptions=True)
    error = result.exception
    if error is not None and not isinstance(error, SystemExit):
        return "".join(traceback.format_exception(error))
    if result.exit_code not in (0, 1, 2):
        return f"exit code {result.exit_code}"
    if "Traceback" in result.output:
        return result.output
    if "FEDSPARSE_TRACEBACK" in result.stderr:  # an error that nobody meant for the user
        return result.stderr
    if result.exit_code and not result.stderr.strip() and words[:2] != ["plugins", "check"]:
        return f"exit code {result.exit_code} and nothing said"
    took = time.monotonic() - begun
    return f"took {took:.0f} s" if took > 60 else ""


@pytest.fixture
def little_memory():
    """What asks for an absurd size must be refused, or fail here and not on the machine."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 4 * 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def fuzz(seed, count, place, runs, monkeypatch):
    monkeypatch.chdir(place)
    (place / "broken.py").write_text("raise ValueError('no')")
    (place / "file").write_text("x")
    cases = Cases(seed, place, runs)
    found = []
    for number in range(count):
        words = cases.one()
        if trouble := played(words):
            found.append(f"seed {seed}, case {number}: fedsparse {words!r}\n{trouble}")
            print(found[-1], file=sys.__stderr__, flush=True)
        for made in place.glob("out*"):
            shutil.rmtree(made, ignore_errors=True)
    assert not found, "\n\n".join(found)


@pytest.mark.usefixtures("little_memory")
def test_random_command_lines(tmp_path, runs, monkeypatch):
    fuzz(SEED, FAST, tmp_path, runs, monkeypatch)


@pytest.mark.slow
@pytest.mark.usefixtures("little_memory")
def test_thousands_of_random_command_lines(tmp_path, runs, monkeypatch):
    """FEDSPARSE_FUZZ_SEED=7 draws others."""
    fuzz(SEED + 1, MANY, tmp_path, runs, monkeypatch)


FOUND = {
    "a name that no file can have": (["new-plugin", "a" * 300], "at most 100 letters"),
    "more samples than a tensor counts": (
        ["run", "--set", "federation.batch_size=10000000000000"],
        "batch_size",
    ),
    "more clients than can be numbered": (
        ["run", "--set", f"federation.clients={2**70}"],
        "federation.clients",
    ),
    "a round of a thousand million clients": (
        [
            "run",
            "--set",
            "federation.clients=10000000000",
            "--set",
            "federation.clients_per_round=1000000000",
        ],
        "less than or equal to 10000000",
    ),
}


@pytest.mark.parametrize("case", FOUND)
def test_refused_with_what_is_allowed(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words, said = FOUND[case]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2, result.output
    assert said in result.stderr


@pytest.mark.parametrize("command", ["diff", "card", "compare", "export"])
def test_a_summary_that_is_no_table(runs, command):
    words = [command, *([str(runs[0])] if command == "diff" else []), str(runs[7])]
    (runs[7] / "summary.json").write_bytes(b"[]")  # a fuzzed `resume` may have mended it
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 1
    assert "summary.json is damaged" in result.stderr


@pytest.mark.parametrize("command", ["compare", "report"])
def test_a_run_whose_name_no_folder_can_have(runs, command, tmp_path):
    words = [command, str(runs[0]), "[" * 400, *(["--out", str(tmp_path)] if command == "report" else [])]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 1
    assert "is no run" in result.stderr


def test_a_batch_larger_than_all_data_takes_no_more_memory_than_the_data(tmp_path):
    sets = [*SMALL, "federation.batch_size=2000000000", "execution.executor=graph"]
    words = ["run", *(word for setting in sets for word in ("--set", setting)), "--out", str(tmp_path / "r")]
    assert CliRunner().invoke(main, words).exit_code == 0
