"""PFFDST against its method document: each test names the invariant (section 8) or example (10) it checks."""

import pytest
import torch

from fedsparse import Frozen, Part, hookimpl
from fedsparse.core import masks, optim, rng
from fedsparse.core.budget import Budget, Layer
from fedsparse.core.schedule import share
from fedsparse.core.state import Clock
from fedsparse.plugins.feddst import MaskedMean
from fedsparse.plugins.pffdst import CodeCost, FreezeHalf, ServerReadjust

LAYER = Layer("w", (3, 4))
W = torch.tensor([[0.9, -0.1, 0, 0.4], [0, 0.3, -0.7, 0], [0.2, 0, 0, 0]])


def at(*positions):
    mask = torch.zeros(12, dtype=torch.bool)
    mask[list(positions)] = True
    return mask.view(3, 4)


def none():
    return {"w": at()}


def budget(sparsity):
    return Budget((LAYER,), "scaled", sparsity)


def example_readjust(params, mask, frozen, key=0):
    """f = 0.2 = ratio·(1-s)/2 at s = 0.2, ratio 0.5: two weights of twelve are swapped."""
    part = ServerReadjust(ratio=0.5, period=1)
    assert part.differential(0.2) == pytest.approx(0.2)
    clock = Clock(1, 80)
    assert part.due(clock)
    assert not part.closing(clock)
    return part.readjust(params, mask, frozen, 0.2, budget(0.5), clock, rng.key(key), {})


def test_example_10_1_drop_and_add():
    before = W != 0
    kept = masks.drop_smallest({"w": W}, {"w": before}, none(), {"w": 2})["w"]
    assert torch.equal(kept, at(0, 3, 5, 6))
    redrawn = 0
    for key in range(40):
        moved = example_readjust({"w": W}, {"w": before}, none(), key)
        assert int(moved.mask["w"].sum()) == 6
        assert torch.equal(moved.params["w"], W * at(0, 3, 5, 6))
        redrawn += bool(moved.mask["w"][2, 0])  # position 8: dropped, redrawn, its 0.2 is lost
    assert 0 < redrawn < 40


def test_example_10_2_freeze():
    """|F| = 4, g = int(12·0.5333) = 6 of the 8 free positions."""
    closed, s = at(0, 3, 5, 6), 1 / 3  # 1 - s1 = 1/3, so s = 1/3
    part, values = FreezeHalf(), {"w": W * closed}
    decided = part.freeze(values, {"w": closed}, s, budget(s - 0.2), Clock(5, 10), rng.key(0), {}, None)
    assert torch.equal(decided.frozen["w"], closed)
    assert int(decided.mask["w"].sum()) == 10
    assert not (closed & ~decided.mask["w"]).any()


def test_example_10_3_local_steps_in_half_b():
    params, state = {"w": torch.tensor([0.9, 0, 0, 0.4])}, {"momentum": {"w": torch.zeros(4)}}
    free = {"w": torch.tensor([False, True, False, False])}
    grads = {"w": torch.tensor([1, 0.5, 2, -3.0])}
    params, state = optim.sgd(params, grads, state, free, 0.1, 0.9, 0.001)
    torch.testing.assert_close(params["w"], torch.tensor([0.9, -0.05, 0, 0.4]))
    params, state = optim.sgd(params, grads, state, free, 0.1, 0.9, 0.001)
    torch.testing.assert_close(params["w"], torch.tensor([0.9, -0.144995, 0, 0.4]))
    torch.testing.assert_close(state["momentum"]["w"], torch.tensor([1.90171, 0.94995, 3.8, -5.69924]))
    assert torch.equal(params["w"][[0, 3]], torch.tensor([0.9, 0.4]))


FROZEN = {"w": at(0, 3, 5, 6)}
PHI = W * FROZEN["w"]
MASK = {"w": at(0, 3, 5, 6, 1, 2, 4, 8, 9, 11)}


def example_uploads():
    places = [1, 2, 4, 8, 9, 11]
    first, second = PHI.flatten().clone(), PHI.flatten().clone()
    first[places] = torch.tensor([0.12, -0.05, 0.30, 0.02, -0.21, 0.08])
    second[places] = torch.tensor([0.04, 0.15, 0.20, -0.06, -0.11, 0.08])
    return [(first.view(3, 4), 3.0), (second.view(3, 4), 1.0)]


def example_aggregate(sparsity, scale=1.0):
    part, sums = MaskedMean(), {}
    for w, weight in example_uploads():
        w = torch.where(FROZEN["w"], w * scale, w)
        for name, value in part.contribute({"w": w}, MASK, torch.tensor(weight), moved=True).items():
            sums[name] = sums.get(name, 0) + value
    return part.aggregate(sums, {"w": PHI}, MASK, FROZEN, budget(sparsity), {})


def test_example_10_4_aggregate_and_protected_prune():
    mean = example_aggregate(0.0).params["w"]
    expected = torch.tensor([[0.9, 0.1, 0, 0.4], [0.275, 0.3, -0.7, 0], [0, -0.185, 0, 0.08]])
    torch.testing.assert_close(mean, expected, atol=1e-7, rtol=1e-6)  # float32 means of decimal numbers
    assert example_aggregate(1 / 3).mask["w"].int().tolist() == [[1, 1, 0, 1], [1, 1, 1, 0], [0, 1, 0, 1]]
    tiny = example_aggregate(7 / 12, scale=1e-6)  # K = 5; frozen weights smaller than every trainable one
    assert tiny.mask["w"].int().tolist() == [[1, 0, 0, 1], [1, 1, 1, 0], [0, 0, 0, 0]]


def test_example_10_5_drop_in_half_b():
    mean = example_aggregate(0.0).params["w"].clone()
    mean[0, 2], mean[2, 0] = 0, 0
    kept = masks.drop_smallest({"w": mean}, MASK, FROZEN, {"w": 2})["w"]
    assert kept.int().tolist() == [[1, 1, 0, 1], [1, 1, 1, 0], [0, 1, 0, 1]]


def test_example_10_6_bits_of_the_code():
    from fedsparse.core.ledger import Traffic

    traffic = Traffic(
        round=9,
        weights=12,
        active=10,
        active_upload=10,
        frozen=4,
        unmasked=0,
        biases=0,
        mask_changed=True,
        client_readjusted=False,
        first_contact=False,
    )
    assert CodeCost().paper_bytes(traffic) * 8 == 192 + 6 + 192  # download with mask, upload
    assert CodeCost().paper_bytes(traffic._replace(mask_changed=False)) * 8 == 2 * 192
    own = traffic._replace(mask_changed=False, client_readjusted=True)  # 5.1: + N
    assert CodeCost().paper_bytes(own) * 8 == 2 * 192 + 12


def nominal(s, rounds):
    """The sparsity of each round's budget."""
    policy, part = FreezeHalf(), ServerReadjust()
    found = []
    for t in range(rounds):
        base = policy.base_sparsity(s, Clock(t, rounds))
        found.append(part.target_sparsity(base, s, Clock(t, rounds)))
    return found


def test_invariant_13_example_10_7_nominal_densities():
    densities = [1 - sparsity for sparsity in nominal(0.9, 800)]
    assert densities[:100] == pytest.approx([0.075] * 100)
    assert densities[100:400] == pytest.approx([0.05] * 300)
    assert densities[400:500] == pytest.approx([0.125] * 100)
    assert densities[500:] == pytest.approx([0.10] * 300)


def test_example_10_8_final_density():
    assert 1 - nominal(0.98, 800)[-1] == pytest.approx(0.02)


@pytest.mark.parametrize("s", [0.8, 0.95, 0.98])
def test_invariant_14_traffic_and_training_density(s):
    rounds = 800
    densities = [1 - sparsity for sparsity in nominal(s, rounds)]
    frozen = [(1 - s) / 2 if t >= rounds // 2 else 0 for t in range(rounds)]
    traffic = sum(d - f for d, f in zip(densities, frozen, strict=True))
    assert traffic == pytest.approx(0.5625 * (1 - s) * rounds)
    assert sum(densities) == pytest.approx(0.8125 * (1 - s) * rounds)


@pytest.mark.parametrize(
    ("rounds", "swaps", "closings", "freezes"),
    [
        (800, [*range(10, 100, 10), *range(410, 500, 10)], [100, 500], 400),
        (350, [10, 20, 30, 40, 180, 190, 200, 210], [43, 218], 175),
    ],
)
def test_invariant_15_schedule(rounds, swaps, closings, freezes):
    part, policy = ServerReadjust(), FreezeHalf()
    clocks = [Clock(t, rounds) for t in range(rounds)]
    assert [c.round for c in clocks if part.due(c) and not part.closing(c)] == swaps
    assert [c.round for c in clocks if part.due(c) and part.closing(c)] == closings
    ends = [c.round for c in clocks if policy.base_sparsity(0.9, c) == 0.9]
    assert ends[0] == freezes


ROUNDS = 80  # T_A = 10, T_F = 40, T_B = 50; with period 4 the windows swap at 4, 8 and 44, 48
S = 0.8


@pytest.fixture(scope="module")
def played(make_engine, watch):
    """One run, its state before and after each round, and what its clients did."""
    made = make_engine(
        "pffdst",
        federation__rounds=ROUNDS,
        method__readjust__period=4,
        sparsity__allocation="scaled",
        sparsity__target=S,
    )
    watched, state = watch(made), made.start()
    states = [state.copy()]
    starts, train = [], made.executor.train

    def watched_train(plan, clients):
        starts.append(plan.state.copy())  # after freezing and readjusting, before training
        return train(plan, clients)

    made.executor.train = watched_train
    reports = []
    for report in made.rounds(state):
        states.append(report.state.copy())
        reports.append(report)
    return made, states, starts, watched, reports


def counts(state):
    return masks.active(state.mask)


def k(made, sparsity):
    return dict(Budget(made.task.layers, "scaled", sparsity).counts)


def test_invariant_1_init(played):
    made, states, *_ = played
    assert counts(states[0]) == k(made, 0.9 - 0.05)


def test_invariants_2_3_readjust_rounds(played):
    made, states, starts, *_ = played
    for t in (4, 8, 44, 48):
        before, after = states[t], starts[t]
        assert counts(before) == counts(after)
        for layer in made.task.layers:
            q, old, new = share(layer.weights, 0.05), before.mask[layer.name], after.mask[layer.name]
            assert int((old != new).sum()) <= 2 * q
            values, now, frozen = (d[layer.name] for d in (before.params, after.params, before.frozen))
            movable = (old & ~frozen).flatten().nonzero().flatten()
            order = movable[values.flatten()[movable].abs().argsort(stable=True)]
            dropped = order[:q]  # the smallest trainable ones, exactly min(q, count) of them
            expected = values.flatten().clone()
            expected[dropped] = 0
            assert torch.equal(now.flatten(), expected)
            grown = new & ~old
            assert not now[grown].any()
            assert (new | ~frozen).all()


def test_invariant_4_closing_rounds_reach_the_nominal_budget(played):
    made, states, starts, *_ = played
    assert counts(starts[10]) == k(made, 0.9)
    assert counts(starts[50]) == k(made, 0.8)
    assert counts(states[-1]) == k(made, 0.8)
    for t in (10, 50):
        for name, old in states[t].mask.items():
            kept, values = starts[t].mask[name], states[t].params[name].abs()
            removed, free = old & ~kept, kept & ~states[t].frozen[name]
            assert (kept & ~old).sum() == 0
            assert not removed.any() or values[removed].max() <= values[free].min()


def test_invariant_5_masks_rest_between_readjustments(played):
    _, states, starts, watched, _ = played
    for t in range(ROUNDS):
        if t not in (4, 8, 10, 40, 44, 48, 50):
            assert all(torch.equal(states[t].mask[n], starts[t].mask[n]) for n in states[t].mask)
        if t != 40:  # pruning reconciles the uniform growth with the budget once
            assert all(torch.equal(starts[t].mask[n], states[t + 1].mask[n]) for n in states[t].mask)
    for t, client in watched.uploads:
        assert all(client.mask[name] is starts[t].mask[name] for name in client.mask)


def test_invariant_6_freezing(played):
    made, states, starts, *_ = played
    before, after = states[40], starts[40]
    grown = {layer.name: share(layer.weights, 0.15) for layer in made.task.layers}
    for name, mask in before.mask.items():
        assert torch.equal(after.frozen[name], mask)
        assert int(after.mask[name].sum()) == int(mask.sum()) + grown[name]
        assert (after.mask[name] | ~mask).all()
        assert not after.params[name][after.mask[name] & ~mask].any()
    assert not any(f.any() for f in states[40].frozen.values())


def test_invariant_7_frozen_values_keep_their_bits(played):
    _, states, starts, watched, _ = played
    frozen, phi = starts[40].frozen, starts[40].params
    later = [params for t, params, _ in watched.steps if t >= 40]
    assert len(later) > 100
    for params in [*later, *(state.params for state in states[41:])]:
        assert all(torch.equal(params[n][frozen[n]], phi[n][frozen[n]]) for n in frozen)


def test_invariant_9_frozen_weights_take_part_in_the_forward_pass(played):
    made, states, *_ = played
    from torch.func import functional_call

    end, batch = states[-1], made.task.sample(8)
    without = {n: torch.where(end.frozen.get(n, torch.tensor(False)), 0, p) for n, p in end.params.items()}
    logits = [functional_call(made.task.model, p, (batch.inputs,)) for p in (end.params, without)]
    assert not torch.equal(*logits)


def test_invariant_10_biases_move_in_half_b(played):
    _, states, starts, *_ = played
    for name in ("fc1.bias", "fc3.bias"):
        assert not torch.equal(states[-1].params[name], starts[40].params[name])


@pytest.mark.parametrize("freeze_scales", [True, False])
def test_invariant_10_scales_of_batch_norm(make_engine, freeze_scales):
    """γ is frozen by default, β and the running statistics are not."""
    engine = make_engine(
        "pffdst",
        task__dataset__height=8,
        task__dataset__width=8,
        task__dataset__channels=3,
        task__model="resnet18",
        task__model__use=None,
        task__model__hidden=None,
        federation__rounds=4,
        federation__clients_per_round=1,
        federation__local_epochs=1,
        method__freeze_policy__freeze_scales=freeze_scales,
    )
    reports = engine.rounds(engine.start())
    next(reports)
    half = next(reports).state
    end = list(reports)[-1].state
    scales = [n for n in engine.params if n.endswith("weight") and n not in end.mask]
    shifts = [n.removesuffix("weight") + "bias" for n in scales]
    assert len(scales) == 20
    assert all(torch.equal(half.params[n], end.params[n]) for n in scales) == freeze_scales
    assert not any(torch.equal(half.params[n], end.params[n]) for n in shifts)
    assert not any(torch.equal(half.buffers[n], end.buffers[n]) for n in half.buffers if "running" in n)


class FreezeAll(Part):
    """Freezes the network of round 2 and grows nothing."""

    @hookimpl
    def freeze(self, mask, clock, memory):
        return Frozen(mask, mask, memory) if clock.round == 2 else None


def test_invariant_11_without_growth_half_b_trains_only_unmasked_parameters(make_resolved):
    from dataclasses import replace

    from fedsparse.core import task
    from fedsparse.core.engine import Engine

    made = make_resolved("pffdst", method__readjust__ratio=0.0, federation__rounds=6)
    made = replace(made, method=made.method.with_parts(freeze_policy=FreezeAll()))
    engine = Engine(made, task.build(made.config))
    states = [report.state for report in engine.rounds(engine.start())]
    for name in engine.params:
        assert torch.equal(states[1].params[name], states[-1].params[name]) == (name in engine.prunable)


def test_invariant_12_without_freezing_and_window_it_is_a_fixed_mask(make_engine):
    """Equals FedDST with α = 0."""
    still = make_engine("pffdst", ["freeze_policy=fedavg"], federation__rounds=8, method__readjust__ratio=0.0)
    feddst = make_engine("feddst", federation__rounds=8, method__readjust__ratio=0.0)
    ends = [list(engine.rounds(engine.start()))[-1].state for engine in (still, feddst)]
    for name in ends[0].params:
        assert torch.equal(ends[0].params[name], ends[1].params[name])


def test_invariant_13_final_density(played):
    made, states, *_ = played
    total = sum(layer.weights for layer in made.task.layers)
    # the rule counts biases into a layer's size: their share of the budget is the slack
    biases = sum(layer.biases for layer in made.task.layers)
    density = sum(counts(states[-1]).values()) / total
    assert 0 <= density - (1 - S) <= (1 - S) * biases / total + 1e-9


def test_invariant_17_growth_follows_the_key():
    mask = {"w": torch.eye(30, 40, dtype=torch.bool)}
    big = Budget((Layer("w", (30, 40)),), "scaled", 0.55)
    grown = [
        FreezeHalf().freeze({}, mask, 0.6, big, Clock(5, 10), rng.key(seed, "freeze"), {}, None).mask["w"]
        for seed in (0, 0, 1)
    ]
    assert torch.equal(grown[0], grown[1])
    assert not torch.equal(grown[0], grown[2])


def test_invariant_17_same_seed_same_growth(make_engine):
    ends = []
    for _ in range(2):
        engine = make_engine("pffdst", federation__rounds=16, method__readjust__period=1)
        ends.append(list(engine.rounds(engine.start()))[-1].state)
    assert all(torch.equal(ends[0].mask[n], ends[1].mask[n]) for n in ends[0].mask)
    assert all(torch.equal(ends[0].params[n], ends[1].params[n]) for n in ends[0].params)


def test_invariant_17_the_seed_of_the_growth_reproduces_the_mask(played):
    """A server that sends dropped positions and 8 bytes of key sends the mask."""
    made, states, starts, *_ = played
    kept = masks.drop_smallest(
        states[4].params,
        states[4].mask,
        states[4].frozen,
        {layer.name: share(layer.weights, 0.05) for layer in made.task.layers},
    )
    dropped = {n: counts(states[4])[n] - int(kept[n].sum()) for n in kept}
    again = masks.grow_random(kept, dropped, rng.key(made.config.seed, "readjust", 4))
    assert all(torch.equal(again[n], starts[4].mask[n]) for n in again)


def test_invariant_18_clients_keep_nothing(played):
    _, states, *_ = played
    assert not states[-1].rows


@pytest.mark.parametrize("allocation", ["uniform", "er", "erk", "global", "scaled-er"])
def test_final_sparsity_is_exact_under_every_allocation(make_engine, allocation):
    engine = make_engine("pffdst", federation__rounds=16, sparsity__allocation=allocation)
    end = list(engine.rounds(engine.start()))[-1].state
    assert sum(counts(end).values()) == Budget(engine.task.layers, allocation, S).total


def test_only_scales_of_normalisation_are_frozen_besides_the_mask(make_engine):
    engine = make_engine("pffdst", sparsity__prunable=["fc1.weight"], federation__rounds=8)
    end = list(engine.rounds(engine.start()))[-1].state
    assert list(end.frozen) == ["fc1.weight"]


@pytest.mark.parametrize("rounds", [2, 3, 4, 7, 9])
@pytest.mark.parametrize(
    "changes", [{}, {"sparsity__allocation": "global"}, {"method__readjust__ratio": 0.0}]
)
def test_short_runs_end_at_the_target(make_engine, rounds, changes):
    engine = make_engine("pffdst", federation__rounds=rounds, **changes)
    end = list(engine.rounds(engine.start()))[-1].state
    assert (
        sum(counts(end).values())
        == Budget(engine.task.layers, changes.get("sparsity__allocation", "erk"), S).total
    )


def test_freezing_early_freezes_no_earlier_than_round_1(make_engine):
    engine = make_engine("pffdst", federation__rounds=8, method__freeze_policy__at=0.01)
    reports = list(engine.rounds(engine.start()))
    assert [report.metrics["frozen_fraction"] > 0 for report in reports] == [False] + [True] * 7


def test_schedule_is_visible_in_the_metrics(played):
    *_, reports = played
    frozen = [report.metrics["frozen_fraction"] for report in reports]
    assert frozen[:40] == [0.0] * 40
    assert frozen[45] == pytest.approx(0.4, abs=0.01)  # floors and biases in the budgets of small layers
    assert frozen[-1] == pytest.approx(0.5, abs=0.01)
