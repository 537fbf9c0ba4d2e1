"""The battery: every installed method against every promise of the engine. A method enters it by existing."""

import pytest
import torch

from fedsparse.core import masks
from fedsparse.core.registry import Registry
from fedsparse.testing import checks

NAMES = Registry().names()

SHORT = {
    "feddst": {"method.readjust.period": 2, "method.readjust.annealing": "constant"},
    "pffdst": {"method.readjust.period": 1},
    "prunefl": {"method.readjust.period": 3},
}
"""Settings that bring a method's own events into the few rounds of a test."""

ENDS_DENSER = {
    "sparsyfed": "the server averages clients' Top-K supports and never prunes",
    "topk": "clients train densely between their Top-K prunings; the server's mask is all ones",
    "zerofl": "as topk",
}
"""Methods that do not end at the budget, by design."""

ROUNDS = 16


def short(make_engine, plugin, **changes):
    """An engine of a method on the tiny task, with its events within 16 rounds."""
    own = {path.replace(".", "__"): value for path, value in SHORT.get(plugin, {}).items()}
    return make_engine(plugin, federation__rounds=ROUNDS, federation__momentum=0.0, **own, **changes)


@pytest.mark.parametrize("plugin", NAMES)
def test_contracts_hold_and_the_budget_is_met_to_the_unit(make_engine, plugin):
    """All contracts and the encoding of every message are on."""
    engine = short(make_engine, plugin, ledger__encode=True)
    reports = list(engine.rounds(engine.start()))
    assert [report.metrics["round"] for report in reports] == list(range(ROUNDS))
    assert all(torch.isfinite(p).all() for p in reports[-1].state.params.values())
    active = sum(masks.active(reports[-1].state.mask).values())
    budget = engine.budget(engine.clock(ROUNDS - 1)).total
    if plugin in ENDS_DENSER:
        assert active >= budget
    else:
        assert active == budget


ELSEWHERE = ("contracts hold", "executors agree", "swaps into")
"""Checks that other tests make more thoroughly: the one above, those of executors and of swaps."""


@pytest.mark.parametrize(
    "check",
    [
        pytest.param(check, id=f"{plugin}-{check}")
        for plugin in NAMES
        for check in checks(plugin, settings=SHORT.get(plugin))
        if not any(part in str(check) for part in ELSEWHERE)
    ],
)
def test_contract(check):
    check()


@pytest.mark.slow
@pytest.mark.parametrize("plugin", NAMES)
def test_every_method_runs_its_digits_preset(plugin, tmp_path):
    from fedsparse.core.resolve import resolve
    from fedsparse.core.runner import run

    summary = run(resolve(plugin, sets=["federation.rounds=5"]), tmp_path / plugin)
    assert summary["rounds"] == 5
    assert 0 <= summary["final"]["test_accuracy"] <= 1
