"""PruneFL: importance over time, the prunable set, and the budget that decides how many weights there are."""

import pytest
import torch

from fedsparse.core import masks, rng
from fedsparse.core.budget import ALLOCATIONS, Budget, Layer
from fedsparse.core.loss import Probe
from fedsparse.core.state import Clock
from fedsparse.plugins.prunefl import InitialImportance, Reconfigure, importance

LAYERS = (Layer("a", (30, 20), 30), Layer("b", (12, 30), 12), Layer("c", (4, 12), 4))
BUDGET = Budget(LAYERS, "global", 0.8)


def start(budget, seed=0):
    """Parameters and a mask at the budget, a tenth of it frozen, and squared gradients."""
    torch.manual_seed(seed)
    dense = {layer.name: torch.randn(layer.shape) for layer in LAYERS}
    mask = masks.by_budget(masks.random_scores(masks.full(dense, budget), rng.key(seed)), budget)
    frozen = {n: m & (rng.uniform(rng.key(seed, n), m.shape) < 0.1) for n, m in mask.items()}
    squares = {n: torch.randn_like(p).square() for n, p in dense.items()}
    return masks.apply(dense, mask), mask, frozen, squares


def flat(tree):
    return torch.cat([tree[layer.name].flatten() for layer in LAYERS])


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_exact_counts_and_frozen_under_every_allocation(allocation):
    budget = Budget(LAYERS, allocation, 0.8)
    params, mask, frozen, squares = start(budget)
    moved = Reconfigure().readjust(params, mask, frozen, squares, budget, Clock(0, 100))
    counts = masks.active(moved.mask)
    assert sum(counts.values()) == budget.total
    assert budget.counts is None or counts == dict(budget.counts)
    assert any(not torch.equal(moved.mask[n], mask[n]) for n in mask)
    for n in mask:
        assert (moved.mask[n] | ~frozen[n]).all()
        assert torch.equal(moved.params[n], torch.where(moved.mask[n], params[n], 0.0))


def test_only_the_prunable_set_is_up_for_choice():
    """The largest 70 % stay whatever their gradient; the rest is the best of all others by g²/t."""
    params, mask, frozen, squares = start(BUDGET)
    none = {n: torch.zeros_like(f) for n, f in frozen.items()}
    squares = {n: torch.where(mask[n], squares[n], 0.5 * squares[n]) for n in mask}
    moved = Reconfigure(prunable=0.3).readjust(params, mask, none, squares, BUDGET, Clock(0, 100))
    size, active = flat(params).abs(), flat(mask)
    order = torch.where(active, size, -1.0).argsort(descending=True)
    sure = order[: BUDGET.total - int(0.3 * BUDGET.total)]
    rest = order[BUDGET.total - int(0.3 * BUDGET.total) :]
    best = rest[flat(squares)[rest].argsort(descending=True)[: int(0.3 * BUDGET.total)]]
    assert set(flat(moved.mask).nonzero().flatten().tolist()) == {*sure.tolist(), *best.tolist()}
    survivors = [i for i in best.tolist() if active[i]]
    grown = [i for i in best.tolist() if not active[i]]
    assert survivors
    assert grown
    # chosen again: the value stays, unlike in a drop-and-grow rewiring
    assert torch.equal(flat(moved.params)[survivors], flat(params)[survivors])
    assert flat(params)[survivors].all()
    assert not flat(moved.params)[grown].any()


def test_the_prunable_share_decays():
    """0.3·0.5^(t/half-life): with all gradients at inactive weights, all that is prunable is replaced."""
    params, mask, frozen, _ = start(BUDGET)
    none = {n: torch.zeros_like(f) for n, f in frozen.items()}
    elsewhere = {n: torch.where(mask[n], 0.0, 1.0) for n in mask}
    part = Reconfigure(prunable=0.3, half_life=0.5)
    for round_ in (0, 50, 99):
        moved = part.readjust(params, mask, none, elsewhere, BUDGET, Clock(round_, 100))
        replaced = int((flat(mask) & ~flat(moved.mask)).sum())
        assert replaced == int(BUDGET.total * 0.3 * 0.5 ** (round_ / 50))


def test_time_moves_weights_between_layers_only_over_the_network():
    """A layer ten times as slow keeps fewer under "global"; within layers time cancels."""
    params, mask, frozen, squares = start(BUDGET)
    slow = (10.0, 1.0, 1.0)
    for allocation in ("global", "erk"):
        budget = Budget(LAYERS, allocation, 0.8)
        params, mask, frozen, squares = start(budget)
        chosen = [
            Reconfigure(times=t).readjust(params, mask, frozen, squares, budget, Clock(0, 100)).mask
            for t in ((), (2.0, 2.0, 2.0), slow)
        ]
        assert all(torch.equal(chosen[0][n], chosen[1][n]) for n in mask)  # only ratios matter
        counts = [masks.active(c) for c in chosen]
        if allocation == "global":
            assert counts[2]["a"] < counts[0]["a"]
            assert counts[2]["b"] > counts[0]["b"]
        else:
            assert all(torch.equal(chosen[0][n], chosen[2][n]) for n in mask)


def test_times_must_fit_the_layers(make_engine):
    with pytest.raises(ValueError, match="2 entries for 3 prunable layers"):
        importance(start(BUDGET)[3], (1.0, 2.0), BUDGET)
    engine = make_engine("prunefl", method__mask_init__times=[3.0, 1.0, 1.0])
    fast = make_engine("prunefl").start().mask
    assert masks.active(engine.start().mask)["fc1.weight"] < masks.active(fast)["fc1.weight"]


def test_the_first_mask_ranks_squared_gradients(make_engine):
    engine = make_engine("prunefl")
    state, budget = engine.start(), engine.budget(engine.clock(0))
    probe = Probe(engine.loss, engine.buffers, engine.task.sample(256))
    gradient = probe.gradient(engine.params)
    ranked = torch.cat([gradient[layer.name].flatten() for layer in budget.layers]).abs()
    kept = torch.cat([state.mask[layer.name].flatten() for layer in budget.layers])
    assert budget.counts is None
    assert int(kept.sum()) == budget.total
    assert ranked[kept].min() >= ranked[~kept].max()
    assert isinstance(engine.hooks.method.mask_init, InitialImportance)


def test_a_run_reconfigures_every_period(make_engine):
    """Squared gradients are sent, dense, in those rounds; never after the last one."""
    engine = make_engine("prunefl", method__readjust__period=3, federation__rounds=9, ledger__encode=True)
    assert engine.contracts is not None
    reports = list(engine.rounds(engine.start()))
    changed = [report.metrics["round"] for report in reports if report.metrics["mask_changed"]]
    assert changed == [2, 5]
    total = engine.budget(engine.clock(0)).total
    assert all(sum(masks.active(report.state.mask).values()) == total for report in reports)


def test_the_server_sees_the_mean_of_the_squares():
    """Opposite gradients of two clients do not cancel, unlike in the square of their mean."""
    part, g = Reconfigure(), {"a": torch.tensor([3.0, -1.0])}
    scores = [part.grow_score(g), part.grow_score({"a": -g["a"]})]
    assert torch.equal((scores[0]["a"] + scores[1]["a"]) / 2, torch.tensor([9.0, 1.0]))


@pytest.mark.parametrize("base", ["feddst", "pffdst"])
def test_reconfiguration_under_another_method_leaves_frozen_weights(make_engine, base):
    engine = make_engine(base, ["readjust=prunefl"], federation__rounds=8, method__readjust__period=1)
    reports = list(engine.rounds(engine.start()))
    assert sum(report.metrics["mask_changed"] > 0 for report in reports) >= 6
    if base == "pffdst":
        frozen = reports[-1].state.frozen["fc1.weight"]
        assert frozen.any()
        held = [report.state.params["fc1.weight"][frozen] for report in reports[4:]]
        assert all(torch.equal(held[0], value) for value in held)
