"""FedDST against its method document: each test names the invariant (section 8) or example (10) it checks."""

import pytest
import torch

from fedsparse.core import masks, optim
from fedsparse.core.budget import Budget, Layer
from fedsparse.core.ledger import Traffic
from fedsparse.core.schedule import cosine_decay
from fedsparse.core.state import Clock
from fedsparse.plugins.fedavg import MagnitudeMask, WeightedMean
from fedsparse.plugins.feddst import CodeCost, MaskedMean, Regrow

LAYER = Layer("w", (3, 4))


def budget(sparsity):
    return Budget((LAYER,), "scaled", sparsity)


def nothing(mask):
    return {name: torch.zeros_like(m) for name, m in mask.items()}


def test_example_10_2_readjust_of_one_layer():
    w = torch.tensor([[0.9, -0.1, 0, 0.4], [0, 0.3, -0.7, 0], [0.2, 0, 0, 0]])
    g = torch.tensor([[0.05, 0.6, -0.9, 0.1], [0.8, 0.02, 0.95, -0.3], [0.01, 0.5, -0.2, 0.7]])
    part, mask = Regrow(ratio=0.5, annealing="constant"), {"w": w != 0}
    moved = part.readjust(
        {"w": w}, mask, nothing(mask), part.grow_score({"w": g}), budget(0.5), Clock(1, 10, 2, 3)
    )
    assert torch.equal(moved.params["w"], torch.tensor([[0.9, 0, 0, 0.4], [0, 0, -0.7, 0], [0, 0, 0, 0]]))
    assert moved.mask["w"].int().tolist() == [[1, 0, 1, 1], [1, 0, 1, 0], [0, 0, 0, 1]]


def uploads(weights=(70.0, 33.0, 10.0)):
    w1 = torch.tensor([[0.8, 0, 0, 0.5], [0, 0.2, -0.6, 0], [0, 0, 0.3, 0]])
    w2 = torch.tensor([[1, -0.2, 0, 0], [0, 0, -0.9, 0.1], [0, 0, 0, 0.4]])
    w3 = torch.tensor([[0.6, 0, 0.7, 0.3], [0, 0, -0.3, 0], [0.5, 0, 0, 0]])
    held = [w != 0 for w in (w1, w2, w3)]
    held[2][2, 3] = True
    return [
        ({"w": w}, {"w": m}, torch.tensor(weight))
        for w, m, weight in zip((w1, w2, w3), held, weights, strict=True)
    ]


def aggregate(contributions, sparsity=0.5, min_votes=0.0):
    part, sums = MaskedMean(min_votes=min_votes), {}
    for params, mask, weight in contributions:
        for name, value in part.contribute(params, mask, weight, moved=True).items():
            sums[name] = sums.get(name, 0) + value
    mask = {"w": torch.ones(3, 4, dtype=torch.bool)}
    return part.aggregate(sums, {"w": torch.zeros(3, 4)}, mask, nothing(mask), budget(sparsity), {})


def test_example_10_3_aggregate_of_three_clients():
    union = aggregate(uploads(), sparsity=0.0)
    expected = torch.tensor([[0.840708, -0.2, 0.7, 0.475], [0, 0.2, -0.661062, 0.1], [0.5, 0, 0.3, 0.306977]])
    torch.testing.assert_close(union.params["w"], expected, atol=5e-7, rtol=0)  # six published digits
    pruned = aggregate(uploads())
    assert pruned.mask["w"].int().tolist() == [[1, 0, 1, 1], [0, 0, 1, 0], [1, 0, 0, 1]]
    # the code's weighting (2·batches) keeps (2,2) instead of (2,3)
    by_batches = aggregate(uploads((6.0, 4.0, 2.0)))
    assert by_batches.mask["w"].int().tolist() == [[1, 0, 1, 1], [0, 0, 1, 0], [1, 0, 1, 0]]
    voted = aggregate(uploads((6.0, 4.0, 2.0)), sparsity=0.0, min_votes=3.0)
    assert voted.mask["w"].int().tolist() == [[1, 1, 0, 1], [0, 1, 1, 1], [0, 0, 1, 1]]


def test_example_10_4_two_steps():
    params, state = {"w": torch.tensor([0.9, 0, 0, 0.4])}, {"momentum": {"w": torch.zeros(4)}}
    free = {"w": torch.tensor([True, True, False, True])}
    grads = {"w": torch.tensor([1, 0.5, 2, -3.0])}
    params, state = optim.sgd(params, grads, state, free, 0.1, 0.9, 0.001)
    torch.testing.assert_close(state["momentum"]["w"], torch.tensor([1.0009, 0.5, 2.0, -2.9996]))
    torch.testing.assert_close(params["w"], torch.tensor([0.79991, -0.05, 0, 0.69996]))
    params, state = optim.sgd(params, grads, state, free, 0.1, 0.9, 0.001)
    assert float(state["momentum"]["w"][1]) == pytest.approx(0.94995)
    assert float(params["w"][1]) == pytest.approx(-0.144995)
    assert float(params["w"][2]) == 0
    assert float(state["momentum"]["w"][2]) == pytest.approx(3.8)


def test_example_10_6_decay():
    gate = [0.5 * cosine_decay(t, 0.5, 200) for t in (1, 11, 101, 191, 199, 200)]
    assert gate == pytest.approx([0.249985, 0.248139, 0.123037, 0.001247, 0.000015, 0], abs=5e-7)
    decayed = [cosine_decay(t, 0.01, 200) for t in (1, 16, 100, 196)]
    assert decayed == pytest.approx([0.0099994, 0.0098429, 0.005, 0.0000099], abs=5e-8)


def test_invariant_1_init(make_engine):
    """|M_l| = K_l(S); zeros off the mask; biases untouched."""
    engine = make_engine("feddst")
    state = engine.start()
    assert masks.active(state.mask) == dict(engine.budget(engine.clock(0)).counts)
    for name, mask in state.mask.items():
        assert not state.params[name][~mask].any()
    for name in ("fc1.bias", "fc2.bias", "fc3.bias"):
        assert torch.equal(state.params[name], engine.params[name])


def test_invariants_3_4_5_between_readjustments(make_engine, watch):
    """Steps stay on the mask; clients start as the server is, with zero momentum; masks stay put."""
    engine = make_engine("feddst", federation__rounds=30, method__readjust__period=100)
    watched, state = watch(engine), engine.start()
    masked = state.mask
    reports = engine.rounds(state)
    next(reports), next(reports)  # round 1 readjusts, 2 does not
    before = next(reports).state.mask
    after = next(reports).state.mask
    assert all(torch.equal(before[name], after[name]) for name in before)
    for _, params, mask in watched.steps:
        assert all(not params[name][~mask[name]].any() for name in mask)
    for params, mask, client in watched.downloads:
        assert all(client.params[name] is params[name] for name in params)
        assert all(client.mask[name] is mask[name] for name in mask)
        assert not any(v.any() for v in client.carry.state["momentum"].values())
    for round_, client in watched.uploads:
        if round_ != 1:
            assert all(
                torch.equal(client.mask[n], (masked if round_ == 0 else before)[n]) for n in client.mask
            )


def test_invariant_5_aggregate_is_weighted_fedavg_when_masks_agree():
    shared = uploads()[0][1]
    contributions = [({"w": w["w"] * shared["w"]}, shared, n) for w, _, n in uploads()]
    mean = sum(w["w"] * n for w, _, n in contributions) / 113
    # two divisions of float32 sums: half a unit in the last place each
    torch.testing.assert_close(aggregate(contributions, 0.0).params["w"], mean)


def test_invariants_6_7_8_readjust():
    """Exact counts; the smallest are pruned, the largest gradients grown; the rest keeps its value."""
    torch.manual_seed(0)
    big = Budget((Layer("w", (30, 40)),), "scaled", 0.8)
    params = {"w": torch.randn(30, 40)}
    mask = masks.prune_smallest(params, {"w": torch.ones(30, 40, dtype=torch.bool)}, big)
    params = masks.apply(params, mask)
    gradient = torch.randn(30, 40)
    part, clock = Regrow(ratio=0.2, annealing="constant"), Clock(1, 10)
    moved = part.readjust(params, mask, nothing(mask), part.grow_score({"w": gradient}), big, clock)
    kept = big.at(0.8 + 0.2 * 0.2).counts["w"]
    survived = mask["w"] & (moved.params["w"] != 0)
    assert int(moved.mask["w"].sum()) == big.counts["w"]
    assert int(survived.sum()) == kept
    grown, dropped = moved.mask["w"] & ~survived, mask["w"] & ~survived
    assert int(grown.sum()) == big.counts["w"] - kept
    assert not moved.params["w"][grown].any()
    assert torch.equal(moved.params["w"][survived], params["w"][survived])
    assert params["w"][dropped].abs().max() <= params["w"][survived].abs().min()
    unchosen = ~moved.mask["w"]
    assert gradient[grown].abs().min() >= gradient[unchosen].abs().max()


def test_invariant_9_no_ratio_no_movement(make_engine):
    engine = make_engine("feddst", method__readjust__ratio=0.0, federation__rounds=6)
    state = engine.start()
    reports = list(engine.rounds(state))
    assert all(report.metrics["mask_changed"] == 0 for report in reports)


def test_invariant_9_dense_feddst_is_fedavg(make_engine):
    feddst, fedavg = (
        make_engine(plugin, sparsity__target=0.0, federation__rounds=4) for plugin in ("feddst", "fedavg")
    )
    ends = [list(engine.rounds(engine.start()))[-1].state.params for engine in (feddst, fedavg)]
    for name in ends[0]:
        torch.testing.assert_close(ends[0][name], ends[1][name])  # the same sums, divided by equal votes


def test_invariants_10_11_aggregation():
    """No holder: 0; one: its value; several: between them. Order and scale of weights do not matter."""
    given = uploads()
    made = aggregate(given, 0.0).params["w"]
    assert made[1, 0] == 0
    assert made[2, 1] == 0
    assert float(made[0, 1]) == pytest.approx(-0.2)
    held = torch.stack([torch.where(m["w"], w["w"], torch.inf) for w, m, _ in given]).amin(0)
    above = torch.stack([torch.where(m["w"], w["w"], -torch.inf) for w, m, _ in given]).amax(0)
    some = torch.stack([m["w"] for _, m, _ in given]).any(0)
    assert (made >= held - 1e-6)[some].all()  # one rounding of a float32 mean
    assert (made <= above + 1e-6)[some].all()
    torch.testing.assert_close(aggregate(given[::-1], 0.0).params["w"], made)
    torch.testing.assert_close(aggregate([(w, m, 7 * n) for w, m, n in given], 0.0).params["w"], made)


def test_invariant_12_server_prune():
    assert int(aggregate(uploads(), 0.5).mask["w"].sum()) == 6
    assert int(aggregate(uploads(), 0.1).mask["w"].sum()) == 10  # the union is sparser: nothing is added


def test_invariant_13_rounds():
    part = Regrow(period=15, ratio=0.01)
    due = [t for t in range(400) if part.due(Clock(t, 400, 9, 10), budget(0.5))]
    assert due == list(range(1, 200, 15))
    assert not any(part.due(Clock(1, 400, epoch, 10), budget(0.5)) for epoch in (0, 8, 10))
    assert part.due(Clock(1, 400, 0, 1), budget(0.5))  # a single epoch: before it
    assert not part.due(Clock(1, 400, 9, 10), budget(0.0))  # quirk 9.9: no rewiring of a dense network


def test_invariant_14_round_target():
    assert all(Regrow().target_sparsity(0.8, Clock(t, 100)) == 0.8 for t in range(100))
    part = Regrow(final_sparsity=0.9)
    assert part.target_sparsity(0.5, Clock(0, 100)) == 0.5
    assert part.target_sparsity(0.5, Clock(25, 100)) == pytest.approx(0.7)
    assert all(part.target_sparsity(0.5, Clock(t, 100)) == pytest.approx(0.9) for t in range(50, 100))


def test_quirk_9_1_grown_weights_are_trained_before_the_server_prunes(make_engine, watch):
    """In the released code they arrive as zeros; here some survive the server's pruning."""
    engine = make_engine(
        "feddst", method__readjust__ratio=0.3, federation__local_epochs=3, federation__rounds=20
    )
    watched, state = watch(engine), engine.start()
    reports = engine.rounds(state)
    before = next(reports).state.mask
    after = next(reports).state
    uploaded = [client for round_, client in watched.uploads if round_ == 1]
    grown = {n: torch.stack([c.mask[n] for c in uploaded]).any(0) & ~before[n] for n in before}
    for client in uploaded:
        assert client.params["fc1.weight"][client.mask["fc1.weight"] & ~before["fc1.weight"]].any()
    assert sum(int((grown[n] & after.mask[n]).sum()) for n in before) > 0


def test_frozen_weights_survive_pruning_however_small():
    """In a swap with a freeze policy: the server's pruning, a readjustment with a tiny budget."""
    frozen = {"w": torch.zeros(3, 4, dtype=torch.bool)}
    frozen["w"][0, 1] = frozen["w"][1, 1] = True
    values, held = {"w": torch.ones(3, 4)}, {"w": torch.ones(3, 4, dtype=torch.bool)}
    values["w"][frozen["w"]] = 1e-9
    for part in (MaskedMean(), WeightedMean()):
        sums = part.contribute(values, held, torch.tensor(4.0), moved=True)
        made = part.aggregate(sums, values, held, frozen, budget(0.5), {})
        assert int(made.mask["w"].sum()) == 6
        assert (made.mask["w"] | ~frozen["w"]).all()
    part = Regrow(ratio=0.9, annealing="constant")  # keeps 1 of 12, fewer than are frozen
    moved = part.readjust(values, held, frozen, {"w": torch.rand(3, 4)}, budget(0.5), Clock(1, 10))
    assert int(moved.mask["w"].sum()) == 6
    assert torch.equal(moved.params["w"][frozen["w"]], values["w"][frozen["w"]])


@pytest.mark.parametrize("allocation", ["uniform", "erk", "global"])
def test_readjusted_values_stay_on_the_mask_when_rounding_favours_a_layer(allocation):
    """Counts by largest remainder are not monotone in the sparsity."""
    torch.manual_seed(0)
    layers = tuple(Layer(n, s) for n, s in {"a": (7, 9), "b": (5, 11), "c": (3, 17), "d": (4, 12)}.items())
    params = {layer.name: torch.randn(layer.shape) for layer in layers}
    full = {n: torch.ones_like(p, dtype=torch.bool) for n, p in params.items()}
    part, score = Regrow(ratio=0.01, annealing="constant"), {n: p.abs() for n, p in params.items()}
    for step in range(100):
        now = Budget(layers, allocation, 0.3 + 0.006 * step)
        moved = part.readjust(params, full, nothing(full), score, now, Clock(1, 10))
        assert sum(int(m.sum()) for m in moved.mask.values()) == now.total
        assert all(not moved.params[n][~m].any() for n, m in moved.mask.items())


def test_the_growth_gradient_is_of_the_last_minibatch_before_the_last_epoch(make_engine, monkeypatch):
    """Document 3.5.1, and quirk 9.14: the number of minibatches is a parameter."""
    from fedsparse.core.loss import ClientLoss

    seen, real = [], ClientLoss.dense_grad

    def watched(self, params, carry, batches):
        seen.append(batches)
        return real(self, params, carry, batches)

    monkeypatch.setattr(ClientLoss, "dense_grad", watched)
    for batches, epochs in ((1, 3), (2, 3), (1, 1)):
        seen.clear()
        engine = make_engine(
            "feddst",
            federation__local_epochs=epochs,
            federation__clients_per_round=1,
            method__readjust__score_batches=batches,
        )
        reports = engine.rounds(engine.start())
        clients = [next(reports), next(reports)][1].metrics["clients"]
        epoch = engine.task.batches(clients[0], 1, max(epochs - 2, 0))
        expected = epoch[:batches] if epochs == 1 else epoch[-batches:]
        assert len(seen) == 1
        for a, b in zip(seen[0], expected, strict=True):
            assert torch.equal(a.inputs, b.inputs)


def test_magnitude_mask_keeps_the_largest_initial_weights():
    params = {"w": torch.tensor([[0.9, -0.1, 0.05, 0.4], [0.01, 0.3, -0.7, 0.02], [0.2, 0.6, 0.15, -0.8]])}
    mask = MagnitudeMask().mask_init(params, budget(0.5))
    assert mask["w"].int().tolist() == [[1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1]]


def test_example_10_7_bits_of_the_code():
    """CIFAR10Net at sparsity 0.8, and what 5.1 adds where a mask is new, was readjusted, or W⁰ is due."""
    known = Traffic(
        round=3,
        weights=781_770,
        active=156_399,
        active_upload=156_399,
        frozen=0,
        unmasked=236,
        biases=236,
        mask_changed=False,
        client_readjusted=False,
        first_contact=False,
    )
    bits = 5_012_320
    assert CodeCost().paper_bytes(known) * 8 == 2 * bits
    assert CodeCost().paper_bytes(known._replace(mask_changed=True)) * 8 == 2 * bits + 781_770
    assert CodeCost().paper_bytes(known._replace(client_readjusted=True)) * 8 == 2 * bits + 156_399
    assert CodeCost().paper_bytes(known._replace(round=0)) * 8 == bits
