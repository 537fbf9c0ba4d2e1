"""The battery: every installed method against every promise of the engine. A method enters it by existing."""

import pytest
import torch

from fedsparse.core import checkpoint, masks, rng
from fedsparse.core.loss import ClientLoss
from fedsparse.core.masks import movable
from fedsparse.core.registry import Registry
from fedsparse.core.state import Batch, Carry

NAMES = Registry().names()

SHORT = {
    "feddst": {"method__readjust__period": 2, "method__readjust__annealing": "constant"},
    "pffdst": {"method__readjust__period": 1},
    "prunefl": {"method__readjust__period": 3},
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
    settings = {"federation__rounds": ROUNDS, "federation__momentum": 0.0, **SHORT.get(plugin, {}), **changes}
    return make_engine(plugin, **settings)


def lines(reports):
    return [{name: v for name, v in report.metrics.items() if name != "seconds"} for report in reports]


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


@pytest.mark.parametrize("plugin", NAMES)
def test_the_same_seed_twice(make_engine, plugin):
    runs = []
    for _ in range(2):
        engine = short(make_engine, plugin, federation__rounds=6)
        runs.append(list(engine.rounds(engine.start())))
    assert lines(runs[0]) == lines(runs[1])
    ends = [run[-1].state.params for run in runs]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize("plugin", NAMES)
def test_server_and_client_state_go_through_a_file(make_engine, plugin, tmp_path):
    """A run that goes on from a checkpoint ends bit-identical to one that was not interrupted."""
    engine = short(make_engine, plugin)
    whole = list(engine.rounds(engine.start()))
    first = short(make_engine, plugin)
    reports = first.rounds(first.start())
    half = [next(reports) for _ in range(9)][-1].state
    checkpoint.save(tmp_path / "c", half, first.ledger.state(), {})
    second = short(make_engine, plugin)
    state, ledger = checkpoint.load(tmp_path / "c", {})
    second.ledger.load_state(ledger)
    rest = list(second.rounds(state))
    assert lines(whole[9:]) == lines(rest)
    for name, value in whole[-1].state.params.items():
        assert torch.equal(value, rest[-1].state.params[name])


@pytest.mark.parametrize("plugin", NAMES)
def test_client_hooks_under_vmap_equal_the_loop(make_engine, plugin):
    """Three clients with masks of their own: start, two steps, readjustment, contribution; in float64,
    where batched kernels that sum in another order leave 1e-16 a sum."""
    engine = short(make_engine, plugin)
    start, hooks = engine.start(), engine.hooks
    params0 = {n: p.double() for n, p in start.params.items()}
    drawn = [engine.task.batches(client, 0, 0) for client in range(3)]
    batches = [[Batch(c[i].inputs.double(), c[i].targets) for c in drawn] for i in range(2)]
    frozen = {n: torch.zeros_like(m) for n, m in start.mask.items()}
    first = next(iter(frozen))
    frozen[first] = start.mask[first] & (start.params[first] > 0)
    own = [
        {n: m & (frozen[n] | (rng.uniform(rng.key(c, n), m.shape) < 0.8)) for n, m in start.mask.items()}
        for c in range(3)
    ]

    def client(mask, one, two):
        params = {n: torch.where(mask[n], p, 0.0) if n in mask else p for n, p in params0.items()}
        anchor, state = params, {}
        if hooks.get("client_init"):
            state = hooks.call(
                "client_init", dict, params=params, mask=mask, momentum=0.0, broadcast={}, memory={}
            )
        carry = Carry({}, state)
        for batch in (one, two):
            params, carry, _ = hooks.call(
                "local_step",
                tuple,
                loss=ClientLoss(engine.loss, mask, anchor),
                params=params,
                carry=carry,
                batch=batch,
                trainable=movable(mask, frozen),
                anchor=anchor,
                lr=0.05,
                momentum=0.0,
                weight_decay=0.001,
                target=0.8,
                clock=engine.clock(1),
                key=rng.key(0),
            )
        moved = mask
        if hooks.site == "client" and hooks.get("readjust"):
            params, moved, _ = hooks.call(
                "readjust",
                tuple,
                params=params,
                mask=mask,
                frozen=frozen,
                score={n: params[n].sin().abs() for n in mask},
                target=0.8,
                budget=engine.budget(engine.clock(1)),
                clock=engine.clock(1),
                key=rng.key(0),
                memory={},
            )
        weight = torch.tensor(40.0, dtype=torch.float64)
        sums = hooks.call(
            "contribute",
            dict,
            params=params,
            mask=moved,
            anchor=anchor,
            weight=weight,
            carry=carry,
            moved=True,
        )
        return params, moved, sums

    stacked = {n: torch.stack([mask[n] for mask in own]) for n in own[0]}
    together = [Batch(*(torch.stack(field) for field in zip(*pair, strict=True))) for pair in batches]
    stacked_params, stacked_masks, stacked_sums = torch.func.vmap(client)(stacked, *together)
    for number in range(3):
        params, mask, sums = client(own[number], *(pair[number] for pair in batches))
        for name, value in params.items():
            torch.testing.assert_close(stacked_params[name][number], value, atol=1e-10, rtol=1e-8)
        for name, value in mask.items():
            assert torch.equal(stacked_masks[name][number], value)
        for name, value in sums.items():
            torch.testing.assert_close(stacked_sums[name][number], value, atol=1e-8, rtol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("plugin", NAMES)
def test_every_method_runs_its_digits_preset(plugin, tmp_path):
    from fedsparse.core.resolve import resolve
    from fedsparse.core.runner import run

    summary = run(resolve(plugin, sets=["federation.rounds=5"]), tmp_path / plugin)
    assert summary["rounds"] == 5
    assert 0 <= summary["final"]["test_accuracy"] <= 1
