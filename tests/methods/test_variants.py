"""The released variants of FedDST and PFFDST: what their codes do, beside what their papers mean.

Each test names the example, invariant ('ref' or 'shipped' clause) or quirk of the method documents.
"""

import itertools
from pathlib import Path

import pytest
import torch

from fedsparse.core import masks, rng
from fedsparse.core.budget import Budget, Layer
from fedsparse.core.errors import RunError
from fedsparse.core.resolve import resolve
from fedsparse.core.state import Clock
from fedsparse.plugins.feddst import MaskedMean, Regrow
from fedsparse.plugins.pffdst import FreezeHalf, ServerReadjust

W = torch.tensor([[0.9, -0.1, 0, 0.4], [0, 0.3, -0.7, 0], [0.2, 0, 0, 0]])
G = torch.tensor([[0.05, 0.6, -0.9, 0.1], [0.8, 0.02, 0.95, -0.3], [0.01, 0.5, -0.2, 0.7]])
FEDDST = {"method__readjust__variant": "released", "method__aggregate__variant": "released"}
PFFDST = FEDDST | {"method__readjust__period": 4, "sparsity__allocation": "scaled"}


def budget(sparsity, shape=(3, 4), allocation="scaled"):
    return Budget((Layer("w", shape),), allocation, sparsity)


def nothing(mask):
    return {name: torch.zeros_like(m) for name, m in mask.items()}


def total(mask):
    return sum(masks.active(mask).values())


# FedDST


@pytest.mark.parametrize("allocation", ["scaled", "global"])
def test_feddst_example_10_2_ref_growth_erases_an_active_weight(allocation):
    """Flat positions 6, 2, 4 are picked; 6 was active: -0.7 is lost, and |M| = 5."""
    part, mask = Regrow(variant="released", ratio=0.5), {"w": W != 0}
    score = part.grow_score({"w": G})
    moved = part.readjust(
        {"w": W}, mask, nothing(mask), score, budget(0.5, allocation=allocation), Clock(1, 10)
    )
    assert torch.equal(moved.params["w"], torch.tensor([[0.9, 0, 0, 0.4], [0, 0, 0, 0], [0, 0, 0, 0]]))
    assert moved.mask["w"].int().tolist() == [[1, 0, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]]


def feddst_aggregate(sparsity, **fields):
    """Example 10.3: three clients with 70, 33 and 10 samples."""
    w1 = torch.tensor([[0.8, 0, 0, 0.5], [0, 0.2, -0.6, 0], [0, 0, 0.3, 0]])
    w2 = torch.tensor([[1, -0.2, 0, 0], [0, 0, -0.9, 0.1], [0, 0, 0, 0.4]])
    w3 = torch.tensor([[0.6, 0, 0.7, 0.3], [0, 0, -0.3, 0], [0.5, 0, 0, 0]])
    part, sums = MaskedMean(variant="released", **fields), {}
    for w, samples in ((w1, 70.0), (w2, 33.0), (w3, 10.0)):
        held = w != 0
        held[2, 3] |= samples == 10
        for name, value in part.contribute({"w": w}, {"w": held}, torch.tensor(samples), moved=True).items():
            sums[name] = sums.get(name, 0) + value
    full = {"w": torch.ones(3, 4, dtype=torch.bool)}
    return sums, part.aggregate(sums, {"w": torch.zeros(3, 4)}, full, nothing(full), budget(sparsity), {})


def test_feddst_example_10_3_ref_weights_by_batches():
    sums, union = feddst_aggregate(0.0, batch_size=32)
    assert sums["votes/w"].tolist() == [[12, 4, 2, 8], [0, 6, 12, 4], [2, 0, 6, 6]]
    assert sums["weight"] == 12  # ω = 6, 4, 2, biases with them
    expected = torch.tensor([[0.833333, -0.2, 0.7, 0.45], [0, 0.2, -0.65, 0.1], [0.5, 0, 0.3, 0.266667]])
    torch.testing.assert_close(union.params["w"], expected, atol=5e-7, rtol=0)  # six published digits
    assert int(union.mask["w"].sum()) == 10
    pruned = feddst_aggregate(0.5, batch_size=32)[1].mask["w"]
    assert pruned.int().tolist() == [[1, 0, 1, 1], [0, 0, 1, 0], [1, 0, 1, 0]]
    voted = feddst_aggregate(0.0, batch_size=32, min_votes=3)[1].mask["w"]
    assert voted.int().tolist() == [[1, 1, 0, 1], [0, 1, 1, 1], [0, 0, 1, 1]]
    by_samples = feddst_aggregate(0.5)[1].mask["w"]  # (2,3) instead of (2,2)
    assert by_samples.int().tolist() == [[1, 0, 1, 1], [0, 0, 1, 0], [1, 0, 0, 1]]


def test_feddst_example_10_6_the_cosine_is_a_gate_only():
    """α is constant, the decayed value says until when; rewiring comes after the last local epoch."""
    clocks = [Clock(t, 400, 10, 10) for t in range(400)]
    released, paper = (Regrow(variant=v, ratio=0.5, period=10) for v in ("released", "paper"))
    assert [c.round for c in clocks if released.due(c, budget(0.8))] == list(range(1, 200, 10))
    assert {released.fraction(c) for c in clocks} == {0.5}
    assert [paper.fraction(clocks[t]) for t in (1, 101, 199, 200)] == pytest.approx(
        [0.49997, 0.246074, 0.000031, 0],
        abs=1e-6,  # twice the gate's six published digits
    )
    gate = [0.5 * released.decayed(clocks[t]) for t in (1, 11, 101, 191, 199, 200)]
    assert gate == pytest.approx([0.249985, 0.248139, 0.123037, 0.001247, 0.000015, 0], abs=5e-7)
    assert not any(released.due(Clock(1, 400, epoch, 10), budget(0.8)) for epoch in range(10))
    endless = Regrow(variant="released", annealing="constant")
    assert endless.due(Clock(391, 400, 10, 10), budget(0.8))


def random_layer(seed, sparsity=0.8):
    generator = torch.Generator().manual_seed(seed)
    params = {"w": torch.randn(30, 40, generator=generator)}
    big = budget(sparsity, (30, 40))
    mask = masks.prune_smallest(params, {"w": torch.ones(30, 40, dtype=torch.bool)}, big)
    return masks.apply(params, mask), mask, {"w": torch.randn(30, 40, generator=generator)}, big


@pytest.mark.parametrize("seed", range(5))
def test_feddst_invariant_6_ref_counts(seed):
    """K(S + (1-S)α) ≤ |M| ≤ K(S): growth that hits active weights adds nothing and erases them."""
    params, mask, gradient, big = random_layer(seed)
    part = Regrow(variant="released", ratio=0.3)
    moved = part.readjust(params, mask, nothing(mask), part.grow_score(gradient), big, Clock(1, 10))
    sparser = big.at(0.8 + (1 - 0.8) * 0.3)
    kept = masks.prune_smallest(params, mask, sparser)["w"]
    erased = kept & (moved.params["w"] == 0)
    assert erased.any()
    assert int(moved.mask["w"].sum()) == big.total - int(erased.sum()) >= sparser.total
    assert (moved.mask["w"] | ~kept).all()
    assert torch.equal(moved.params["w"][kept & ~erased], params["w"][kept & ~erased])
    picked = erased | (moved.mask["w"] & ~kept)
    assert int(picked.sum()) == big.total - sparser.total
    assert gradient["w"][picked].abs().min() >= gradient["w"][~picked].abs().max()


def test_feddst_released_growth_neither_drops_nor_erases_frozen_weights():
    """In a swap with a freeze policy (the fork excludes them from growth)."""
    params, mask, gradient, big = random_layer(0)
    frozen = {"w": mask["w"] & (params["w"].abs() < params["w"][mask["w"]].abs().median())}
    gradient = {"w": torch.where(frozen["w"], 9.0, gradient["w"])}
    part = Regrow(variant="released", ratio=0.5)
    moved = part.readjust(params, mask, frozen, part.grow_score(gradient), big, Clock(1, 10))
    assert (moved.mask["w"] | ~frozen["w"]).all()
    assert torch.equal(moved.params["w"][frozen["w"]], params["w"][frozen["w"]])
    assert moved.mask["w"].sum() <= big.total


@pytest.mark.parametrize("allocation", ["scaled", "global"])
def test_feddst_released_readjustment_under_vmap_equals_the_loop(allocation):
    """Three clients with counts of their own; tensors are selected and copied, so equal to the bit."""
    layers = (Layer("a", (9, 14)), Layer("b", (6, 8)))
    big, part = Budget(layers, allocation, 0.6), Regrow(variant="released", ratio=0.5)
    torch.manual_seed(0)
    masked = {layer.name: torch.rand(3, *layer.shape) < 0.35 for layer in layers}
    params = {name: torch.randn(m.shape, dtype=torch.float64) * m for name, m in masked.items()}
    score = {name: torch.rand(m.shape) for name, m in masked.items()}
    frozen = {name: m[0] & m[1] & m[2] for name, m in masked.items()}

    def moved(params, mask, score):
        return tuple(part.readjust(params, mask, frozen, score, big, Clock(1, 10)))[:2]

    together = torch.func.vmap(moved)(params, masked, score)
    for client in range(3):
        alone = moved(*({name: t[client] for name, t in group.items()} for group in (params, masked, score)))
        for both in zip(together, alone, strict=True):
            assert all(torch.equal(both[0][name][client], both[1][name]) for name in masked)


def tied(values, held, sparsity=0.5, frozen=None, **variant):
    """The server's pruning of a mean with these values, of one client that holds these weights."""
    part = MaskedMean(**variant)
    sums = part.contribute({"w": values}, {"w": held}, torch.tensor(4.0), moved=True)
    frozen = {"w": torch.zeros_like(held) if frozen is None else frozen}
    return part.aggregate(sums, {"w": values}, {"w": held}, frozen, budget(sparsity), {}).mask["w"]


def test_feddst_quirk_9_2_active_zeros_tie_with_masked_ones():
    """Seven are held, three of them 0; the budget is 6: the code keeps as many zeros as positions fall."""
    held = torch.tensor([[1, 0, 1, 1], [0, 1, 1, 0], [1, 0, 0, 1]], dtype=torch.bool)
    values = torch.tensor([[0.9, 0, 0.4, 0.3], [0, 0, -0.7, 0], [0, 0, 0, 0]])
    # the two zeros that the code counts as kept are the first ones, flat 1 and 4: masked both
    assert tied(values, held, variant="released").int().tolist() == [[1, 0, 1, 1], [0, 0, 1, 0], [0] * 4]
    assert tied(values, held, variant="paper").sum() == 6
    # a union within the target is not pruned at all; its zeros stay
    assert torch.equal(tied(values, held, sparsity=0.4, variant="released"), held)
    # frozen weights rank as infinite, even at 0
    frozen = torch.zeros(3, 4, dtype=torch.bool)
    frozen[2, 3] = True
    assert tied(values, held, frozen=frozen, variant="released")[2, 3]


def test_feddst_quirk_9_2_zeros_tie_on_the_client_too():
    """Two of six active weights are 0, behind masked zeros: both go, and growth fills their places."""
    mask = {"w": torch.tensor([[1, 0, 1, 1], [0, 0, 1, 0], [1, 0, 0, 1]], dtype=torch.bool)}
    values = {"w": torch.tensor([[0.9, 0, 0.4, 0.3], [0, 0, -0.7, 0], [0, 0, 0, 0]])}
    score = {"w": torch.tensor([[0, 0.1, 0, 0], [0.3, 0, 0.2, 0], [0, 0, 0, 0]])}
    for variant, expected in (
        ("released", [[1, 0, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]]),  # picks 4 and 6; 6 was active
        ("paper", [[1, 0, 1, 1], [0, 0, 1, 0], [1, 0, 0, 1]]),
    ):
        part = Regrow(variant=variant, ratio=0.0)
        moved = part.readjust(values, mask, nothing(mask), score, budget(0.5), Clock(1, 10))
        assert moved.mask["w"].int().tolist() == expected


def test_feddst_released_pruning_keeps_all_frozen_weights_and_equal_scores_go_by_position():
    frozen, full = {"w": torch.zeros(3, 4, dtype=torch.bool)}, {"w": torch.ones(3, 4, dtype=torch.bool)}
    frozen["w"][1:, 3] = True
    assert budget(0.95).total == 1  # less than is frozen
    kept = masks.prune_smallest_tied({"w": torch.rand(3, 4) + 1}, full, budget(0.95), frozen)
    assert torch.equal(kept["w"], frozen["w"])
    equal = torch.tensor([0.5, 0.7] * 50)  # long enough for an unstable sort to show
    assert masks.rank(equal).tolist() == [i // 2 + (0 if i % 2 else 50) for i in range(100)]


def test_no_layer_stays_above_its_budget_where_the_code_skips_the_pruning():
    """One layer has leaked, the union of the other is too large: the sum is within the target."""
    two = Budget((Layer("a", (3, 4)), Layer("b", (3, 4))), "scaled", 0.5)
    union = {"a": torch.zeros(3, 4, dtype=torch.bool), "b": torch.ones(3, 4, dtype=torch.bool)}
    union["b"][0] = False
    part, values = MaskedMean(variant="released"), {"a": torch.zeros(3, 4), "b": torch.rand(3, 4)}
    values["b"] *= union["b"]
    sums = part.contribute(values, union, torch.tensor(1.0), moved=True)
    made = part.aggregate(sums, values, union, nothing(union), two, {})
    assert masks.active(made.mask) == {"a": 0, "b": 6}


def test_the_code_counts_scales_of_normalisation_as_active_weights():
    """PFFDST document 3.6: so it prunes in every round, also a union that is exactly at the target."""
    held = torch.tensor([1, 0, 1, 1, 0, 1, 1, 0, 1, 0, 0, 0], dtype=torch.bool).view(3, 4)
    union = {"w": held}
    part = MaskedMean(variant="released")
    assert not part.too_dense({"w": W}, union, budget(0.5))
    assert part.too_dense({"w": W, "norm.weight": torch.ones(3)}, union, budget(0.5))
    assert not part.too_dense({"w": W, "norm.bias": torch.ones(3)}, union, budget(0.5))


def test_feddst_invariants_5_12_ref_and_quirk_9_2_density_leaks(make_engine):
    """Below the target in the released variant, at it in the paper's; never above it in either."""
    densities = {}
    for variant in ("released", "paper"):
        engine = make_engine(
            "feddst",
            federation__rounds=12,
            method__readjust__ratio=0.5,
            method__readjust__period=3,
            method__readjust__variant=variant,
            method__aggregate__variant=variant,
            method__aggregate__batch_size=16,
            sparsity__allocation="scaled",
        )
        allowed = engine.budget(engine.clock(0))
        states = [report.state for report in engine.rounds(engine.start())]
        densities[variant] = [total(state.mask) for state in states]
        for state in states:
            assert all(count <= allowed.counts[name] for name, count in masks.active(state.mask).items())
        for before, after in itertools.pairwise(states):
            if (after.round - 2) % 3:  # between readjustments only exact zeros can go
                gone = {n: before.mask[n] & ~after.mask[n] for n in before.mask}
                assert variant == "released" or not any(g.any() for g in gone.values())
                assert not any((after.mask[n] & ~before.mask[n]).any() for n in gone)
    assert densities["paper"] == [allowed.total] * 12
    assert densities["released"][0] == allowed.total
    assert densities["released"][-1] < 0.95 * allowed.total


@pytest.mark.parametrize("variant", ["released", "paper"])
def test_feddst_quirk_9_1_growth_is_nullified_by_the_server(make_engine, watch, variant):
    """Of the positions that any client grew, the released variant's server keeps next to none.

    On data where layers have about as many nonzero weights as their budget: else zeros stay in a network as
    small as this one (1 to 21 % of what grew over ten data sets; of the paper's variant 36 to 50 %).
    """
    engine = make_engine(
        "feddst",
        method__readjust__ratio=0.3,
        method__readjust__variant=variant,
        method__aggregate__variant=variant,
        sparsity__allocation="scaled",
        federation__local_epochs=3,
        federation__rounds=20,
        task__dataset__seed=2,
    )
    watched, state = watch(engine), engine.start()
    reports = engine.rounds(state)
    before, after = next(reports).state.mask, next(reports).state.mask
    uploaded = [client for round_, client in watched.uploads if round_ == 1]
    grown = {n: torch.stack([c.mask[n] for c in uploaded]).any(0) & ~before[n] for n in before}
    survived = total({n: grown[n] & after[n] for n in grown})
    trained = [c.params[n][c.mask[n] & ~before[n]].any() for c in uploaded for n in before]
    assert any(trained) == (variant == "paper")  # in the released one all arrive as zeros
    assert total(grown) > 50
    assert survived <= 0.05 * total(grown) if variant == "released" else survived >= 0.25 * total(grown)


def test_feddst_quirk_9_9_the_readme_s_fedavg_is_rewired(make_engine):
    """`--sparsity 0.0` without α = 0: the code prunes and grows a dense network, never to restore it."""
    ends = []
    for variant in ("released", "paper"):
        changes = dict.fromkeys(FEDDST, variant)
        engine = make_engine(
            "feddst",
            sparsity__target=0.0,
            federation__rounds=6,
            method__readjust__ratio=0.5,
            sparsity__allocation="scaled",
            **changes,
        )
        ends.append(list(engine.rounds(engine.start()))[-1].metrics["sparsity"])
    assert ends[0] > 0.02
    assert ends[1] == 0


# PFFDST


def nominal(s, rounds, part):
    policy, found = FreezeHalf(), []
    for t in range(rounds):
        base = policy.base_sparsity(s, Clock(t, rounds))
        found.append(1 - part.target_sparsity(base, s, Clock(t, rounds)))
    return found


def test_pffdst_example_10_7_shipped_densities():
    """`--sparsity 0.95`, which is s1: the target is 0.9; 800 rounds."""
    found = nominal(0.9, 800, ServerReadjust(variant="released"))
    assert found == pytest.approx([0.075] * 200 + [0.05] * 200 + [0.125] * 400)
    communicated = [density - 0.05 for density in found[400:]]
    assert communicated == pytest.approx([0.075] * 400)


def test_pffdst_example_10_8_and_invariant_13_shipped_final_density():
    """2.5·(1-s1): 0.025 of `--sparsity 0.99`, 0.05 of 0.98, 0.125 of 0.95."""
    for s1, density in ((0.99, 0.025), (0.98, 0.05), (0.95, 0.125)):
        assert nominal(2 * s1 - 1, 800, ServerReadjust(variant="released"))[-1] == pytest.approx(density)


@pytest.mark.parametrize(
    ("rounds", "swaps", "closings"),
    [
        (800, list(range(10, 200, 10)), [200]),
        (350, list(range(10, 87, 10)), []),  # T_A = 87 is no multiple of 10: the round's pruning closes
    ],
)
def test_pffdst_invariant_15_shipped_schedule(rounds, swaps, closings):
    part = ServerReadjust(variant="released")
    due = [Clock(t, rounds) for t in range(rounds) if part.due(Clock(t, rounds))]
    assert [c.round for c in due if not part.closing(c)] == swaps
    assert [c.round for c in due if part.closing(c)] == closings


def test_pffdst_shipped_closing_drops_q_weights_and_grows_none():
    """f = 0.2 of 12 weights: q = 2, whatever the budget."""
    part, mask = ServerReadjust(variant="released", period=1), {"w": W != 0}
    clock = Clock(20, 80)
    assert part.closing(clock)
    moved = part.readjust({"w": W}, mask, nothing(mask), 0.2, budget(0.9), clock, rng.key(0), {})
    assert moved.mask["w"].int().tolist() == [[1, 0, 0, 1], [0, 1, 1, 0], [0, 0, 0, 0]]
    assert torch.equal(moved.params["w"], torch.where(moved.mask["w"], W, 0.0))


@pytest.fixture(scope="module")
def runs(make_engine):
    """By variant: densities after each round, of one seed. T_A = 10 (paper) or 20, T_F = 40."""
    found = {}
    for variant in ("released", "paper"):
        changes = PFFDST | dict.fromkeys(FEDDST, variant)
        engine = make_engine("pffdst", federation__rounds=80, sparsity__target=0.9, **changes)
        found[variant] = engine, list(engine.rounds(engine.start()))
    return found


def test_pffdst_invariants_4_13_ref_counts_of_a_run(runs):
    """|M_l| ≤ K_l of the nominal target after every round; to the unit in the paper's variant."""
    for variant, (engine, reports) in runs.items():
        for report in reports:
            allowed = engine.budget(engine.clock(report.metrics["round"])).counts
            counts = masks.active(report.state.mask)
            assert all(counts[name] <= allowed[name] for name in counts)
            # uniform growth at T_F leaves layers a few weights off the budget until the window closes
            in_window = 40 <= report.metrics["round"] < 50
            assert variant == "released" or in_window or counts == dict(allowed)
    engine = runs["released"][0]
    assert engine.budget(engine.clock(79)).sparsity == pytest.approx(1 - 2.5 * 0.05)


def test_pffdst_quirk_9_5_zeros_leak_through_the_round_s_pruning(runs):
    """Grown weights that are still 0 after a round are switched off, in the released variant alone."""
    engine, reports = runs["released"]
    short = [
        engine.budget(engine.clock(r.metrics["round"])).total - total(r.state.mask) for r in reports[5:20]
    ]
    assert min(short) > 5
    assert total(reports[-1].state.mask) < engine.budget(engine.clock(79)).total - 5


def test_pffdst_shipped_half_b_rewires_nothing(runs):
    _, reports = runs["released"]
    for before, after in itertools.pairwise(reports[40:]):
        grown = {n: after.state.mask[n] & ~m for n, m in before.state.mask.items()}
        assert total(grown) == 0


def best_so_far(make_engine, **changes):
    """Reports of a released run with its freezing source, evaluated every other round; T_F = 8 of 16."""
    changes |= {"federation__rounds": 16, "output__evaluate_every": 2, "sparsity__target": 0.9}
    engine = make_engine("pffdst", **PFFDST, method__freeze_policy__variant="released", **changes)
    return engine, list(engine.rounds(engine.start()))


@pytest.mark.parametrize("seed", [0, 1])
def test_pffdst_quirk_9_4_freezes_the_network_of_best_test_accuracy(make_engine, monkeypatch, seed):
    """Document 3.4: the whole state goes back to it, and all of its mask is frozen."""
    accuracies = iter([0.2, 0.6, 0.6, 0.3, *[0.9] * 4])  # rounds 1, 3, 5, 7 and on: the best is round 3
    measured = {"test_accuracy": 0.0, "test_loss": 0.0}
    monkeypatch.setattr(
        "fedsparse.core.engine.evaluate", lambda *_: measured | {"client_accuracy": next(accuracies)}
    )
    engine, reports = best_so_far(make_engine, seed=seed, task__model__hidden=[30, 20])
    source, frozen = reports[3].state, reports[8].state.frozen
    assert all(torch.equal(frozen[name], m) for name, m in source.mask.items())
    for report in reports[8:]:
        for name, still in frozen.items():
            assert torch.equal(report.state.params[name][still], source.params[name][still])
    # rounds 0 to 3 lie in the first window: denser than half A, and so is what is frozen
    assert total(source.mask) > engine.budget(engine.clock(8)).at(0.95).total


def test_pffdst_going_back_needs_an_evaluation(make_engine):
    engine = make_engine(
        "pffdst",
        federation__rounds=8,
        output__evaluate_every=5,
        method__freeze_policy__variant="released",
    )
    with pytest.raises(RunError, match=r"round 4.*output\.evaluate_every"):
        list(engine.rounds(engine.start()))


def test_pffdst_paper_freezes_the_current_network(make_engine):
    engine = make_engine("pffdst", federation__rounds=8, output__evaluate_every=1)
    reports = list(engine.rounds(engine.start()))
    last, frozen = reports[3].state, reports[4].state.frozen
    assert not any((frozen[name] & ~m).any() for name, m in last.mask.items())
    for name, still in frozen.items():
        assert torch.equal(reports[4].state.params[name][still], last.params[name][still])


# presets


def test_ablation_without_freezing_has_the_code_s_densities():
    """Document 3.9: f = (1-S)/2, window of swaps 10, 20, … R/4, then a fixed mask; no freezing."""
    made = resolve("pffdst", ["pffdst-without-freezing"], sets=["sparsity.target=0.9"])
    part, rounds = made.config.method.readjust, made.config.federation.rounds
    assert (rounds, made.config.federation.local_epochs) == (400, 3)
    found = [1 - part.target_sparsity(0.9, 0.9, Clock(t, rounds)) for t in range(rounds)]
    assert found == pytest.approx([0.15] * 100 + [0.1] * 300)
    assert [t for t in range(rounds) if part.due(Clock(t, rounds))] == list(range(10, 101, 10))
    assert made.swaps == {"freeze_policy": "fedavg:NoFreezing"}


def test_ablation_without_server_readjustment_has_two_cosine_cycles():
    """Document 3.9: t in [0, R/4) and [R/2, 3R/4), t ≡ t₀+1 mod 15, density 2·(1-s1) after freezing."""
    made = resolve("pffdst", ["pffdst-without-server-readjustment"], sets=["sparsity.target=0.9"])
    part, rounds = made.config.method.readjust, made.config.federation.rounds
    assert (rounds, made.config.federation.local_epochs) == (800, 3)
    due = [t for t in range(rounds) if part.due(Clock(t, rounds, 2, 3), budget(0.9))]
    assert due == [*range(1, 200, 15), *range(401, 600, 15)]
    for t in due:
        cosine = 0.005 * (1 + torch.cos(torch.tensor(torch.pi * (t % 400) / 200, dtype=torch.float64)))
        assert part.fraction(Clock(t, rounds)) == pytest.approx(float(cosine))
    policy = made.config.method.freeze_policy
    base = [policy.base_sparsity(0.9, Clock(t, rounds)) for t in (0, 399, 400, 799)]
    assert base == pytest.approx([0.95, 0.95, 0.9, 0.9])


def test_a_run_without_server_readjustment_ends_at_the_target(make_engine):
    engine = make_engine(
        "pffdst",
        ["readjust=feddst"],
        federation__rounds=16,
        method__readjust__starts=[0.0, 0.5],
        method__readjust__end=0.25,
        method__readjust__period=2,
        method__readjust__ratio=0.3,
    )
    reports = list(engine.rounds(engine.start()))
    moved = [r.metrics["round"] for r in reports if r.metrics["mask_changed"]]
    assert moved == [1, 3, 8, 9, 11]  # the freezing of round 8 grows
    end = reports[-1].state
    assert total(end.mask) == engine.budget(engine.clock(15)).total
    assert 0.4 < reports[-1].metrics["frozen_fraction"] < 0.6


PAPERS = Path(__file__).parents[2] / "configs" / "papers"
RESNETS = ("pffdst-resnet18-s098", "pffdst-resnet18-s099")
OURS = sorted(
    str(path.relative_to(PAPERS).with_suffix(""))
    for path in [
        *PAPERS.glob("*.toml"),
        *(p for name in RESNETS for p in (PAPERS / name).glob("*dst-*.toml")),
    ]
    if path.stem.startswith(("feddst", "pffdst"))
)


@pytest.mark.parametrize("preset", OURS)
def test_presets_of_the_papers_tables(preset):
    """Valid with the method that they name; the header says what is not published."""
    made = resolve(None, [f"papers/{preset}"])
    header = (PAPERS / f"{preset}.toml").read_text(encoding="utf-8").partition("[method]")[0]
    assert "Not published" in " ".join(header.replace("#", "").split())
    assert made.config.sparsity.allocation == "scaled"
    batch = getattr(made.config.method.aggregate, "batch_size", None)
    assert batch in (None, made.config.federation.batch_size)
    if preset.startswith(RESNETS):
        table, row = preset.split("/")
        method, *_, rounds = row.split("-")
        federation = made.config.federation
        assert made.config.method.plugin == method
        assert (federation.rounds, federation.local_epochs) == (int(rounds), 3 if method == "feddst" else 2)
        assert federation.rounds in ((200, 400, 600, 800) if method == "feddst" else (350, 700, 1050, 1400))
        assert made.config.sparsity.target == float(f"0.{table[-2:]}")
