"""Each check of `fedsparse.testing` passes on a sound method and fails on one that breaks its promise."""

import subprocess
import sys
from typing import ClassVar

import pytest
import torch
from click.testing import CliRunner

from fedsparse import ConfigError, Method, Part, Readjusted, hookimpl
from fedsparse.cli.main import main
from fedsparse.plugins.fedavg import WeightedMean
from fedsparse.testing import BrokenError, Contract, check, checks

CALLS = []


class Readjustment(Part):
    """Moves nothing; the parts below break one promise each."""

    @hookimpl
    def readjust(self, params, mask, memory):
        return Readjusted(params, mask, memory)


class Overfull(Part):
    @hookimpl
    def readjust(self, params, mask, memory, clock):
        first = next(iter(mask))
        grown = {first: torch.ones_like(mask[first])} if clock.round == 3 else {}
        return Readjusted(params, {**mask, **grown}, memory)


class Idle(Part):
    period: int = 40

    @hookimpl
    def due(self, clock):
        return clock.round == 30

    @hookimpl
    def readjust(self, params, mask, memory):
        return Readjusted(params, mask, memory)


class WritesMemory(Part):
    @hookimpl
    def readjust(self, params, mask, memory):
        memory = memory or {"count": torch.zeros(1)}
        memory["count"].add_(1)
        return Readjusted(params, mask, memory)


class Unseeded(Part):
    @hookimpl
    def readjust(self, params, mask, memory):
        noise = {name: p * (1 + 0.01 * torch.rand_like(p)) for name, p in params.items()}
        return Readjusted(noise, mask, memory)


class Remembers(Part):
    """Keeps its state in the module and not in `memory`."""

    @hookimpl
    def readjust(self, params, mask, memory, clock):
        if clock.round == 0:
            CALLS.clear()
        CALLS.append(1)
        scaled = {name: p * (1 - 0.001 * len(CALLS)) for name, p in params.items()}
        return Readjusted(scaled, mask, memory)


class Mean(Part):
    """FedAvg's mean, with a contribution of its own."""

    @hookimpl
    def aggregate(self, sums, params, mask, frozen, budget, memory):
        return WeightedMean().aggregate(sums, params, mask, frozen, budget, memory)


class Branches(Mean):
    @hookimpl
    def contribute(self, params, mask, weight, moved):
        if next(iter(params.values())).sum() > 1e9:
            weight = weight * 2
        return WeightedMean().contribute(params, mask, weight, moved)


class NeedsPartner(Part):
    needs: ClassVar[dict[str, str]] = {"aggregate": "Mean2"}

    @hookimpl
    def readjust(self, params, mask, memory):
        return Readjusted(params, mask, memory)


class Mean2(Mean):
    @hookimpl
    def contribute(self, params, mask, weight, moved):
        return WeightedMean().contribute(params, mask, weight, moved)


class Tied(Part):
    """Relies on a parameter's value that only `Counting` leaves."""

    @hookimpl
    def readjust(self, params, mask, memory):
        if not (params["fc1.bias"] == 7).all():
            raise KeyError("count")
        return Readjusted(params, mask, memory)


class Counting(Mean2):
    @hookimpl
    def aggregate(self, sums, params, mask, frozen, budget, memory):
        made = WeightedMean().aggregate(sums, params, mask, frozen, budget, memory)
        return made._replace(params={**made.params, "fc1.bias": torch.full_like(params["fc1.bias"], 7)})


def only(method, name, **more):
    (contract,) = [c for c in checks(method, **more) if str(c) == name]
    return contract


def test_a_sound_method_passes_everything():
    outcomes = check(Method("sound", readjust=Readjustment()))
    assert [o.name for o in outcomes if not o.passed] == []
    assert outcomes[-1].name == "readjust swaps into fedavg"
    assert len(outcomes) == 9


@pytest.mark.parametrize(
    ("name", "slot", "part", "said"),
    [
        (
            "contracts hold, messages decode",
            "readjust",
            Overfull(),
            "hook readjust, round 3: 'fc1.weight' has 720",
        ),
        ("budget promise kept every round", "readjust", Overfull(), "after round 3, 'fc1.weight' has 720"),
        ("every hook is called", "readjust", Idle(), "never called in 16 rounds: method bad, part Idle"),
        ("no hook writes into its arguments", "readjust", WritesMemory(), "argument memory['count']"),
        ("same seed, same run", "readjust", Unseeded(), "draw from `key`"),
        ("resumed run equals uninterrupted", "readjust", Remembers(), "keep in `memory`"),
        ("client hooks under vmap equal a loop", "aggregate", Branches(), "vmap"),
        ("executors agree", "aggregate", Branches(), "hook contribute"),
    ],
)
def test_a_check_fails_where_its_promise_is_broken(name, slot, part, said):
    outcome = only(Method("bad", **{slot: part}), name).result()
    assert not outcome.passed
    assert said in outcome.message


def test_called_in_a_test_a_check_raises():
    method = Method("bad", readjust=Unseeded())
    with pytest.raises(BrokenError, match="two runs of one seed differ"):
        only(method, "same seed, same run")()
    only(method, "budget promise kept every round")()


def test_a_swap_may_be_refused_with_a_reason():
    method = Method("pair", readjust=NeedsPartner(), aggregate=Mean2())
    outcome = only(method, "readjust swaps into fedavg").result()
    assert outcome.passed
    assert "works only with Mean2" in outcome.message


def test_a_swap_that_fails_in_its_run_fails_the_check():
    """The part works with the aggregation of its own method only, and does not say so."""
    outcome = only(Method("tied", readjust=Tied(), aggregate=Counting()), "readjust swaps into fedavg")
    assert "raised KeyError: 'count'" in outcome.result().message


def test_settings_reach_the_runs_and_wrong_ones_are_refused_at_once():
    slow = Method("slow", readjust=Idle())
    assert only(slow, "every hook is called", settings={"federation.rounds": 32}).result().passed
    with pytest.raises(ConfigError, match=r"method\.readjust\.perod"):
        checks(slow, settings={"method.readjust.perod": 1})
    with pytest.raises(ConfigError, match="unknown plugin 'nope'"):
        checks("nope")


PARTS_ONLY = """
from fedsparse import Part, Readjusted, hookimpl

class Still(Part):
    @hookimpl
    def readjust(self, params, mask, memory):
        return Readjusted(params, mask, {})

class Torn(Part):
    @hookimpl
    def readjust(self, params, mask, memory):
        return Readjusted(params, {}, {})
"""


def test_the_command_prints_a_line_a_check_and_fails_if_one_does(tmp_path):
    """A file without METHOD is checked part by part."""
    path = tmp_path / "parts.py"
    path.write_text(PARTS_ONLY)
    result = CliRunner().invoke(main, ["plugins", "check", str(path)])
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert len(lines) == 2 * 8 + 1
    assert all(line.startswith("ok") == ("Still" in line.partition("]")[0]) for line in lines[:8])
    assert "hook readjust, round 0: mask: missing" in result.stdout
    assert "as in 'contracts hold" in result.stdout


def test_a_file_without_a_part_of_a_slot_has_nothing_to_check(tmp_path):
    path = tmp_path / "extra.py"
    path.write_text(
        "from fedsparse import Part, hookimpl\n"
        "class Near(Part):\n    @hookimpl\n    def penalty(self, params):\n        return 0\n"
    )
    with pytest.raises(ConfigError, match="neither METHOD nor a part of a slot"):
        checks(str(path))


def test_the_command_of_a_sound_plugin_succeeds():
    result = CliRunner().invoke(main, ["plugins", "check", "random", "--set", "federation.rounds=4"])
    assert result.exit_code == 0, result.output
    assert "4 rounds" in result.stdout
    assert "random: 9 of 9 checks passed" in result.stdout


def test_the_option_is_the_command(tmp_path):
    path = tmp_path / "empty.py"
    path.write_text("PARTS = []\n")
    results = [CliRunner().invoke(main, ["plugins", *words, str(path)]) for words in (["check"], ["--check"])]
    assert results[0].output == results[1].output
    assert results[0].exit_code == results[1].exit_code != 0
    both = CliRunner().invoke(main, ["plugins", "--check", "rigl", "show", "rigl"])
    assert both.exit_code == 2
    assert "give one" in both.output


def test_importing_fedsparse_does_not_import_the_battery():
    code = "import sys, fedsparse; assert 'torch' not in sys.modules; fedsparse.testing.checks"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert Contract.__module__ == "fedsparse.core.testing"
