"""FedSparsify against its method document: each test names its invariant (section 8) or example (10).

Not here: example 10.6 is SNIP's, a baseline with a plugin of its own, as are the other baselines of appendix
A. Where the code takes supp(w) for the mask of a mean that cancels to exactly 0 (10.4, last sentence of the
third line), ours keeps the weight; its value is asserted. The self-check's counts of Local (section 6)
depend on the authors' data; that they are at or above Global's is asserted.
"""

import math
from itertools import pairwise

import pytest
import torch
from torch import tensor
from torch.utils._pytree import tree_leaves, tree_map

from fedsparse.core import masks, optim
from fedsparse.core.budget import Budget, Layer
from fedsparse.core.errors import ConfigError
from fedsparse.core.resolve import resolve
from fedsparse.core.state import Carry, Clock
from fedsparse.plugins.fedavg import WeightedMean
from fedsparse.plugins.fedsparsify import MajorityVote, PersistentSgd, ProgressivePurge

TRAINABLE = 118_282  # of the net 784-128-128-10
PURGED = [78_867, 50_624, 31_692, 20_208, 14_312, 12_139, 11_829]


def schedule(rounds, final=0.9, **fields):
    """s_0, …, s_T before gate and clipping."""
    part = ProgressivePurge(**fields)
    return [part.scheduled(final, t, rounds) for t in range(rounds + 1)]


def targets(rounds, final=0.9, **fields):
    """The budgets' sparsities of rounds 1..T."""
    part = ProgressivePurge(**fields)
    return [part.target_sparsity(final, Clock(t, rounds)) for t in range(rounds)]


def network(params, sparsity):
    return Budget(tuple(Layer(n, tuple(p.shape)) for n, p in params.items()), "global", sparsity)


def ones(params):
    return {name: torch.ones_like(p, dtype=torch.bool) for name, p in params.items()}


def nothing(params):
    return {name: torch.zeros_like(p, dtype=torch.bool) for name, p in params.items()}


def purge(params, sparsity, mask=None):
    held = ones(params) if mask is None else mask
    return ProgressivePurge().readjust(params, held, nothing(params), network(params, sparsity), {})


def draw(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {f"w{i}": torch.randn(shape, generator=generator) for i, shape in enumerate(shapes)}


def vote(values, weights=None, held=None, **fields):
    """The aggregate of clients that hold what is not 0."""
    part, sums = MajorityVote(**fields), {}
    for k, value in enumerate(values):
        mask = {"w": value != 0 if held is None else held[k]}
        weight = tensor(1.0 if weights is None else float(weights[k]))
        for name, entry in part.contribute({"w": value}, mask, weight).items():
            sums[name] = sums.get(name, 0) + entry
    return part.aggregate(sums, {"w": values[0]}, {"w": torch.ones_like(values[0], dtype=torch.bool)}, {})


def close(value, expected):
    # published with seven digits; float32 sums
    torch.testing.assert_close(value, tensor(expected), atol=1e-6, rtol=0)


EXAMPLE_10_1 = {
    (3, 1): [0, 0.267901, 0.476543, 0.633333, 0.745679, 0.820988, 0.866667, 0.890123, 0.898765, 0.9],
    (3, 3): [-0.334568] * 2 + [0.476543] * 3 + [0.820988] * 3 + [0.898765] * 2,
    (1, 1): [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9],
    (6, 1): [0, 0.456057, 0.700760, 0.820988, 0.873539, 0.893063, 0.898765, 0.899892, 0.899998, 0.9],
}


@pytest.mark.parametrize(("exponent", "frequency"), EXAMPLE_10_1)
def test_example_10_1_schedule(exponent, frequency):
    s = schedule(10, exponent=exponent, frequency=frequency)
    first = {3: -0.334568, 1: -0.1, 6: -0.793509}[exponent]
    assert s == pytest.approx([first, *EXAMPLE_10_1[exponent, frequency]], abs=5e-7)  # six published digits
    gated = [max(x, 0.0) if t > 1 else 0.0 for t, x in enumerate(s)]
    assert targets(10, exponent=exponent, frequency=frequency) == gated[1:]


@pytest.mark.parametrize(
    ("frequency", "left"),
    [
        (1, [100, 74, 53, 37, 26, 18, 14, 11, 11, 10]),
        (3, [100, 100, 53, 53, 53, 18, 18, 18, 11, 11]),
    ],
)
def test_example_10_1_nonzeros_of_100(frequency, left):
    params = draw((10, 10))
    state, mask, found = params, ones(params), []
    part = ProgressivePurge(frequency=frequency)
    for t in range(10):
        budget = network(params, part.target_sparsity(0.9, Clock(t, 10)))
        if part.due(Clock(t, 10), budget):
            state, mask, _ = part.readjust(state, mask, nothing(params), budget, {})
        found.append(int(mask["w0"].sum()))
    assert found == left


def test_example_10_1_long_run():
    s = schedule(200, 0.95)
    expected = [0.014250, 0.056143, 0.123153, 0.246957, 0.543146, 0.829451, 0.934931, 0.950000, 0.95]
    assert [s[t] for t in (2, 5, 10, 20, 50, 100, 150, 199, 200)] == pytest.approx(expected, abs=5e-7)
    s = schedule(200, 0.95, frequency=10)
    assert all(x < 0 for x in s[:10])
    assert s[10:20] == pytest.approx([0.123153] * 10, abs=5e-7)
    assert s[199] == pytest.approx(0.949879, abs=5e-7)


def test_invariant_1_ends_and_monotony():
    for fields in ({}, {"start": 5, "initial": 0.3}, {"exponent": 12.0}, {"frequency": 5, "start": 5}):
        s = schedule(100, **fields)
        assert s[fields.get("start", 1)] == pytest.approx(fields.get("initial", 0.0))
        assert s[100] == pytest.approx(0.9)
        assert all(a <= b for a, b in pairwise(s))
        each = schedule(100, **{**fields, "frequency": 1})
        assert all(a <= b for a, b in zip(s, each, strict=True))
    assert schedule(100, frequency=7)[100] < 0.9


def test_invariant_2_exponent_1_sparsifies_evenly():
    s = schedule(50, 0.8, exponent=1, start=10, initial=0.2)[10:]
    assert [b - a for a, b in pairwise(s)] == pytest.approx([0.6 / 40] * 40)


@pytest.mark.parametrize("plugin_changes", [{}, {"method__readjust__site": "client"}])
def test_invariant_3_dense_until_the_start_and_zero_biases_train(make_engine, watch, plugin_changes):
    """The trap of 3.1: weights that are initialised at 0 must not be frozen there, not even with t_0 = 0."""
    for start in (3, 0):
        engine = make_engine(
            "fedsparsify", federation__rounds=6, method__readjust__start=start, **plugin_changes
        )
        watched, state = watch(engine), engine.start()
        state.params = {
            name: torch.zeros_like(p) if name.endswith("bias") else p for name, p in state.params.items()
        }
        assert all(m.all() for m in state.mask.values())
        changed = []
        for report in engine.rounds(state):
            changed.append(report.metrics["mask_changed"] > 0)
            if report.metrics["round"] == 0 and start:
                assert (report.state.params["fc1.bias"] != 0).any()
        assert changed == [t > start for t in range(1, 7)]
        dense = [mask for round_, _, mask in watched.steps if round_ < max(start, 1)]
        assert all(m.all() for mask in dense for m in mask.values())


def small_fashion(make_engine, **changes):
    """The net of the self-check on a few images of its size: T = 8, K = 4."""
    settings = {
        "task__dataset__train": 40,
        "task__dataset__test": 8,
        "task__dataset__height": 28,
        "task__dataset__width": 28,
        "task__dataset__classes": 10,
        "task__model__hidden": [128, 128],
        "federation__clients": 4,
        "federation__clients_per_round": 4,
        "federation__local_epochs": 1,
        "federation__rounds": 8,
        "federation__momentum": 0.0,
        "sparsity__target": 0.9,
        "output__evaluate_every": 1,
    }
    return make_engine("fedsparsify", **settings, **changes)


@pytest.fixture(scope="module")
def self_check(make_engine):
    engine = small_fashion(make_engine)
    return engine, [engine.start(), *(report.state for report in engine.rounds(engine.start()))]


def nonzeros(state):
    return sum(int(p.count_nonzero()) for p in state.params.values())


def test_invariant_4_the_self_check_sequence(self_check):
    """Section 6: global non-zeros after t = 2..8; mask and support agree."""
    _, states = self_check
    assert [nonzeros(state) for state in states] == [TRAINABLE, TRAINABLE, *PURGED]
    assert [sum(masks.active(state.mask).values()) for state in states[2:]] == PURGED
    assert [TRAINABLE - int(s * TRAINABLE) for s in targets(8)[1:]] == PURGED


def test_invariant_4_of_the_part_alone():
    params = draw((128, 784), (128,), (128, 128), (128,), (10, 128), (10,))
    mask, found = ones(params), []
    for s in targets(8)[1:]:
        params, mask, _ = purge(params, s, mask)
        found.append(sum(int(p.count_nonzero()) for p in params.values()))
    assert found == PURGED
    totals = [network(params, s).total for s in targets(8)[1:]]
    # budgets round where the code truncates, hence the part's promise "none"
    assert all(0 <= kept - total <= 1 for kept, total in zip(PURGED, totals, strict=True))
    assert totals != PURGED


def test_section_6_local_leaves_at_least_as_many(make_engine):
    engine = small_fashion(make_engine, method__readjust__site="client")
    found = [nonzeros(report.state) for report in engine.rounds(engine.start())]
    assert found[0] == TRAINABLE
    assert all(local >= purged for local, purged in zip(found[1:], PURGED, strict=True))
    assert found[1:] != PURGED


def test_example_10_2_purge():
    w = {"a": tensor([[0.5, -0.1, 0], [0.3, -0.7, 0.2]]), "b": tensor([-0.05, 0.4, 0.05, -0.6])}

    def kept(params, s):
        count = network(params, s).weights - int(s * network(params, s).weights)
        found = masks.largest_with_ties(params, ones(params), count)
        moved = purge(params, s)
        for name, m in found.items():
            # the next round's mask is the support: what is 0 leaves it
            assert torch.equal(moved.mask[name], m & (params[name] != 0))
            assert torch.equal(moved.params[name], params[name] * m)
        return [m.int().tolist() for m in found.values()]

    assert kept(w, 0.3) == [[[1, 1, 0], [1, 1, 1]], [0, 1, 0, 1]]
    assert kept(w, 0.55) == [[[1, 0, 0], [1, 1, 0]], [0, 1, 0, 1]]
    assert kept(w, 0.9) == [[[0, 0, 0], [0, 1, 0]], [0, 0, 0, 0]]
    assert kept(w, 0.0001) == [[[1, 1, 1], [1, 1, 1]], [1, 1, 1, 1]]
    for s in (0.25, 0.5, 0.75):
        assert kept({"t": tensor([0.2, 0.2, -0.2, 0.1])}, s) == [[1, 1, 1, 0]]
    zeros = {"z": tensor([0, 0, 0, 0.4])}
    assert [kept(zeros, s) for s in (0.25, 0.5, 0.75)] == [[[1, 1, 1, 1]], [[1, 1, 1, 1]], [[0, 0, 0, 1]]]


def test_invariants_5_11_the_largest_stay_as_they_are():
    params = draw((30, 40), (30,), (7, 30))
    moved = purge(params, 0.7)
    before = torch.cat([p.flatten() for p in params.values()])
    after = torch.cat([p.flatten() for p in moved.params.values()])
    kept = torch.cat([m.flatten() for m in moved.mask.values()])
    assert before[kept].abs().min() >= before[~kept].abs().max()
    assert torch.equal(after[kept], before[kept])
    assert not after[~kept].any()
    assert int(kept.sum()) == 1440 - int(0.7 * 1440)


def test_invariant_6_only_trainable_tensors_are_purged(make_engine):
    """Scales and shifts of normalisation are ranked with the rest; running statistics never are."""
    engine = make_engine(
        "fedsparsify",
        task__model__use="resnet18",
        task__model__hidden=None,
        task__dataset__height=8,
        task__dataset__width=8,
    )
    state, last = engine.start(), engine.clock(23)
    assert {"stem_norm.weight", "stem_norm.bias"} < set(state.mask) == set(state.params)
    buffers = {name: b.clone() for name, b in state.buffers.items()}
    engine.readjust(state, "server:end", engine.budget(last), last)
    assert sum(masks.active(state.mask).values()) < 0.21 * sum(p.numel() for p in state.params.values())
    assert all(torch.equal(buffers[name], b) for name, b in state.buffers.items())


def test_invariant_7_idempotent_and_composable():
    params = draw((30, 40), (30,))
    once = purge(params, 0.5)
    twice = purge(once.params, 0.5, once.mask)
    further, direct = purge(once.params, 0.8, once.mask), purge(params, 0.8)
    for name in params:
        assert torch.equal(once.mask[name], twice.mask[name])
        assert torch.equal(further.params[name], direct.params[name])


@pytest.mark.parametrize("site", ["server:end", "client"])
def test_invariants_8_9_20_support_only_shrinks(make_engine, watch, site):
    engine = make_engine("fedsparsify", federation__rounds=8, method__readjust__site=site)
    watched, state = watch(engine), engine.start()
    states = [state, *(report.state for report in engine.rounds(state))]
    for before, after in pairwise(states):
        assert all(not (after.mask[n] & ~before.mask[n]).any() for n in before.mask)
    for round_, client in watched.uploads:
        sent, held = states[round_].mask, client.mask
        if site == "client":
            assert all(not (held[n] & ~sent[n]).any() for n in sent)
        else:
            assert all(torch.equal(held[n], sent[n]) for n in sent)
        assert all(not client.params[n][~held[n]].any() for n in held)
    for params, mask, client in watched.downloads:
        assert all(torch.equal(params[n] != 0, m) or m.all() for n, m in mask.items())
        assert all(client.mask[n] is m for n, m in mask.items())
    for _, params, mask in watched.steps:
        assert all(not params[n][~m].any() for n, m in mask.items())


class SquaredError:
    """y = w·x against a number, in the place of the engine's loss."""

    def value_and_grad(self, params, carry, batch):
        error = params["w"] @ batch[0] - batch[1]
        return error**2, {"w": 2 * error * batch[0]}, carry


def test_invariant_10_and_example_10_3_masked_momentum():
    part, mask = PersistentSgd(), {"w": tensor([True, False, True])}
    params = masks.apply({"w": torch.ones(3)}, mask)
    carry = Carry({}, part.client_init(params, 0.9, {}))
    for _ in range(2):
        for x, y in (([1.0, 2.0, 3.0], 1.0), ([2.0, 0.0, 1.0], 0.0)):
            batch = (tensor(x), y)
            params, carry, _ = part.local_step(SquaredError(), params, carry, batch, mask, 0.1, 0.9, 0.0)
    close(params["w"], [0.820600, 0, 3.731800])
    assert float(params["w"][1]) == 0.0


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("stacked", [False, True])
def test_nesterov_is_that_of_torch(momentum, weight_decay, stacked):
    """Five steps of fused calls and of vmap; an optimiser without momentum has nothing to look ahead with."""
    params, masked = draw((4, 3), (5,)), {"w0": draw((4, 3), seed=1)["w0"] > 0}
    params = masks.apply(params, masked)
    model = [p.clone().requires_grad_() for p in params.values()]
    reference = torch.optim.SGD(
        model, lr=0.1, momentum=momentum, weight_decay=weight_decay, nesterov=momentum > 0
    )
    state = {"momentum": optim.zeros(params)} if momentum else {}

    def step(params, grads, state):
        return optim.sgd(params, grads, state, masked, 0.1, momentum, weight_decay, nesterov=True)

    if stacked:
        step = torch.func.vmap(step)
        params, state = tree_map(lambda p: p[None], (params, state))
    for seed in range(5):
        grads = draw((4, 3), (5,), seed=9 + seed)
        for p, g in zip(model, masks.apply(grads, masked).values(), strict=True):
            p.grad = g
        reference.step()
        given = tree_map(lambda p: p[None], grads) if stacked else grads
        before = tree_map(torch.clone, (params, given, state))
        moved, after = step(params, given, state)
        for old, new in zip(tree_leaves(before), tree_leaves((params, given, state)), strict=True):
            assert torch.equal(old, new)  # nothing that was given is written into
        params, state = moved, after
        for p, name in zip(model, params, strict=True):
            torch.testing.assert_close(params[name].view_as(p), p.detach())
    assert not params["w0"].view(4, 3)[~masked["w0"]].any()


def test_nesterov_of_a_client(make_engine, watch):
    """Its whole federated run is torch's, momentum kept from round to round."""
    settings = {
        "federation__rounds": 2,
        "federation__clients": 1,
        "federation__clients_per_round": 1,
        "method__readjust__start": 1,
    }
    ends = []
    for nesterov in (True, False):
        engine = make_engine("fedsparsify", **settings, method__local_step__nesterov=nesterov)
        watched, state = watch(engine), engine.start()
        for _ in engine.rounds(state):
            pass
        federation, model = engine.config.federation, [p.clone() for p in engine.params.values()]
        reference = torch.optim.SGD(
            [p.requires_grad_() for p in model],
            lr=federation.learning_rate,
            momentum=federation.momentum,
            weight_decay=federation.weight_decay,
            nesterov=nesterov,
        )
        for number in range(2):
            for epoch in range(federation.local_epochs):
                for batch in engine.task.batches(0, number, epoch):
                    named = dict(zip(engine.params, model, strict=True))
                    engine.loss.plain(named, engine.buffers, batch)[0].backward()
                    reference.step()
                    reference.zero_grad()
        for p, uploaded in zip(model, watched.uploads[-1][1].params.values(), strict=True):
            torch.testing.assert_close(uploaded, p.detach(), rtol=1e-4, atol=1e-6)  # steps of float32
        ends.append(watched.uploads[-1][1].params)
    assert not torch.allclose(ends[0]["fc1.weight"], ends[1]["fc1.weight"], rtol=1e-3)


def test_the_papers_vgg_16_uses_nesterov():
    """Method document, section 4; the other settings, plain SGD and plain momentum."""
    used = {
        name: resolve(configs=[f"papers/fedsparsify-{name}"]).config
        for name in ("cifar10", "cifar100", "fashion-mnist")
    }
    assert {name: config.method.local_step.nesterov for name, config in used.items()} == {
        "cifar10": False,
        "cifar100": True,
        "fashion-mnist": False,
    }
    federation = used["cifar100"].federation
    assert (federation.learning_rate, federation.momentum, federation.weight_decay) == (0.01, 0.9, 0.0)


THREE = [tensor([0.6, 0, 0.9, 0, -0.3]), tensor([0.3, 0.2, 0, 0, 0.6]), tensor([0.3, 0, 0, 0, 0])]
FOUR = [*THREE, tensor([0, 0.4, 0, 0, 0.3])]
FIVE = [*FOUR, tensor([0, 0, 0.5, 0.7, 0])]


def test_example_10_4_voting():
    mean = [0.4, 0.0666667, 0.3, 0, 0.1]
    close(vote(THREE, variant="released").params["w"], mean)
    voted = vote(THREE)
    close(voted.params["w"], [0.4, 0, 0, 0, 0.1])
    assert voted.mask["w"].int().tolist() == [1, 0, 0, 0, 1]
    close(vote(THREE, (2, 1, 1), variant="released").params["w"], [0.45, 0.05, 0.45, 0, 0])
    for variant in ("paper", "released"):
        close(vote(FOUR, variant=variant).params["w"], [0.3, 0.15, 0, 0, 0.15])
    close(vote(FIVE, variant="released").params["w"], [0.24, 0.12, 0.28, 0, 0.12])
    close(vote(FIVE).params["w"], [0.24, 0, 0, 0, 0.12])
    rows = ("11010", "10010", "11100", "00000")
    held = [tensor([digit == "1" for digit in row]) for row in rows]
    assert vote([m.float() for m in held]).mask["w"].int().tolist() == [1, 1, 0, 1, 0]


def test_example_10_4_released_threshold():
    """floor(n/2) for n = 1..11; where that is no vote at all, what nobody holds is 0 anyway."""
    found = []
    for n in range(1, 12):
        kept = [
            vote([tensor([float(k < c), 1.0]) for k in range(n)], variant="released").mask["w"][0]
            for c in range(n + 1)
        ]
        found.append(kept.index(True))
    assert found == [max(threshold, 1) for threshold in (0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5)]


CLIENTS = [
    tensor([0.9, -0.2, 0.4, 0.05, -0.6, 0.1]),
    tensor([0.7, -0.4, 0, 0.15, -0.4, 0.3]),
    tensor([0.8, 0, 0.2, 0.10, -0.5, -0.1]),
]


@pytest.mark.parametrize(
    ("sparsity", "by_server", "held", "by_vote", "released"),
    [
        (
            0.633333,
            [0.825, 0, 0.25, 0, -0.525, 0],
            ["101010", "110010", "101010"],
            [0.825, 0, 0.25, 0, -0.525, 0],
            [0.825, -0.1, 0.25, 0, -0.525, 0],
        ),
        (
            0.476543,
            [0.825, -0.2, 0.25, 0, -0.525, 0],
            ["111010", "110011", "101111"],
            [0.825, -0.2, 0.25, 0, -0.525, 0.05],
            [0.825, -0.2, 0.25, 0.025, -0.525, 0.05],
        ),
    ],
)
def test_example_10_5_global_and_local(sparsity, by_server, held, by_vote, released):
    average = vote(CLIENTS, (2, 1, 1), held=[torch.ones(6, dtype=torch.bool)] * 3).params
    close(average["w"], [0.825, -0.2, 0.25, 0.0875, -0.525, 0.1])
    close(purge(average, sparsity).params["w"], by_server)
    purged = [purge({"w": w}, sparsity) for w in CLIENTS]
    assert ["".join(map(str, p.mask["w"].int().tolist())) for p in purged] == held
    values = [p.params["w"] for p in purged]
    close(vote(values, (2, 1, 1)).params["w"], by_vote)
    close(vote(values, (2, 1, 1), variant="released").params["w"], released)


def test_invariant_12_only_votes_decide():
    kept = vote(FIVE).mask["w"]
    held = [w != 0 for w in FIVE]
    assert torch.equal(vote(FIVE, (9, 1, 4, 2, 30)).mask["w"], kept)
    assert torch.equal(vote([1e-9 * w for w in FIVE], held=held).mask["w"], kept)


@pytest.mark.parametrize("n", [2, 4, 8, 10])
@pytest.mark.parametrize("variant", ["paper", "released"])
def test_invariant_13_half_of_an_even_number_survives(n, variant):
    values = [tensor([float(k < n // 2), float(k < n // 2 - 1)]) for k in range(n)]
    assert vote(values, variant=variant).mask["w"].tolist() == [True, False]


def test_invariant_14_unanimous_masks_give_fedavg_of_the_pruned_models():
    first = purge(draw((20, 30)), 0.8).mask["w0"]
    values = [draw((20, 30), seed=k)["w0"] * first for k in range(3)]
    voted = vote(values, (1, 2, 3), held=[first] * 3)
    assert torch.equal(voted.mask["w"], first)
    sums = {}
    for k, value in enumerate(values):
        for name, entry in (
            WeightedMean().contribute({"w": value}, {"w": first}, tensor(k + 1.0), moved=True).items()
        ):
            sums[name] = sums.get(name, 0) + entry
    budget = Budget((Layer("w", (20, 30)),), "global", 0.0)
    mean = WeightedMean().aggregate(sums, {"w": value}, {"w": first}, nothing({"w": value}), budget, {})
    assert torch.equal(voted.params["w"], mean.params["w"])
    assert int(voted.mask["w"].sum()) == 600 - int(0.8 * 600)


@pytest.mark.parametrize("n", [2, 3, 4, 7, 10])
@pytest.mark.parametrize("variant", ["paper", "released"])
def test_invariants_15_16_counts_and_values_of_a_vote(n, variant):
    values = [purge(draw((40, 25), seed=k), 0.6).params["w0"] for k in range(n)]
    weights = tensor([float(1 + k % 3) for k in range(n)])
    voted = vote(values, weights, variant=variant)
    threshold = math.ceil(n / 2) if variant == "paper" else max(n // 2, 1)
    stacked = torch.stack(values)
    votes = int((stacked != 0).sum())
    left = int(voted.mask["w"].sum())
    assert (votes - (threshold - 1) * 1000) / (n - threshold + 1) <= left <= votes / threshold
    share = weights[:, None, None]
    counted = (share * stacked).sum(0)
    # the engine's order of summing: float32 rounding
    torch.testing.assert_close(voted.params["w"], voted.mask["w"] * counted / weights.sum())
    among_holders = counted / (share * (stacked != 0)).sum(0).clamp(min=1)
    assert (voted.params["w"].abs() <= among_holders.abs() + 1e-6)[voted.mask["w"]].all()


def test_invariant_17_identity_order_and_scale():
    model = purge(draw((20, 30)), 0.5).params["w0"]
    torch.testing.assert_close(vote([model] * 4, (1, 2, 3, 5)).params["w"], model)
    # float32 sums in another order
    forward, backward = vote(FIVE, (1, 2, 3, 4, 5)), vote(FIVE[::-1], (5, 4, 3, 2, 1))
    scaled = vote(FIVE, (7, 14, 21, 28, 35))
    for other in (backward, scaled):
        torch.testing.assert_close(forward.params["w"], other.params["w"])
        assert torch.equal(forward.mask["w"], other.mask["w"])


def test_invariant_18_one_shot(make_engine):
    engine = make_engine(
        "fedsparsify",
        federation__rounds=7,
        sparsity__target=0.8,
        method__readjust__initial=0.8,
        method__readjust__start=3,
    )
    reports = list(engine.rounds(engine.start()))
    total = sum(layer.weights for layer in engine.task.layers)
    active = [sum(masks.active(report.state.mask).values()) for report in reports]
    assert active == [total] * 3 + [total - int(0.8 * total)] * 4
    assert [report.metrics["mask_changed"] > 0 for report in reports] == [t == 4 for t in range(1, 8)]


def test_invariant_19_one_client_a_round(make_engine):
    ends = []
    for site in ("server:end", "client"):
        engine = make_engine(
            "fedsparsify",
            federation__rounds=6,
            federation__clients_per_round=1,
            method__readjust__site=site,
        )
        ends.append(list(engine.rounds(engine.start()))[-1].state)
    for name, value in ends[0].params.items():
        assert torch.equal(ends[0].mask[name], ends[1].mask[name])
        # w·p/p rounds before the purge in one case and after it in the other, six rounds long
        torch.testing.assert_close(value, ends[1].params[name], rtol=1e-4, atol=1e-6)


def test_invariant_21_momentum_persists_if_it_is_kept(make_engine, watch):
    for keep in (True, False):
        engine = make_engine(
            "fedsparsify",
            federation__rounds=2,
            federation__clients=2,
            federation__clients_per_round=2,
            method__local_step__keep_momentum=keep,
        )
        watched, state = watch(engine), engine.start()
        for _ in engine.rounds(state):
            pass
        ended = {client.number: client.carry.state["momentum"] for _, client in watched.uploads[:2]}
        for _, _, client in watched.downloads[2:]:
            begun = client.carry.state["momentum"]
            assert all(torch.equal(v, ended[client.number][n] * keep) for n, v in begun.items())
        assert all(any(v.any() for v in momentum.values()) for momentum in ended.values())


def test_plain_sgd_keeps_nothing_on_the_host(make_engine):
    engine = make_engine("fedsparsify", federation__rounds=2, federation__momentum=0.0)
    assert not any(row for row in list(engine.rounds(engine.start()))[-1].state.rows.values())


@pytest.mark.parametrize(
    ("path", "value"),
    [("method.readjust.frequency", 0), ("sparsity.target", 1.0), ("method.readjust.exponent", 0)],
)
def test_invariant_22_settings_out_of_range(path, value):
    with pytest.raises(ConfigError, match=path):
        resolve("fedsparsify", sets=[f"{path}={value}"])


def test_invariant_22_settings_that_do_not_fit_the_run(make_engine):
    for start in (4, 5):
        engine = make_engine("fedsparsify", federation__rounds=4, method__readjust__start=start)
        with pytest.raises(ConfigError, match=r"method.readjust.start: given \d, but federation.rounds is 4"):
            engine.start()
    engine = make_engine("fedsparsify", federation__rounds=8, method__readjust__frequency=9)
    with pytest.raises(ConfigError, match=r"method.readjust.frequency: given 9, so that no step comes"):
        engine.start()
    engine = make_engine("fedsparsify", sparsity__target=0.5, method__readjust__initial=0.6)
    with pytest.raises(ConfigError, match=r"method.readjust.initial: given 0.6, above .* 0.5 \(sparsity.tar"):
        engine.start()


def test_invariant_23_parameters_exchanged(make_engine):
    """Down and up, 4 bytes each, at the support of the round's download."""
    engine = make_engine("fedsparsify", federation__rounds=8)
    states = [engine.start()]
    reports = list(engine.rounds(states[0]))
    states += [report.state for report in reports[:-1]]
    exchanged = 2 * 3 * sum(sum(masks.active(state.mask).values()) for state in states)
    assert reports[-1].metrics["paper_bytes_total"] == 4 * exchanged


def test_section_5_1_savings_of_the_schedule():
    def ratio(rounds, final, total, **fields):
        kept = [total - int(s * total) for s in targets(rounds, final, **fields)]
        return rounds * total / (total + sum(kept[:-1]))

    finals = (0.8, 0.85, 0.9, 0.95, 0.99)
    found = [ratio(200, s, TRAINABLE) for s in finals]
    assert found == pytest.approx([2.469, 2.719, 3.024, 3.408, 3.792], abs=5e-4)  # three published digits
    for total in (1_609_930, 14_774_436):
        found = [ratio(100, s, total) for s in finals]
        assert found == pytest.approx([2.439, 2.680, 2.974, 3.340, 3.705], abs=5e-4)
    found = [ratio(200, 0.95, TRAINABLE, frequency=f) for f in (1, 2, 5, 10, 20)]
    assert found == pytest.approx([3.408, 3.381, 3.301, 3.174, 2.939], abs=5e-4)
    found = [ratio(200, 0.95, TRAINABLE, exponent=e) for e in (1, 3, 6, 12)]
    assert found == pytest.approx([1.888, 3.408, 5.204, 7.700], abs=5e-4)


def test_invariant_24_the_last_purge_is_evaluated_untuned(self_check):
    from torch.func import functional_call

    engine, states = self_check
    reports = list(engine.rounds(states[7]))
    (report,) = reports
    assert nonzeros(report.state) == PURGED[-1]
    engine.task.model.eval()
    x, y = next(engine.task.test_batches())
    hits = (functional_call(engine.task.model, report.state.params, (x,)).argmax(1) == y).double().mean()
    assert report.metrics["test_accuracy"] == float(hits)


def test_a_client_purges_under_vmap_as_alone():
    """Ties, zeros and masks of their own; with and without a count a layer."""
    part = ProgressivePurge(site="client")
    stacked = {n: torch.stack([draw((6, 5), (6,), seed=k)[n] for k in range(3)]) for n in ("w0", "w1")}
    stacked = {n: (4 * p).round() / 4 for n, p in stacked.items()}
    held = {n: torch.stack([draw((6, 5), (6,), seed=9 + k)[n] > -1 for k in range(3)]) for n in stacked}
    stacked = {n: p * held[n] for n, p in stacked.items()}
    frozen = {n: torch.zeros_like(m[0]) for n, m in held.items()}
    for allocation in ("global", "uniform"):
        budget = Budget((Layer("w0", (6, 5)), Layer("w1", (6,))), allocation, 0.55)

        def client(params, mask, budget=budget):
            return part.readjust(params, mask, frozen, budget, {})[:2]

        params, kept = torch.func.vmap(client)(stacked, held)
        for k in range(3):
            alone = client({n: p[k] for n, p in stacked.items()}, {n: m[k] for n, m in held.items()})
            for name in stacked:
                assert torch.equal(params[name][k], alone[0][name])
                assert torch.equal(kept[name][k], alone[1][name])


def test_frozen_weights_stay_however_small():
    """In a swap with a freeze policy: also those that are 0, and more than the count."""
    params = {"w": tensor([0.5, 0.0, 0.01, -0.4, 0.3])}
    frozen = {"w": tensor([False, True, True, False, False])}
    for sparsity, kept in ((0.5, [1, 1, 1, 0, 0]), (0.9, [0, 1, 1, 0, 0])):
        moved = ProgressivePurge().readjust(params, ones(params), frozen, network(params, sparsity), {})
        assert moved.mask["w"].int().tolist() == kept


def test_other_allocations_give_each_layer_its_own_budget(make_engine):
    engine = make_engine(
        "fedsparsify", federation__rounds=4, sparsity__allocation="erk", sparsity__prunable="weights"
    )
    last = list(engine.rounds(engine.start()))[-1].state
    assert masks.active(last.mask) == dict(engine.budget(engine.clock(3)).counts)


def test_presets_choose_the_variants():
    made = resolve("fedsparsify")
    assert made.config.method.readjust.site == "server:end"
    assert made.config.sparsity.prunable == ("all",)
    assert made.config.sparsity.allocation == "global"
    local = resolve(configs=["fedsparsify-local"])
    assert local.config.method.readjust.site == "client"
    assert isinstance(local.config.method.aggregate, MajorityVote)
    assert local.config.sparsity == made.config.sparsity
    assert not local.dropped
