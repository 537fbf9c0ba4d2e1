"""SET and RigL run federated, and the rewiring that they share."""

import math

import pytest
import torch

from fedsparse.core import masks, rewiring, rng
from fedsparse.core.budget import ALLOCATIONS, Budget, Layer
from fedsparse.core.schedule import share
from fedsparse.core.state import Clock
from fedsparse.plugins.rigl import Rig
from fedsparse.plugins.set import Evolve

LAYERS = (Layer("a", (30, 20), 30), Layer("b", (12, 30), 12), Layer("c", (4, 12), 4))
PARTS = {"set": Evolve(site="client"), "rigl": Rig(site="client")}
CLOCK = Clock(20, 100, 1, 2)


def start(budget, seed=0, dtype=torch.float32):
    """Parameters and a mask at the budget, a tenth of it frozen, and a score."""
    torch.manual_seed(seed)
    dense = {layer.name: torch.randn(layer.shape, dtype=dtype) for layer in LAYERS}
    full = masks.full(dense, budget)
    mask = masks.by_budget(masks.random_scores(full, rng.key(seed)), budget)
    frozen = {n: m & (rng.uniform(rng.key(seed, n), m.shape) < 0.1) for n, m in mask.items()}
    score = {n: torch.randn_like(p) for n, p in dense.items()}
    return masks.apply(dense, mask), mask, frozen, score


def readjust(name, params, mask, frozen, score, budget, key=None):
    part = PARTS[name]
    if name == "set":
        return part.readjust(params, mask, frozen, budget, key if key is not None else rng.key(1))
    return part.readjust(params, mask, frozen, score, budget, CLOCK)


def fraction(name):
    return PARTS["set"].fraction if name == "set" else PARTS["rigl"].dropped(CLOCK)


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("name", PARTS)
def test_counts_values_and_frozen(name, allocation):
    """Exact counts; the fraction of each layer (or of the network) leaves, the smallest; new ones are 0."""
    budget = Budget(LAYERS, allocation, 0.8)
    params, mask, frozen, score = start(budget)
    moved = readjust(name, params, mask, frozen, score, budget)
    after = masks.active(moved.mask)
    assert sum(after.values()) == budget.total
    if budget.counts is not None:
        assert after == dict(budget.counts)
    kept = rewiring.keep_largest(params, mask, frozen, budget, fraction(name))
    counts = budget.counts or {"network": budget.total}
    left = masks.active(kept) if budget.counts else {"network": sum(masks.active(kept).values())}
    assert left == {n: count - share(count, fraction(name)) for n, count in counts.items()}
    for n in mask:
        assert (kept[n] <= mask[n]).all()
        assert (moved.mask[n] >= kept[n]).all()
        assert (moved.mask[n] | ~frozen[n]).all()
        assert torch.equal(moved.params[n][kept[n]], params[n][kept[n]])
        assert not moved.params[n][~kept[n]].any()
    groups = [[n] for n in mask] if budget.counts else [list(mask)]
    for group in groups:
        dropped = torch.cat([params[n][mask[n] & ~kept[n]].abs() for n in group])
        stay = torch.cat([params[n][kept[n] & ~frozen[n]].abs() for n in group])
        assert len(dropped) > 0
        assert dropped.max() <= stay.min()


@pytest.mark.parametrize("allocation", ["erk", "global"])
def test_rigl_grows_where_the_gradient_is_largest(allocation):
    """Either sign counts; what was just dropped may come back, at 0."""
    budget = Budget(LAYERS, allocation, 0.8)
    params, mask, frozen, score = start(budget)
    kept = rewiring.keep_largest(params, mask, frozen, budget, fraction("rigl"))
    moved = readjust("rigl", params, mask, frozen, score, budget)
    grown = {n: moved.mask[n] & ~kept[n] for n in mask}
    for group in [[n] for n in mask] if budget.counts else [list(mask)]:
        chosen = torch.cat([score[n][grown[n]].abs() for n in group])
        rest = torch.cat([score[n][~moved.mask[n]].abs() for n in group])
        assert chosen.min() >= rest.max()
    signs = torch.cat([score[n][grown[n]] for n in mask])
    assert (signs < 0).any()
    assert (signs > 0).any()
    assert any((grown[n] & mask[n]).any() for n in mask)


def test_set_draws_by_its_key_and_evenly():
    budget = Budget(LAYERS, "erk", 0.8)
    params, mask, frozen, score = start(budget)
    moved = [readjust("set", params, mask, frozen, score, budget, rng.key(seed)).mask for seed in (1, 1, 2)]
    assert all(torch.equal(moved[0][n], moved[1][n]) for n in mask)
    assert not all(torch.equal(moved[0][n], moved[2][n]) for n in mask)
    kept = rewiring.keep_largest(params, mask, frozen, budget, 0.3)["a"]
    draws = [readjust("set", params, mask, frozen, score, budget, rng.key(s)).mask["a"] for s in range(300)]
    rate = torch.stack(draws).double().mean(0)[~kept]
    expected = (budget.counts["a"] - int(kept.sum())) / int((~kept).sum())
    # a rate over 300 draws: 5 standard deviations
    assert (rate - expected).abs().max() < 5 * math.sqrt(expected * (1 - expected) / 300)


def test_frozen_weights_outweigh_the_fraction():
    """With more frozen than may be kept, all of them stay and the budget still holds."""
    budget = Budget(LAYERS, "erk", 0.8)
    params, mask, _, score = start(budget)
    frozen = {n: m & (params[n].abs() < 1) for n, m in mask.items()}
    kept = rewiring.keep_largest(params, mask, frozen, budget, 0.9)
    assert all((kept[n] | ~frozen[n]).all() for n in mask)
    grown = masks.grow_largest(kept, {n: s.abs() for n, s in score.items()}, budget)
    assert masks.active(grown) == dict(budget.counts)
    assert all((grown[n] | ~frozen[n]).all() for n in mask)


def test_a_mask_below_the_budget_is_filled():
    """After an aggregation that left fewer: as many fewer are dropped, and growth meets the budget."""
    budget = Budget(LAYERS, "erk", 0.5)
    params, mask, frozen, score = start(Budget(LAYERS, "erk", 0.6))
    for name in PARTS:
        moved = readjust(name, params, mask, frozen, score, budget)
        assert masks.active(moved.mask) == dict(budget.counts)


@pytest.mark.parametrize("allocation", ["erk", "global"])
@pytest.mark.parametrize("name", PARTS)
def test_clients_under_vmap_equal_the_loop(name, allocation):
    """Three clients with parameters, masks and keys of their own, in float64; the same choices to the bit."""
    budget = Budget(LAYERS, allocation, 0.8)
    frozen = start(budget)[2]
    clients = [start(budget, seed, torch.float64) for seed in (0, 1, 2)]
    clients = [(p, {n: m[n] | frozen[n] for n in m}, s) for p, m, _, s in clients]
    keys = [rng.key(7, seed) for seed in range(3)]

    def client(params, mask, score, key):
        moved = readjust(name, params, mask, frozen, score, budget, key)
        return moved.params, moved.mask

    def stack(trees):
        return {n: torch.stack([tree[n] for tree in trees]) for n in trees[0]}

    together = torch.func.vmap(client)(
        *(stack(trees) for trees in zip(*clients, strict=True)), torch.stack(keys)
    )
    for index, (given, key) in enumerate(zip(clients, keys, strict=True)):
        params, mask = client(*given, key)
        for n in mask:
            assert torch.equal(together[0][n][index], params[n])
            assert torch.equal(together[1][n][index], mask[n])


def due(part, rounds, epochs=2, sparsity=0.8):
    budget = Budget(LAYERS, "erk", sparsity)
    epoch = epochs - 1 if part.site == "client" else 0
    return [t for t in range(rounds) if part.due(Clock(t, rounds, epoch, epochs), budget)]


def test_when_parts_rewire():
    """Every `period` rounds of training, neither before the first nor after the last."""
    assert due(Evolve(), 21) == [5, 10, 15, 20]
    assert due(Evolve(site="client"), 21) == [5, 10, 15, 20]
    assert due(Rig(), 21) == [4, 9]  # after 5 and 10 rounds; T_end is after 15
    assert due(Rig(end=1.0), 20) == [4, 9, 14]  # never after the last round
    assert due(Rig(site="client"), 21) == [5, 10]
    assert due(Rig(fraction=0.0), 21) == []
    for part in (Evolve(), Rig(), Evolve(site="client"), Rig(site="client")):
        assert due(part, 21, sparsity=0.0) == []
    budget = Budget(LAYERS, "erk", 0.8)
    assert rewiring.due(Clock(18, 20), "server:end", 19, budget)
    assert not rewiring.due(Clock(19, 20), "server:end", 20, budget)
    client = Rig(site="client")
    assert [e for e in range(4) if client.due(Clock(5, 21, e, 3), budget)] == [2]


def test_rigl_fraction_is_the_cosine_of_the_paper():
    part = Rig(fraction=0.3, end=0.75)
    for done in (1, 50, 74):
        expected = 0.15 * (1 + math.cos(math.pi * done / 75))
        assert part.dropped(Clock(done - 1, 100)) == pytest.approx(expected)
    assert part.dropped(Clock(74, 100)) == 0
    assert Rig(site="client").dropped(Clock(50, 100)) == pytest.approx(part.dropped(Clock(49, 100)))


@pytest.mark.parametrize("site", ["server", "client"])
@pytest.mark.parametrize("name", PARTS)
def test_a_run_rewires_when_due_and_meets_the_budget(make_engine, name, site):
    place = "client" if site == "client" else PARTS[name].__class__().site
    engine = make_engine(name, method__readjust__site=place, federation__rounds=12, ledger__encode=True)
    assert engine.contracts is not None
    reports = list(engine.rounds(engine.start()))
    changed = [report.metrics["round"] for report in reports if report.metrics["mask_changed"]]
    part = engine.hooks.method.readjust
    assert changed == due(part, 12)
    assert len(changed) == {("set", "server"): 2, ("set", "client"): 2}.get((name, site), 1)
    for report in reports:
        assert masks.active(report.state.mask) == dict(engine.budget(engine.clock(0)).counts)


def test_rigl_on_the_server_takes_the_mean_before_the_magnitude(make_engine):
    """The mask after a rewiring is the one of the clients' weighted mean gradient."""
    engine = make_engine("rigl", federation__rounds=12)
    executor, server = engine.executor, engine.readjust
    gradients, seen = [], {}
    score = executor.score

    def watched_score(plan, client, clock, batches):
        found = score(plan, client, clock, batches)
        gradients.append((len(engine.task.partition.train_of(client.number)), found))
        return found

    def watched_readjust(state, site, budget, clock, uploads=None):
        if site == "server:end" and gradients and not seen:
            seen.update(params=state.params, mask=state.mask, frozen=state.frozen, budget=budget, clock=clock)
            server(state, site, budget, clock, uploads)
            seen.update(after=state.mask)
            return
        server(state, site, budget, clock, uploads)

    executor.score, engine.readjust = watched_score, watched_readjust
    list(engine.rounds(engine.start()))
    assert len(gradients) == 3
    assert any((g < 0).any() for _, found in gradients for g in found.values())
    total = sum(weight for weight, _ in gradients)
    mean = {n: sum(w * found[n] for w, found in gradients) / total for n in seen["mask"]}
    kept = rewiring.keep_largest(
        seen["params"], seen["mask"], seen["frozen"], seen["budget"], Rig().dropped(seen["clock"])
    )
    expected = masks.grow_largest(kept, {n: g.abs() for n, g in mean.items()}, seen["budget"])
    assert all(torch.equal(expected[n], seen["after"][n]) for n in expected)
    apart = {n: sum(w * found[n].abs() for w, found in gradients) for n in kept}
    other = masks.grow_largest(kept, apart, seen["budget"])
    assert not all(torch.equal(other[n], expected[n]) for n in other)


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("site", ["server", "client"])
@pytest.mark.parametrize("base", ["feddst", "pffdst"])
def test_rewiring_under_another_method_leaves_frozen_weights(make_engine, base, name, site):
    """PFFDST freezes in round 4 of 8; contracts compare every frozen bit."""
    place = "client" if site == "client" else PARTS[name].__class__().site
    engine = make_engine(
        base,
        [f"readjust={name}"],
        federation__rounds=8,
        method__readjust__site=place,
        method__readjust__period=1,
    )
    reports = list(engine.rounds(engine.start()))
    assert sum(report.metrics["mask_changed"] > 0 for report in reports) >= 4
    if base == "pffdst":
        frozen = [report.state.frozen["fc1.weight"] for report in reports]
        assert frozen[-1].any()
        held = [report.state.params["fc1.weight"][frozen[-1]] for report in reports[4:]]
        assert all(torch.equal(held[0], value) for value in held)
