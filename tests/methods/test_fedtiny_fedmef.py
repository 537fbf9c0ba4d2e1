"""FedTiny and FedMef against the equations that their plugins state; no method document covers them."""

import math

import pytest
import torch

from fedsparse.core import masks, optim, rng
from fedsparse.core.budget import Budget, Layer
from fedsparse.core.errors import ConfigError
from fedsparse.core.loss import ClientLoss, Probe
from fedsparse.core.schedule import share
from fedsparse.core.state import Batch, Carry, Clock
from fedsparse.plugins.fedavg import MaskedSgd
from fedsparse.plugins.fedmef import Extrusion, marked
from fedsparse.plugins.fedtiny import Adjustments, BestCandidate, Progressive

SHAPES = {"a": (10, 10), "b": (20, 10), "c": (10, 4)}


def schedule(plugin, period=1, stop=1.0):
    """Settings of a method's adjustments, in every slot that has them."""
    slots = ["readjust", *(["local_step"] if plugin == "fedmef" else [])]
    return {f"method__{slot}__{n}": v for slot in slots for n, v in {"period": period, "stop": stop}.items()}


def sparse(density=0.3):
    """Weights of three layers, their mask, nothing frozen, and gradients."""
    budget = Budget(tuple(Layer(n, s) for n, s in SHAPES.items()), "uniform", 1 - density)
    mask = masks.by_budget({n: torch.rand(s) for n, s in SHAPES.items()}, budget)
    params = masks.apply({n: torch.randn(s) for n, s in SHAPES.items()}, mask)
    frozen = {n: torch.zeros_like(m) for n, m in mask.items()}
    return params, mask, frozen, {n: torch.randn(s) for n, s in SHAPES.items()}


def test_the_fraction_replaced_is_the_papers_cosine():
    """a_t = 0.15·(1 + cos(πt/R_stop))·n after each 10 rounds up to R_stop = 100 of 300; t rounds are done."""
    seen = {t + 1: Adjustments(10, 1 / 3, 0.3).fraction(Clock(t, 300)) for t in range(300)}
    assert [t for t, part in seen.items() if part] == list(range(10, 100, 10))
    assert all(
        part == pytest.approx(0.15 * (1 + math.cos(math.pi * t / 100))) for t, part in seen.items() if part
    )
    due = [Progressive().due(Clock(9, 300), Budget((Layer("a", (2, 2)),), "uniform", s)) for s in (0.5, 0.0)]
    assert due == [True, False]  # a dense network has nowhere to grow


def test_grows_the_largest_mean_gradients_and_prunes_the_smallest_of_the_other_weights():
    torch.manual_seed(0)
    params, mask, frozen, score = sparse()
    part, clock = Progressive(period=1, stop=1.0, blocks=1), Clock(2, 10)  # three rounds done
    moved = part.readjust(params, mask, frozen, score, clock, {})
    for name, active in mask.items():
        count = share(int(active.sum()), 0.15 * (1 + math.cos(0.3 * math.pi)))
        grown, dropped = moved.mask[name] & ~active, active & ~moved.mask[name]
        assert int(grown.sum()) == int(dropped.sum()) == count > 0
        kept = active & moved.mask[name]
        assert params[name][dropped].abs().max() <= params[name][kept].abs().min()
        assert torch.equal(moved.params[name][kept], params[name][kept])
        assert not moved.params[name][~kept].any()
        passed = ~active & ~moved.mask[name]
        assert score[name][grown].abs().min() >= score[name][passed].abs().max()
    assert part.grow_score(score) is score  # signed, so that clients that disagree cancel out


def test_counts_stay_where_there_is_no_room_and_frozen_weights_stay():
    torch.manual_seed(0)
    params, mask, frozen, score = sparse()
    mask["a"] = torch.ones_like(mask["a"])
    mask["a"][0, :2] = False
    params["a"] = torch.where(mask["a"], torch.randn(10, 10), 0)
    frozen["b"] = mask["b"].clone()
    part = Progressive(period=1, stop=1.0, blocks=1, ratio=1.0)
    moved = part.readjust(params, mask, frozen, score, Clock(0, 10), {})
    assert masks.active(moved.mask) == masks.active(mask)
    assert int((moved.mask["a"] & ~mask["a"]).sum()) == 2  # all that was inactive
    assert torch.equal(moved.mask["b"], mask["b"])


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        (3, ["c", "b", "a", "c"]),
        (2, ["bc", "a", "bc", "a"]),
        (5, ["c", "b", "a", "c"]),  # no more blocks than layers
        (1, ["abc"] * 4),
    ],
)
def test_blocks_are_visited_from_output_to_input_and_round_again(blocks, expected):
    part = Progressive(period=10, stop=1.0, blocks=blocks)
    assert ["".join(part.block(list("abc"), Clock(t, 100))) for t in (9, 19, 29, 39)] == expected


def test_rounds_of_fedtiny_change_the_scheduled_block_by_exact_counts(make_engine):
    engine = make_engine("fedtiny", federation__rounds=8, ledger__encode=True, **schedule("fedtiny"))
    state, scores = engine.start(), {}
    readjust = engine.readjust

    def watched(state, site, budget, clock, uploads=None):
        if site == "server:end":
            scores[clock.round] = (dict(uploads.score), uploads.samples, dict(state.mask))
        readjust(state, site, budget, clock, uploads)

    engine.readjust = watched
    before, counts = state.mask, masks.active(state.mask)
    for report in engine.rounds(state):
        after, number = report.state.mask, report.metrics["round"]
        done = number + 1
        assert masks.active(after) == counts
        for at, name in enumerate(("fc3.weight", "fc2.weight", "fc1.weight")):
            part = 0.15 * (1 + math.cos(math.pi * done / 8))
            expected = share(counts[name], part) if done < 8 and number % 3 == at else 0
            grown = after[name] & ~before[name]
            assert int(grown.sum()) == int((before[name] & ~after[name]).sum()) == expected
            if expected:
                given, samples, _ = scores[number]
                mean = torch.where(before[name], -1.0, (given[name] / samples).abs())
                assert torch.equal(grown, masks.largest(mean, expected))
        before = after


@pytest.mark.parametrize("steps", [0, 3])
def test_the_candidate_of_lowest_loss_after_its_short_training_is_taken(make_engine, steps):
    """Candidates have exact totals and different layer densities; the first is the plain magnitude mask."""
    engine = make_engine("fedtiny", sparsity__target=0.9)
    part, budget = BestCandidate(candidates=6, steps=steps, rate=0.2), engine.budget(engine.clock(0))
    probe = Probe(engine.loss, engine.buffers, engine.task.sample(256))
    plain = masks.by_budget({layer.name: engine.params[layer.name].abs() for layer in budget.layers}, budget)

    def loss(mask):
        weights = masks.apply(engine.params, mask)
        for _ in range(steps):
            leaves = {n: w.clone().requires_grad_() for n, w in weights.items()}
            value, _ = engine.loss.plain(leaves, engine.buffers, probe.batch)
            grads = torch.autograd.grad(value, list(leaves.values()))
            stepped = {n: w - 0.2 * g for (n, w), g in zip(weights.items(), grads, strict=True)}
            weights = masks.apply(stepped, mask)
        return float(engine.loss.plain(weights, engine.buffers, probe.batch)[0])

    taken = []
    for draw in range(4):
        key = rng.key(draw)
        pool = [part.candidate(engine.params, budget, rng.fold(key, n), n) for n in range(6)]
        losses = [loss(mask) for mask in pool]
        assert all(sum(masks.active(mask).values()) == budget.total for mask in pool)
        assert len({tuple(masks.active(mask).values()) for mask in pool}) == 6
        assert all(torch.equal(pool[0][name], plain[name]) for name in plain)
        taken.append(losses.index(min(losses)))
        chosen = part.mask_init(engine.params, budget, probe, key)
        assert all(torch.equal(chosen[name], pool[taken[-1]][name]) for name in chosen)
    assert len(set(taken)) > 1


def test_candidates_differ_where_the_allocation_fixes_the_counts(make_engine):
    engine = make_engine("fedtiny", sparsity__allocation="erk")
    budget = engine.budget(engine.clock(0))
    pool = [BestCandidate().candidate(engine.params, budget, rng.key(n), n) for n in range(3)]
    assert all(masks.active(mask) == dict(budget.counts) for mask in pool)
    assert not torch.equal(pool[1]["fc1.weight"], pool[2]["fc1.weight"])


def step(part, engine, state, clock, batch, lr=0.05, momentum=0.9):
    """One step of a local_step part from the start of a round."""
    loss = ClientLoss(engine.loss, state.mask, state.params)
    offered = {"trainable": state.mask, "lr": lr, "momentum": momentum, "weight_decay": 0.001}
    if isinstance(part, MaskedSgd):
        start = part.client_init(state.params, momentum)
    else:
        start = part.client_init(state.params, state.mask, momentum)
        offered |= {"target": 0.8, "clock": clock}
    return part.local_step(loss, state.params, Carry(state.buffers, start), batch, **offered)


def test_extrusion_is_the_gradient_of_the_penalty_on_the_marked_weights(make_engine):
    engine = make_engine("fedmef", federation__rounds=20)
    state, batch = engine.start(), engine.task.batches(0, 0, 0)[0]
    part = Extrusion(strength=0.5, period=1, stop=1.0, ratio=0.4)
    clock = Clock(3, 20, 0, 2)
    made = step(part, engine, state, clock, batch)
    low = {}
    for name, mask in state.mask.items():
        count = share(int(mask.sum()), 0.2 * (1 + math.cos(math.pi * 0.2)))
        low[name] = masks.largest(torch.where(mask, -state.params[name].abs(), -math.inf), count)
    leaves = {n: p.clone().requires_grad_() for n, p in state.params.items()}
    value, _ = engine.loss.total(leaves, state.mask, state.params, state.buffers, batch)
    value = value + 0.5 * sum((leaves[n] * m).square().sum() for n, m in low.items())
    grads = dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))
    zero = {"momentum": optim.zeros(state.params)}
    expected, _ = optim.sgd(state.params, grads, zero, state.mask, 0.05, 0.9, 0.001)
    for name, values in expected.items():
        torch.testing.assert_close(made.params[name], values)  # one sum in another order


def test_without_an_adjustment_a_round_is_plain_sgd_to_the_bit(make_engine):
    engine = make_engine("fedmef", federation__rounds=20)
    state, batch = engine.start(), engine.task.batches(0, 0, 0)[0]
    for part, clock in (
        (Extrusion(), Clock(7, 20)),
        (Extrusion(strength=9), Clock(10, 20)),
        (Extrusion(strength=9, period=1, stop=1.0), Clock(19, 20)),
    ):
        made, plain = (step(p, engine, state, clock, batch) for p in (part, MaskedSgd()))
        assert all(torch.equal(made.params[n], plain.params[n]) for n in plain.params)
        assert torch.equal(made.metrics["loss"], plain.metrics["loss"])


def test_marked_are_the_smallest_weights_of_each_layer_at_download():
    torch.manual_seed(0)
    params, mask, _, _ = sparse()
    place = Extrusion().client_init(params, mask, 0.0)["place"]
    for part in (0.0, 0.1, 1 / 3, 1.0):
        low = marked(params, place, part)
        for name, active in mask.items():
            count = share(int(active.sum()), part)
            chosen = low[name] != 0
            assert int(chosen.sum()) == count
            if 0 < count < int(active.sum()):
                assert params[name][chosen].abs().max() < params[name][active & ~chosen].abs().min()


def test_extrusion_shrinks_what_will_be_pruned_and_nothing_else_differs(make_engine, watch):
    """At the end of the round, the weights that the server prunes are smaller than under plain training."""
    norms, pruned = [], []
    for strength in (0.0, 2.0):
        engine = make_engine(
            "fedmef",
            federation__rounds=6,
            federation__local_epochs=3,
            method__local_step__strength=strength,
            **schedule("fedmef", period=2),
        )
        watched, state = watch(engine), engine.start()
        reports = engine.rounds(state)
        downloaded = next(reports).state
        place = Extrusion().client_init(downloaded.params, downloaded.mask, 0.0)["place"]
        next(reports)
        part = Adjustments(2, 1.0, 0.2).fraction(Clock(1, 6))
        low = marked(downloaded.params, place, part)
        clients = [client for number, client in watched.uploads if number == 1]
        norms.append(sum(float(c.params[n][low[n] != 0].norm()) for c in clients for n in low))
        pruned.append(downloaded.params)
    assert all(torch.equal(pruned[0][n], pruned[1][n]) for n in pruned[0])  # round 0 is plain in both
    assert norms[1] < 0.5 * norms[0]


def test_the_budget_aware_rate():
    """μ = max(η, p(t)·(2σ(‖θ_low‖) - 1)·η_0), p = (2T - 2t)/(2T - t)."""
    low, part = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}, Extrusion(peak_rate=0.4)
    pull = 2 / (1 + math.exp(-5)) - 1
    for epoch, rex in ((0, 1.0), (2, 4 / 6), (3, 2 / 5)):
        assert float(part.rate(low, 0.001, Clock(1, 9, epoch, 4))) == pytest.approx(rex * pull * 0.4)
    assert float(part.rate(low, 0.3, Clock(1, 9, 3, 4))) == pytest.approx(0.3)
    assert float(part.rate({"a": torch.zeros(2)}, 0.01, Clock(1, 9, 0, 4))) == pytest.approx(0.01)


def test_the_peak_rate_is_used_in_extruding_rounds_only(make_engine):
    engine = make_engine("fedmef", federation__rounds=20)
    state, batch = engine.start(), engine.task.batches(0, 0, 0)[0]
    fast, slow = (Extrusion(period=2, stop=1.0, peak_rate=rate) for rate in (10.0, None))
    for number, equal in ((0, True), (1, False)):
        ends = [step(part, engine, state, Clock(number, 20), batch).params for part in (fast, slow)]
        assert all(torch.equal(ends[0][n], ends[1][n]) for n in ends[0]) == equal


def test_pruned_inputs_change_the_gradient_of_weights_and_nothing_else(make_engine):
    """Scaled activation pruning without its scaling: biases take the very step that they took."""
    engine = make_engine("fedmef", federation__rounds=20)
    state, batch = engine.start(), engine.task.batches(0, 0, 0)[0]
    whole, pruned = (step(Extrusion(inputs=q), engine, state, Clock(0, 20), batch) for q in (1.0, 0.3))
    assert torch.equal(whole.metrics["loss"], pruned.metrics["loss"])
    for name, value in whole.params.items():
        if name.endswith("bias"):
            torch.testing.assert_close(pruned.params[name], value)
        else:
            assert not torch.allclose(pruned.params[name], value)


@pytest.mark.parametrize(("peak_rate", "inputs"), [(None, 1.0), (0.4, 1.0), (None, 0.3)])
def test_extrusion_under_vmap_equals_the_loop(make_engine, peak_rate, inputs):
    """Two steps of three clients with masks of their own, in float64: 1e-16 a sum in another order."""
    engine = make_engine("fedmef", federation__rounds=8)
    start, part = (
        engine.start(),
        Extrusion(strength=0.5, period=1, stop=1.0, peak_rate=peak_rate, inputs=inputs),
    )
    params = {n: p.double() for n, p in start.params.items()}
    own = [
        {n: m & (rng.uniform(rng.key(c, n), m.shape) < 0.7) for n, m in start.mask.items()} for c in range(3)
    ]
    drawn = [engine.task.batches(c, 0, 0)[0] for c in range(3)]
    batches = [Batch(b.inputs.double(), b.targets) for b in drawn]

    def client(mask, batch):
        values = masks.apply(params, mask)
        carry = Carry({}, part.client_init(values, mask, 0.9))
        for _ in range(2):
            loss = ClientLoss(engine.loss, mask, values)
            values, carry, _ = part.local_step(
                loss, values, carry, batch, mask, 0.05, 0.9, 0.001, 0.8, Clock(1, 8, 0, 1)
            )
        return values

    stacked = {n: torch.stack([mask[n] for mask in own]) for n in own[0]}
    together = torch.func.vmap(client)(stacked, Batch(*(torch.stack(f) for f in zip(*batches, strict=True))))
    for number in range(3):
        for name, value in client(own[number], batches[number]).items():
            torch.testing.assert_close(together[name][number], value, atol=1e-10, rtol=1e-8)


def test_fedmef_adjusts_every_layer_and_keeps_the_budget(make_engine):
    engine = make_engine("fedmef", federation__rounds=5, ledger__encode=True, **schedule("fedmef"))
    state = engine.start()
    before, counts = state.mask, dict(engine.budget(engine.clock(0)).counts)
    for report in engine.rounds(state):
        after, number = report.state.mask, report.metrics["round"]
        assert masks.active(after) == counts
        for name in after:
            done = number + 1
            expected = share(counts[name], 0.1 * (1 + math.cos(math.pi * done / 5))) if done < 5 else 0
            assert int((after[name] & ~before[name]).sum()) == expected
        before = after


@pytest.mark.parametrize("plugin", ["fedtiny", "fedmef"])
@pytest.mark.parametrize(
    ("period", "stop", "expected"), [(1, 1.0, [1, 1, 0]), (3, 1.0, [0] * 3), (1, 0.4, [0] * 3)]
)
def test_what_is_grown_is_trained_before_the_run_ends(make_engine, plugin, period, stop, expected):
    """Of three rounds the last never ends with an adjustment, nor does one at or after R_stop."""
    engine = make_engine(plugin, federation__rounds=3, **schedule(plugin, period=period, stop=stop))
    reports = list(engine.rounds(engine.start()))
    assert [report.metrics["mask_changed"] > 0 for report in reports] == [bool(x) for x in expected]


def test_weights_are_squeezed_in_just_the_rounds_that_end_with_an_adjustment(make_engine, watch):
    """Each round twice from the same state, with and without the penalty."""
    settings = schedule("fedmef", period=2, stop=0.8) | {"federation__rounds": 9}
    plain, strong = (
        make_engine("fedmef", **settings, method__local_step__strength=value) for value in (0.0, 5.0)
    )
    ends = [watch(engine) for engine in (plain, strong)]
    state, squeezed, adjusted = plain.start(), [], []
    for _ in range(9):
        report = plain.play(state)
        strong.play(state)
        one, other = ([client.params for _, client in end.uploads[-3:]] for end in ends)
        pairs = zip(one, other, strict=True)
        squeezed.append(any(not torch.equal(a[name], b[name]) for a, b in pairs for name in a))
        adjusted.append(report.metrics["mask_changed"] > 0)
        state = report.state
    assert squeezed == adjusted
    assert [number for number, now in enumerate(adjusted) if now] == [1, 3, 5]  # 2, 4, 6 of 9 rounds done


def test_a_dense_network_is_not_squeezed(make_engine):
    """The server has nothing to prune: FedAvg, to the bit."""
    ends = [
        list(engine.rounds(engine.start()))[-1].state.params
        for engine in (
            make_engine("fedmef", federation__rounds=3, sparsity__target=0.0, **schedule("fedmef")),
            make_engine("fedavg", federation__rounds=3, sparsity__target=0.0),
        )
    ]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize("slot", ["local_step", "readjust"])
@pytest.mark.parametrize(
    ("field", "value", "default"), [("period", 5, 10), ("stop", 0.5, 0.6), ("ratio", 0.1, 0.2)]
)
def test_the_squeeze_and_the_adjustment_must_agree(make_resolved, slot, field, value, default):
    """Set in one of the two slots, it is refused with both values; set in both, it holds."""
    ours, theirs = (value, default) if slot == "local_step" else (default, value)
    message = (
        rf"{field}={ours}\b.* in Extrusion, but .*{field}={theirs}\b.* in the slot readjust; set both alike"
    )
    with pytest.raises(ConfigError, match=message):
        make_resolved("fedmef", **{f"method__{slot}__{field}": value})
    both = {f"method__{name}__{field}": value for name in ("local_step", "readjust")}
    method = make_resolved("fedmef", **both).method
    assert getattr(method.local_step, field) == getattr(method.readjust, field) == value


@pytest.mark.parametrize(("base", "swap"), [("fedmef", "readjust=fedtiny"), ("fedtiny", "local_step=fedmef")])
def test_a_swapped_partner_must_agree_too(make_resolved, base, swap):
    """FedTiny's own defaults differ, and it adjusts by blocks, where every layer is squeezed."""
    with pytest.raises(
        ConfigError, match=r"ratio=0.2.* in Extrusion, but .*ratio=0.3.* in the slot readjust"
    ):
        make_resolved(base, [swap])
    alike = {
        f"method__{slot}__{n}": v
        for slot in ("local_step", "readjust")
        for n, v in {"stop": 0.5, "ratio": 0.1}.items()
    }
    with pytest.raises(ConfigError, match=r"blocks=1.* in Extrusion, but .*blocks=5.* in the slot readjust"):
        make_resolved(base, [swap], **alike)
    assert make_resolved(base, [swap], **alike, method__readjust__blocks=1).method.readjust.ratio == 0.1


@pytest.mark.parametrize("readjust", ["rigl", "pffdst", "feddst", "flash"])
def test_other_schedules_need_not_agree(make_resolved, readjust):
    """Their `period` and `ratio` say something else: other rounds, other fractions, another site."""
    assert make_resolved("fedmef", [f"readjust={readjust}"], method__local_step__period=7)


SWAPS = [("fedtiny", "mask_init"), ("fedtiny", "readjust"), ("fedmef", "local_step"), ("fedmef", "readjust")]


@pytest.mark.parametrize("base", ["fedavg", "feddst", "pffdst"])
@pytest.mark.parametrize(("plugin", "slot"), SWAPS)
def test_swap_for_four_rounds(make_engine, base, plugin, slot):
    changes = {} if slot == "mask_init" else {f"method__{slot}__period": 1, f"method__{slot}__stop": 1.0}
    engine = make_engine(base, [f"{slot}={plugin}"], federation__rounds=4, ledger__encode=True, **changes)
    reports = list(engine.rounds(engine.start()))
    assert len(reports) == 4
    assert sum(masks.active(reports[-1].state.mask).values()) <= engine.budget(engine.clock(3)).total
    if slot == "readjust":
        assert [report.metrics["mask_changed"] > 0 for report in reports] == [True, True, True, False]


@pytest.mark.parametrize("base", ["fedtiny", "fedmef"])
@pytest.mark.parametrize("slot", ["local_step", "freeze_policy", "readjust", "aggregate"])
@pytest.mark.parametrize("other", ["feddst", "pffdst"])
def test_other_parts_in_both(make_engine, base, slot, other):
    engine = make_engine(base, [f"{slot}={other}"], federation__rounds=4, ledger__encode=True)
    assert len(list(engine.rounds(engine.start()))) == 4
