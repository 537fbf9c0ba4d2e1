"""FLASH against appendix A, example 10.12 and quirks 9.15 and 9.16 of SparsyFed's method document."""

import math

import pytest
import torch

from fedsparse.core import masks, rng
from fedsparse.core.budget import Budget, Layer
from fedsparse.core.state import Clock
from fedsparse.plugins.flash import AdaptDensities, Consensus, agreed

SPARSYFED = ["mask_init=topk", "readjust=topk"]


def nothing(mask):
    return {name: torch.zeros_like(m) for name, m in mask.items()}


def aggregate(part, clients, budget, params=None, mask=None, memory=None, frozen=None):
    """Consensus of (params, mask, weight) clients."""
    sums = {}
    for values, held, weight in clients:
        for name, value in part.contribute(values, held, torch.tensor(weight)).items():
            sums[name] = sums.get(name, 0) + value
    params = clients[0][0] if params is None else params
    mask = {n: torch.ones_like(m) for n, m in clients[0][1].items()} if mask is None else mask
    return part.aggregate(sums, params, mask, frozen or nothing(mask), budget, rng.key(0), memory or {})


def test_example_10_12_server_mask_of_the_sparsyfed_variant():
    values = [torch.tensor([[0.9, 0], [0, 0.4]]), torch.tensor([[0.8, 0.3], [0, 0]])]
    clients = [({"w": w}, {"w": w != 0}, 10.0) for w in values]
    budget = Budget((Layer("w", (2, 2)),), "global", 0.5)
    made = aggregate(Consensus(variant="sparsyfed"), clients, budget)
    torch.testing.assert_close(made.params["w"], torch.tensor([[0.85, 0], [0, 0.2]]))
    assert made.mask["w"].int().tolist() == [[1, 0], [0, 1]]


def drawn_masks(counts, shapes, seed):
    """Random masks with these counts."""
    empty = {n: torch.zeros(s, dtype=torch.bool) for n, s in shapes.items()}
    return masks.grow_random(empty, counts, rng.key(seed))


SHAPES = {"a": (10, 10), "b": (20, 10), "c": (10, 2)}
LAYERS = tuple(Layer(n, s) for n, s in SHAPES.items())


@pytest.mark.parametrize(
    ("variant", "played", "largest"), [("original", 0, False), ("original", 1, True), ("sparsyfed", 0, True)]
)
def test_densities_are_averaged_and_scaled_to_the_total_exactly(variant, played, largest):
    """Client densities (.4, .1, .5) and (.2, .3, .5): mean (.3, .2, .5), 80 weights; the target is 40.

    Positions are the largest averages, after stage 1 too, or a draw that is independent of them.
    """
    given = [{"a": 40, "b": 20, "c": 10}, {"a": 20, "b": 60, "c": 10}]
    held = [drawn_masks(counts, SHAPES, number) for number, counts in enumerate(given)]
    values = {n: 0.1 + rng.uniform(rng.key(n), s) for n, s in SHAPES.items()}
    clients = [(masks.apply(values, m), m, 5.0) for m in held]
    budget = Budget(LAYERS, "global", 1 - 40 / 320)
    made = aggregate(Consensus(variant=variant), clients, budget, memory={"played": played})
    assert masks.active(made.mask) == {"a": 15, "b": 20, "c": 5}
    mean = {n: (held[0][n] * values[n] + held[1][n] * values[n]) / 2 for n in SHAPES}
    same = all(torch.equal(m, masks.largest(mean[n], int(m.sum()))) for n, m in made.mask.items())
    assert same == largest
    if largest:
        for name, mask in made.mask.items():
            torch.testing.assert_close(made.params[name], mean[name] * mask)


def test_densities_are_weighted_by_samples_in_the_sparsyfed_variant_only():
    held = [
        drawn_masks(c, SHAPES, i)
        for i, c in enumerate([{"a": 60, "b": 0, "c": 0}, {"a": 0, "b": 60, "c": 0}])
    ]
    clients = [
        ({n: torch.ones(s) for n, s in SHAPES.items()}, m, w) for m, w in zip(held, (30.0, 10.0), strict=True)
    ]
    budget = Budget(LAYERS, "global", 1 - 40 / 320)
    counts = [
        masks.active(aggregate(Consensus(variant=v), clients, budget).mask) for v in ("original", "sparsyfed")
    ]
    assert counts == [{"a": 20, "b": 20, "c": 0}, {"a": 30, "b": 10, "c": 0}]


def test_a_density_is_capped_at_one_and_the_rest_goes_to_the_others():
    density = {"a": torch.tensor(30.0), "b": torch.tensor(30.0), "c": torch.tensor(60.0)}
    score = {n: torch.rand(s) for n, s in SHAPES.items()}
    free = {n: torch.zeros(s, dtype=torch.bool) for n, s in SHAPES.items()}
    made = agreed(density, score, free, Budget(LAYERS, "global", 1 - 80 / 320))
    assert masks.active(made) == {"a": 30, "b": 30, "c": 20}  # c would get 40 of its 20


def test_fractions_are_rounded_without_favour_for_large_layers():
    """10 weights at 7.4 : 1.6 : 1.0 are 7, 2 and 1."""
    density = {n: torch.tensor(d) for n, d in {"a": 74.0, "b": 16.0, "c": 10.0}.items()}
    score = {n: torch.rand(s) for n, s in SHAPES.items()}
    free = {n: torch.zeros(s, dtype=torch.bool) for n, s in SHAPES.items()}
    made = agreed(density, score, free, Budget(LAYERS, "global", 1 - 10 / 320))
    assert masks.active(made) == {"a": 7, "b": 2, "c": 1}


def test_frozen_weights_stay_in_the_consensus():
    density = {n: torch.tensor(float(n == "a")) for n in SHAPES}
    frozen = drawn_masks({"a": 3, "b": 4, "c": 5}, SHAPES, 3)
    made = agreed(
        density, {n: torch.rand(s) for n, s in SHAPES.items()}, frozen, Budget(LAYERS, "global", 0.9)
    )
    assert sum(masks.active(made).values()) == 32
    assert all((made[n] | ~frozen[n]).all() for n in SHAPES)


def adapt(part=None, budget=None, clock=None, key=None, scale=None, frozen=None):
    budget, clock = budget or Budget(LAYERS, "global", 0.7), clock or Clock(0, 10, 1, 4)
    mask = masks.by_budget({n: torch.rand(s) for n, s in SHAPES.items()}, budget)
    params = {n: torch.randn(s) * (scale or {}).get(n, 1.0) * mask[n] for n, s in SHAPES.items()}
    frozen = {n: frozen & m if frozen is not None else torch.zeros_like(m) for n, m in mask.items()}
    key = rng.key(0) if key is None else key
    return params, mask, (part or AdaptDensities()).readjust(params, mask, frozen, budget, clock, key)


@pytest.mark.parametrize("allocation", ["global", "scaled", "erk"])
def test_adaptation_drops_the_smallest_and_keeps_the_total(allocation):
    torch.manual_seed(0)
    budget = Budget(LAYERS, allocation, 0.7)
    params, mask, moved = adapt(budget=budget)
    assert sum(masks.active(moved.mask).values()) == budget.total
    for name, active in mask.items():
        dropped = math.ceil(0.25 * 0.75 * int(active.sum()))  # p·(1 - 1/4)
        kept = moved.params[name] != 0
        assert int((active & ~kept).sum()) == dropped
        assert params[name][active & ~kept].abs().max() <= params[name][kept].abs().min()
        assert torch.equal(moved.params[name][kept], params[name][kept])
        assert not moved.params[name][~kept].any()


def test_growth_is_shared_by_mean_magnitude():
    """Layers a and b with weights of mean 3 : 1 grow connections at about 3 : 1, whatever their size."""
    torch.manual_seed(0)
    grown = dict.fromkeys(SHAPES, 0)
    for draw in range(60):
        _, _, moved = adapt(key=rng.key(draw), scale={"a": 3.0, "b": 1.0, "c": 1e-6})
        for name in SHAPES:
            grown[name] += int((moved.mask[name] & (moved.params[name] == 0)).sum())
    # some 1200 draws: the share of a has a deviation of 0.012; sampling without replacement bends it by 0.03
    assert grown["a"] / (grown["a"] + grown["b"]) == pytest.approx(0.75, abs=0.06)
    assert grown["c"] <= 2


def test_frozen_weights_are_not_dropped():
    torch.manual_seed(0)
    params, mask, moved = adapt(AdaptDensities(ratio=1.0), frozen=torch.tensor(True), clock=Clock(0, 9, 0, 1))
    assert all(torch.equal(moved.params[n], params[n]) for n in SHAPES)
    assert all((moved.mask[n] | ~mask[n]).all() for n in SHAPES)


def test_adaptation_under_vmap_equals_the_loop():
    torch.manual_seed(0)
    budget, part, clock = Budget(LAYERS, "global", 0.7), AdaptDensities(), Clock(0, 10, 1, 4)
    own = [masks.by_budget({n: torch.rand(s) for n, s in SHAPES.items()}, budget) for _ in range(3)]
    values = [{n: torch.randn(s, dtype=torch.float64) * m[n] for n, s in SHAPES.items()} for m in own]
    keys = torch.stack([rng.key(number) for number in range(3)])

    def client(params, mask, key):
        moved = part.readjust(params, mask, nothing(mask), budget, clock, key)
        return moved.params, moved.mask

    stacked = [{n: torch.stack([c[n] for c in group]) for n in SHAPES} for group in (values, own)]
    params, moved = torch.func.vmap(client)(*stacked, keys)
    for number in range(3):
        alone, mask = client(values[number], own[number], keys[number])
        assert all(torch.equal(params[n][number], alone[n]) for n in SHAPES)
        assert all(torch.equal(moved[n][number], mask[n]) for n in SHAPES)


def test_when_clients_adapt():
    def due(part, epochs, rounds=7):
        sparse = Budget(LAYERS, "global", 0.7)
        return [
            (r, e)
            for r in range(rounds)
            for e in range(epochs + 1)
            if part.due(Clock(r, rounds, e, epochs), sparse)
        ]

    assert due(AdaptDensities(), 3) == [(0, 1), (0, 2)]  # not after the last epoch, as the code
    assert due(AdaptDensities(warmup=2), 1) == [(0, 1), (1, 1)]  # a single epoch: after it
    assert due(AdaptDensities(variant="jmwst", period=3), 2) == [(0, 1), (1, 1), (4, 1)]
    assert not AdaptDensities().due(Clock(0, 9, 1, 3), Budget(LAYERS, "global", 0.0))


def test_stage_1_ends_in_a_random_mask_with_fresh_weights_that_stays(make_engine):
    engine = make_engine("flash", federation__rounds=6, federation__local_epochs=4)
    start = engine.start()
    reports = list(engine.rounds(start))
    assert [report.metrics["mask_changed"] > 0 for report in reports] == [True] + [False] * 5
    budget, after = engine.budget(engine.clock(0)), reports[0].state
    assert sum(masks.active(after.mask).values()) == budget.total
    assert masks.active(after.mask) != masks.active(start.mask)  # the clients' densities
    for name, mask in after.mask.items():
        assert torch.isin(after.params[name][mask], start.params[name][start.mask[name]]).all()
        assert not after.params[name][~mask].any()
        # a sample with replacement of about as many values has some 63 % of them, and at least half
        assert len(after.params[name][mask].unique()) > 0.5 * min(
            int(mask.sum()), int(start.mask[name].sum())
        )
    for name in after.params.keys() - after.mask.keys():
        assert torch.equal(after.params[name], start.params[name])


def test_the_random_mask_follows_the_seed(make_engine):
    ends = []
    for seed in (0, 0, 1):
        engine = make_engine("flash", federation__rounds=1, seed=seed)
        ends.append(next(engine.rounds(engine.start())).state.mask["fc1.weight"])
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_more_warm_up_rounds_start_from_the_same_model_and_add_their_densities(make_engine, watch):
    changes = {"method__readjust__warmup": 3, "method__aggregate__warmup": 3}
    engine = make_engine("flash", federation__rounds=4, federation__local_epochs=3, **changes)
    watched, start = watch(engine), engine.start()
    reports = list(engine.rounds(start))
    for params, mask, _ in watched.downloads[:9]:
        assert all(torch.equal(params[n], start.params[n]) for n in params)
        assert all(torch.equal(mask[n], start.mask[n]) for n in mask)
    density = {
        n: torch.tensor(float(sum(int(c.mask[n].sum()) for r, c in watched.uploads if r < 3)))
        for n in start.mask
    }
    score = {n: torch.rand(m.shape) for n, m in start.mask.items()}
    expected = agreed(density, score, nothing(start.mask), engine.budget(engine.clock(0)))
    assert masks.active(reports[2].state.mask) == masks.active(expected)
    assert [bool(report.metrics["mask_changed"]) for report in reports] == [False, False, True, False]


def test_jmwst_goes_on_moving_and_keeps_the_largest_averages(make_engine):
    engine = make_engine(
        "flash",
        federation__rounds=8,
        federation__local_epochs=3,
        method__readjust__variant="jmwst",
        method__readjust__period=3,
    )
    reports = list(engine.rounds(engine.start()))
    moved = [number for number, report in enumerate(reports) if report.metrics["mask_changed"]]
    assert moved == [0, 1, 4, 7]
    total = engine.budget(engine.clock(0)).total
    assert all(sum(masks.active(report.state.mask).values()) == total for report in reports)


def test_quirks_9_15_and_9_16_sparsyfed_variant(make_engine):
    """Biases train, although they start at 0 or not; the density is the real target's, not int(target)'s."""
    engine = make_engine(
        "flash",
        SPARSYFED,
        federation__rounds=4,
        sparsity__target=0.95,
        method__aggregate__variant="sparsyfed",
    )
    start = engine.start()
    start.params = {n: torch.zeros_like(p) if n.endswith("bias") else p for n, p in start.params.items()}
    assert all(m.all() for m in start.mask.values())  # round 1 is dense
    reports = list(engine.rounds(start))
    total = engine.budget(engine.clock(0)).total
    assert all(sum(masks.active(report.state.mask).values()) == total for report in reports)
    assert [bool(report.metrics["mask_changed"]) for report in reports] == [True, False, False, False]
    assert all(reports[-1].state.params[f"fc{n}.bias"].all() for n in (2, 3))


@pytest.mark.parametrize("base", ["fedavg", "feddst", "pffdst"])
@pytest.mark.parametrize("slot", ["mask_init", "readjust", "aggregate"])
def test_swap_for_four_rounds(make_engine, base, slot):
    changes = {"method__readjust__variant": "jmwst"} if slot == "readjust" else {}
    engine = make_engine(
        base,
        [f"{slot}=flash"],
        federation__rounds=4,
        federation__local_epochs=2,
        ledger__encode=True,
        **changes,
    )
    reports = list(engine.rounds(engine.start()))
    assert len(reports) == 4
    assert sum(masks.active(reports[-1].state.mask).values()) <= engine.budget(engine.clock(3)).total


@pytest.mark.parametrize("slot", ["local_step", "freeze_policy", "readjust", "aggregate"])
@pytest.mark.parametrize("other", ["feddst", "pffdst"])
def test_other_parts_in_flash(make_engine, slot, other):
    engine = make_engine("flash", [f"{slot}={other}"], federation__rounds=4, ledger__encode=True)
    assert len(list(engine.rounds(engine.start()))) == 4


def test_clients_and_server_of_the_sparsyfed_variant_keep_as_many():
    """0.95·50 rounds to 48, so that 2 stay, where 0.05·50 would round to 3 and masks move in every round."""
    budget = Budget((Layer("w", (5, 10)),), "global", 0.95)
    params = {"w": torch.arange(1.0, 51).view(5, 10)}
    own = masks.global_top(params, {"w": torch.ones(5, 10, dtype=torch.bool)}, budget)
    clients = [(masks.apply(params, own), own, 1.0)] * 2
    made = aggregate(Consensus(variant="sparsyfed"), clients, budget)
    assert torch.equal(made.mask["w"], own["w"])
    assert own["w"].sum() == 2
