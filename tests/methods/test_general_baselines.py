"""FedProx, FedAvgM, FedAdam, SCAFFOLD, FedDyn: their papers' equations, and what they keep under a mask."""

import pytest
import torch

from fedsparse.core import masks, optim
from fedsparse.core.budget import Budget, Layer
from fedsparse.core.ledger import HEADER
from fedsparse.core.loss import ClientLoss
from fedsparse.core.masks import movable
from fedsparse.core.state import Batch, Carry
from fedsparse.plugins.fedadam import AdaptiveServer
from fedsparse.plugins.fedavg import MaskedSgd, WeightedMean
from fedsparse.plugins.fedavgm import ServerMomentum
from fedsparse.plugins.feddyn import DynamicMean, DynamicSgd
from fedsparse.plugins.fedprox import ProximalSgd
from fedsparse.plugins.scaffold import ControlledMean, ControlledSgd

PAIR = Budget((Layer("w", (2,)),), "uniform", 0.0)
BOTH, NEITHER = {"w": torch.tensor([True, True])}, {"w": torch.tensor([False, False])}
SERVERS = ["fedavgm", "fedadam", "scaffold", "feddyn"]


def pair(*values):
    return {"w": torch.tensor(values, dtype=torch.float64)}


def play(engine):
    return list(engine.rounds(engine.start()))


def same(first, second):
    return all(torch.equal(value, second[name]) for name, value in first.items())


# --- two parameters: every equation by hand ---


class Quadratic:
    """The loss a/2·(w - b)² of one client, a and b a parameter."""

    def __init__(self, a, b):
        self.a, self.b = pair(*a)["w"], pair(*b)["w"]

    def value_and_grad(self, params, carry, batch):
        gap = params["w"] - self.b
        return (self.a * gap.square()).sum() / 2, {"w": self.a * gap}, carry


def federate(local, server, losses, rounds, steps, lr=0.1, cohorts=None, weights=None, momentum=0.0):
    """The engine's round around the two parts on clients with quadratic losses; what was left at the end."""
    params, memory, rows, sent = pair(0.0, 0.0), {}, {}, []
    for round_ in range(rounds):
        sums = {}
        for k in cohorts[round_] if cohorts else range(len(losses)):
            offered = {"params": params, "mask": BOTH, "momentum": momentum, "memory": rows.get(k, {})}
            offered["broadcast"] = memory.get("broadcast", {})
            carry = Carry({}, call(local.client_init, **offered))
            moved = params
            for _ in range(steps[k] if isinstance(steps, list) else steps):
                moved, carry, _ = local.local_step(losses[k], moved, carry, None, {}, lr, momentum, 0.0)
            weight = torch.tensor(weights[k] if weights else 1.0, dtype=torch.float64)
            offered = {"params": moved, "mask": BOTH, "anchor": params, "weight": weight}
            offered |= {"carry": carry, "moved": True}
            for name, value in call(server.contribute, **offered).items():
                sums[name] = sums.get(name, 0) + value
            if hasattr(local, "client_final"):
                rows[k] = call(local.client_final, carry=carry, memory=rows.get(k, {}))
            sent.append(moved["w"])
        total = sum(weights) if weights else len(losses)
        params, _, memory = aggregate(server, sums, params, BOTH, NEITHER, PAIR, total, memory)
    return params["w"], memory, rows, sent


def aggregate(part, sums, params, mask, frozen, budget, pool_samples, memory):
    offered = {"sums": sums, "params": params, "mask": mask, "frozen": frozen, "budget": budget}
    return call(part.aggregate, **offered, pool_samples=pool_samples, memory=memory)


def call(hook, **offered):
    names = hook.__code__.co_varnames[1 : hook.__code__.co_argcount]
    return hook(**{name: offered[name] for name in names})


def server_moves(part, means):
    """The server's models after uploads whose mean is given, from (1, 0)."""
    params, memory, models = pair(1.0, 0.0), {}, []
    for mean in means:
        sums = part.contribute(pair(*mean), BOTH, torch.tensor(3.0, dtype=torch.float64), moved=True)
        params, _, memory = aggregate(part, sums, params, BOTH, NEITHER, PAIR, 3, memory)
        models.append(params["w"].tolist())
    return models, memory


def test_fedprox_penalty_by_hand():
    """μ/2·‖w - w_t‖² = 0.25·(1 + 4)."""
    assert float(ProximalSgd(mu=0.5).penalty(pair(1.0, 2.0), pair(0.0, 4.0))) == pytest.approx(1.25)


def test_fedavgm_by_hand():
    """v = (-0.4, 0.2), then 0.5·v + (-0.1, 0.1) = (-0.3, 0.2)."""
    models, memory = server_moves(ServerMomentum(beta=0.5), [(0.6, 0.2), (0.5, 0.3)])
    assert models[0] == pytest.approx([0.6, 0.2])
    assert models[1] == pytest.approx([0.3, 0.4])
    assert memory["velocity"]["w"].tolist() == pytest.approx([-0.3, 0.2])


@pytest.mark.parametrize(
    ("rule", "first", "second"),
    [
        ("adam", (0.980699, 0.009926), (0.958494, 0.023824)),
        ("yogi", (0.980742, 0.009902), (0.958545, 0.023798)),
        ("adagrad", (0.992192, 0.00618), (0.983418, 0.014297)),
    ],
)
def test_fedadam_by_hand(rule, first, second):
    """Algorithm 2 with η = τ = 0.1, β₁ = 0.9, β₂ = 0.99, v from τ²; Δ = (-0.4, 0.2), then (-0.1, 0.1)."""
    part = AdaptiveServer(rule=rule, rate=0.1, tau=0.1)
    means = [(0.6, 0.2), (first[0] - 0.1, first[1] + 0.1)]
    models, memory = server_moves(part, means)
    assert models[0] == pytest.approx(first, abs=1e-6)  # six digits were worked out
    assert models[1] == pytest.approx(second, abs=2e-6)
    assert memory["first"]["w"].tolist() == pytest.approx([-0.046, 0.028], abs=1e-6)


def test_scaffold_by_hand():
    """Two clients, two steps of η = 0.1 on (w - b)²/2: option II's equations, round by round."""
    losses = [Quadratic((1, 1), (1, 0)), Quadratic((1, 1), (0, 2))]
    w, memory, rows, sent = federate(ControlledSgd(), ControlledMean(), losses, 1, 2)
    assert sent[0].tolist() == pytest.approx([0.19, 0])  # no correction yet
    assert w.tolist() == pytest.approx([0.095, 0.19])
    # c_i = (x - y_i)/(Kη)
    assert rows[0]["control"]["w"].tolist() == pytest.approx([-0.95, 0])
    assert rows[1]["control"]["w"].tolist() == pytest.approx([0, -1.9])
    assert memory["broadcast"]["control/w"].tolist() == pytest.approx([-0.475, -0.95])
    again, _, later, sent = federate(ControlledSgd(), ControlledMean(), losses, 2, 2)
    # client 0, first parameter: g = -0.905, -c_i + c = +0.475; then g = -0.862
    assert sent[2][0].item() == pytest.approx(0.095 + 0.1 * (0.905 - 0.475) + 0.1 * (0.862 - 0.475))
    quotient = rows[0]["control"]["w"] - memory["broadcast"]["control/w"] + (w - sent[2]) / 0.2
    torch.testing.assert_close(later[0]["control"]["w"], quotient)
    assert again.tolist() == pytest.approx(((sent[2] + sent[3]) / 2).tolist())


def test_scaffold_reaches_the_optimum_that_fedavg_drifts_from():
    """Curvatures 1 and 10: FedAvg's fixed point is that of the clients' contracted steps."""
    losses = [Quadratic((1, 4), (1, 0)), Quadratic((10, 1), (-1, 1))]
    optimum = torch.tensor([-9 / 11, 1 / 5], dtype=torch.float64)  # Σ a·b/Σ a
    drifted = federate(MaskedSgd(), WeightedMean(), losses, 300, 10, lr=0.05)[0]
    reached, memory, rows, _ = federate(ControlledSgd(), ControlledMean(), losses, 300, 10, lr=0.05)
    assert (drifted - optimum).abs().max() > 0.1
    torch.testing.assert_close(reached, optimum)
    # at the optimum each c_i is the client's gradient there, and c, their mean, is 0
    torch.testing.assert_close(rows[0]["control"]["w"], losses[0].a * (optimum - losses[0].b))
    assert memory["broadcast"]["control/w"].abs().max() < 1e-6


def test_scaffold_and_feddyn_minimise_fedavgs_objective_and_with_momentum_too():
    """Clients of unequal size, one after another, with steps in proportion: the sample-weighted optimum."""
    losses, sizes = [Quadratic((1, 2), (3, 0)), Quadratic((4, 1), (0, 2))], [10.0, 30.0]
    optimum = torch.tensor([30 / 130, 60 / 50], dtype=torch.float64)
    for local, server in ((ControlledSgd(), ControlledMean()), (DynamicSgd(alpha=1.0), DynamicMean())):
        for momentum in (0.0, 0.5):
            w, *_ = federate(local, server, losses, 150, [3, 9], lr=0.05, weights=sizes, momentum=momentum)
            torch.testing.assert_close(w, optimum, atol=1e-5, rtol=0)  # linear convergence, cut off


def test_feddyn_by_hand():
    """One exact client of curvature 1 and one of 0: λ, h and the server's model after two rounds."""
    losses = [Quadratic((1, 1), (1, 2)), Quadratic((0, 0), (0, 0))]
    many = 2000  # steps, so that θ_k is the minimiser of the regularised loss
    w, memory, rows, sent = federate(DynamicSgd(alpha=0.5), DynamicMean(), losses, 1, many)
    # θ_0 = b/(1 + α), λ_0 = -α·θ_0 = its gradient there; -h/α = θ_0/2; θ = θ_0/2 + θ_0/2
    assert sent[0].tolist() == pytest.approx([2 / 3, 4 / 3])
    assert rows[0]["dual"]["w"].tolist() == pytest.approx([-1 / 3, -2 / 3])
    assert rows[1]["dual"]["w"].tolist() == [0, 0]
    assert w.tolist() == pytest.approx([2 / 3, 4 / 3])
    w, memory, rows, sent = federate(DynamicSgd(alpha=0.5), DynamicMean(), losses, 2, many)
    # θ_0 - b - λ_0 + α(θ_0 - w) = 0: 1.5·θ_0 = 1 - 1/3 + 1/3
    assert sent[2].tolist() == pytest.approx([2 / 3, 4 / 3])
    assert memory["drift"]["w"].tolist() == pytest.approx([2 / 3, 4 / 3])  # m·(-h/α)
    assert w.tolist() == pytest.approx([1, 2])  # (2/3 + 2/3)/2 + 1/3


def test_means_over_the_pool_under_partial_participation():
    """c = Σ c_i / N and h = Σ λ_k / m over the whole pool; a client that never took part counts as 0."""
    losses = [Quadratic((1, 2), (b, -b)) for b in (1, 2, 3, 4)]
    cohorts, divisor = [[0, 1], [1, 2]], 4
    _, memory, rows, _ = federate(ControlledSgd(), ControlledMean(), losses, 2, 3, cohorts=cohorts)
    total = sum(row["control"]["w"] for row in rows.values())
    torch.testing.assert_close(memory["broadcast"]["control/w"], total / divisor)
    part = DynamicMean()
    w, memory, rows, sent = federate(DynamicSgd(alpha=0.2), part, losses, 2, 3, cohorts=cohorts)
    h = sum(row["dual"]["w"] for row in rows.values()) / divisor
    torch.testing.assert_close(w, (sent[2] + sent[3]) / 2 - h / 0.2)


# --- what they are without their own term ---


@pytest.mark.parametrize(
    ("plugin", "changes"),
    [
        ("fedprox", {"method__local_step__mu": 0.0}),
        ("fedavgm", {"method__aggregate__beta": 0.0}),
        ("scaffold", {"method__aggregate__use": "fedavg"}),
        ("scaffold", {"method__local_step__use": "fedavg"}),
        ("feddyn", {"method__local_step__use": "fedavg"}),
    ],
)
def test_without_its_term_it_is_fedavg_to_the_bit(make_engine, plugin, changes):
    """μ = 0; β = 0; control variates and λ without the other half of the method."""
    fedavg = play(make_engine("fedavg", federation__rounds=4, federation__weight_decay=0.0))
    own = play(make_engine(plugin, federation__rounds=4, federation__weight_decay=0.0, **changes))
    assert same(own[-1].state.params, fedavg[-1].state.params)


def test_scaffold_with_empty_control_variates_is_fedavg(make_engine):
    ends = [play(make_engine(name, federation__rounds=1))[0].state.params for name in ("scaffold", "fedavg")]
    for name, value in ends[0].items():  # weight decay is added in another order: a rounding a step
        torch.testing.assert_close(value, ends[1][name])


def test_feddyn_clients_at_small_alpha_are_fedavgs(make_engine, watch):
    """The server is not: in -h/α, α cancels. The first model is mean + (cohort / pool)·(mean - download)."""
    engines = [
        make_engine("feddyn", federation__rounds=1, method__local_step__alpha=1e-9),
        make_engine("fedavg", federation__rounds=1),
    ]
    watched = [watch(engine) for engine in engines]
    dyn, avg = (play(engine)[0].state.params for engine in engines)
    for (_, own), (_, plain) in zip(*(w.uploads for w in watched), strict=True):
        for name, value in own.params.items():
            torch.testing.assert_close(value, plain.params[name])  # α·Δ is below float32's rounding
    start = engines[1].start().params
    cohort = sum(len(engines[0].task.partition.train_of(client.number)) for _, client in watched[0].uploads)
    share = cohort / len(engines[0].task.partition.train_indices)
    assert share == 0.5
    for name, value in dyn.items():
        # a difference of weights of size 1 in float32
        torch.testing.assert_close(value, avg[name] + share * (avg[name] - start[name]), atol=1e-6, rtol=1e-5)


# --- FedProx in a network, and in a swap ---


def test_the_proximal_gradient_acts(make_engine):
    """FedDST document 9.4: in the released code the gradient at μ_p = 1 is bitwise that at 0."""
    engine = make_engine("fedprox", method__local_step__mu=0.5)
    plain, start = make_engine("fedavg"), engine.start()
    moved = {name: p + 0.1 for name, p in start.params.items()}
    batch, carry = engine.task.batches(0, 0, 0)[0], Carry({}, {})
    grads = [
        ClientLoss(e.loss, start.mask, start.params).value_and_grad(moved, carry, batch)[1]
        for e in (engine, plain)
    ]
    for name, value in grads[0].items():  # 0.1 is a difference of float32 weights
        torch.testing.assert_close(value - grads[1][name], torch.full_like(value, 0.05), atol=1e-6, rtol=1e-5)


def test_a_larger_mu_keeps_clients_nearer(make_engine, watch):
    distances = []
    for mu in (0.0, 1.0, 10.0):
        engine = make_engine("fedprox", federation__rounds=1, method__local_step__mu=mu)
        watched = watch(engine)
        play(engine)
        anchor = watched.downloads[0][0]
        client = watched.uploads[0][1]
        distances.append(sum(float((client.params[n] - anchor[n]).square().sum()) for n in anchor))
    assert distances[0] > 1.2 * distances[1] > 1.2 * 1.2 * distances[2]


def test_feddst_with_fedprox_is_a_swap_and_growth_ignores_the_term(make_engine):
    engine = make_engine("feddst", ["local_step=fedprox"], federation__rounds=4)
    assert engine.hooks.has_extra("penalty")
    plain, start = make_engine("feddst", federation__rounds=4), engine.start()
    moved = {name: p + 0.1 for name, p in start.params.items()}
    batches = engine.task.batches(0, 0, 0)[:1]
    scores = [
        ClientLoss(e.loss, start.mask, start.params).dense_grad(moved, Carry({}, {}), batches)
        for e in (engine, plain)
    ]
    assert same(*scores)
    assert not same(play(engine)[-1].state.params, play(plain)[-1].state.params)


# --- under masks that move and weights that freeze ---

MOVING = {
    "federation__rounds": 12,
    "sparsity__target": 0.8,
    "federation__learning_rate": 0.02,
    "method__readjust__period": 1,
    "method__readjust__annealing": "constant",
    "method__readjust__ratio": 0.2,
}


def named(tree):
    """Tensors of a nested memory by parameter name, from every dict that holds them."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from named(value)
        elif "." in name:
            yield name.rpartition("/")[2], value


@pytest.mark.parametrize("plugin", ["fedprox", *SERVERS])
def test_moving_masks_and_freezing_are_kept(make_engine, watch, plugin):
    """Zero off the mask, no revival, the budget, frozen weights to the bit; memory where weights can move.

    FedDyn's rests where they are frozen; SCAFFOLD's rests wherever it is not used.
    """
    engine = make_engine(plugin, ["readjust=feddst", "freeze_policy=pffdst"], **MOVING)
    watched, moved, held = watch(engine), 0, None
    for report in engine.rounds(engine.start()):
        state, round_ = report.state, report.metrics["round"]
        moved += report.metrics["mask_changed"]
        uploaded = [client for at, client in watched.uploads if at == round_]
        assert sum(masks.active(state.mask).values()) <= engine.budget(engine.clock(round_)).total
        for name, mask in state.mask.items():
            assert not state.params[name][~mask].any()
            assert not (mask & ~torch.stack([c.mask[name] for c in uploaded]).any(0)).any()
        memory = state.memory.get("aggregate", {})
        if plugin == "scaffold":
            for client in uploaded:
                kept = client.carry.state
                assert all(not kept["correction"][name][~m].any() for name, m in client.mask.items())
                assert all(not kept["steps"][name][~free].any() for name, free in client.trainable.items())
        else:
            free = state.mask if plugin == "feddyn" else movable(state.mask, state.frozen)
            assert all(not value[~free[name]].any() for name, value in named(memory) if name in free)
        if any(m.any() for m in state.frozen.values()):
            held = held or state.params
            assert all(torch.equal(held[n][m], state.params[n][m]) for n, m in state.frozen.items())
    assert held is not None
    assert moved > 0
    assert plugin == "fedprox" or any(value.any() for _, value in named(memory))


@pytest.mark.parametrize("part", [ServerMomentum(), AdaptiveServer(), DynamicMean()])
def test_server_optimisers_at_weights_that_come_go_or_are_frozen(part):
    """Grown: the mean's value and no memory; pruned: 0 and none; frozen: FedDyn's rests; else the rule."""
    budget = Budget((Layer("w", (4,)),), "uniform", 0.25)
    mask = {"w": torch.tensor([True, True, True, False])}
    frozen = {"w": torch.tensor([False, False, True, False])}
    params = {"w": torch.tensor([1.0, 0.2, 0.5, 0.0])}
    ones = {"w": torch.ones(4)}
    kept = {"velocity": ones, "first": ones, "second": ones, "drift": ones}
    upload = {"w": torch.tensor([0.9, 0.1, 0.5, -0.6])}
    everywhere = {"w": torch.ones(4, dtype=torch.bool)}
    offered = {"params": upload, "mask": everywhere, "anchor": params, "weight": torch.tensor(2.0)}
    offered |= {"carry": Carry({}, {"dual": optim.zeros(params)}), "moved": True}
    sums = call(part.contribute, **offered)
    made = aggregate(part, sums, params, mask, frozen, budget, 2, kept)
    assert made.mask["w"].tolist() == [True, False, True, True]
    assert made.params["w"][1] == 0
    assert float(made.params["w"][3]) == pytest.approx(-0.6)
    assert float(made.params["w"][0]) > 0.95  # carried by memory, against the upload
    left = [value["w"] for value in made.memory.values() if isinstance(value, dict)]
    assert left
    at_rest = 1.0 if isinstance(part, DynamicMean) else 0.0
    assert all(value[0] != 0 and value[1:].tolist() == [0, at_rest, 0] for value in left)


@pytest.mark.parametrize("part", [ServerMomentum(), AdaptiveServer(), DynamicMean()])
def test_a_weight_that_was_dropped_and_redrawn_has_no_memory(part):
    """It is in the mask before and after, at 0: memory starts as that of a weight that is new."""
    params, upload = pair(0.0, 0.5), pair(0.3, 0.4)
    offered = {"params": upload, "mask": BOTH, "anchor": params, "weight": torch.tensor(2.0)}
    sums = call(part.contribute, **offered, moved=True, carry=Carry({}, {"dual": optim.zeros(params)}))
    ends = []
    for value in (0.0, 7.0):
        kept = dict.fromkeys(("velocity", "first", "second", "drift"), pair(value, 7.0))
        ends.append(aggregate(part, sums, params, BOTH, NEITHER, PAIR, 2, kept))
    fresh, old = ends
    assert torch.equal(old.params["w"], fresh.params["w"])
    assert all(same(memory, fresh.memory[kind]) for kind, memory in old.memory.items())
    assert all(memory["w"].all() for memory in old.memory.values())  # how it moved this time is kept


@pytest.mark.parametrize("plugin", ["fedavgm", "fedadam"])
def test_server_optimisers_start_afresh_where_the_server_redraws(make_engine, watch, plugin):
    """A network that SET rewires at the start of every round; weights that it drops and draws in one go."""
    engine = make_engine(plugin, ["readjust=set"], **{"federation__rounds": 8, "method__readjust__period": 1})
    watched, redrawn, state = watch(engine), 0, engine.start()
    for report in engine.rounds(state):
        before, state, cohort = state, report.state, report.metrics["clients"]
        params, mask, _ = watched.downloads[-1]
        uploads = [client for round_, client in watched.uploads if round_ == report.metrics["round"]]
        sizes = [len(engine.task.partition.train_of(number)) for number in cohort]
        for name, m in mask.items():
            mean = sum(n * c.params[name] for n, c in zip(sizes, uploads, strict=True)) / sum(sizes)
            again = (
                m & before.mask[name] & state.mask[name] & (before.params[name] != 0) & (params[name] == 0)
            )
            redrawn += int(again.sum())
            step = mean if plugin == "fedavgm" else fresh_adam_step(mean)
            torch.testing.assert_close(state.params[name][again], step[again])
    assert redrawn > 10


def fresh_adam_step(delta, rate=0.01, beta1=0.9, beta2=0.99, tau=1e-3):
    """η·m/(√v + τ) of a weight's first round."""
    second = beta2 * tau**2 + (1 - beta2) * delta.square()
    return rate * (1 - beta1) * delta / (second.sqrt() + tau)


@pytest.mark.parametrize("swaps", [(), ("readjust=feddst", "freeze_policy=pffdst")])
def test_scaffolds_c_is_the_mean_of_all_rows(make_engine, swaps):
    """N·c = Σ c_i (here weighted by samples), also where masks move, weights freeze and clients are away."""
    engine = make_engine("scaffold", swaps, **(MOVING if swaps else {"federation__rounds": 12}))
    state = play(engine)[-1].state
    sizes = {client: len(engine.task.partition.train_of(client)) for client in state.rows}
    memory = state.memory["aggregate"]
    assert set(sizes) == set(range(6))
    for name, p in state.params.items():
        total = sum(n * state.rows[client]["control"][name] for client, n in sizes.items())
        # sums of float32 over twelve rounds
        torch.testing.assert_close(memory["control"][name], total, atol=1e-4, rtol=1e-4)
        mean = total / sum(sizes.values())
        torch.testing.assert_close(memory["broadcast"][f"control/{name}"], mean, atol=1e-5, rtol=1e-4)
        assert mean.any() or p.numel() < 2
        if not swaps and name in state.mask:  # a mask that rests: nothing ever was off it
            assert all(not row["control"][name][~state.mask[name]].any() for row in state.rows.values())


REWIRED = {"federation__rounds": 6, "federation__local_epochs": 3, "method__readjust__period": 1}


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_scaffolds_rows_are_means_since_growth_where_clients_rewire(make_engine, momentum):
    """SET on clients, before the last of three epochs: each c_i recomputed from the steps' gradients."""
    changes = {**REWIRED, "federation__momentum": momentum, "method__readjust__site": "client"}
    engine = make_engine("scaffold", ["readjust=set"], **changes)
    executor, decay = engine.executor, engine.config.federation.weight_decay
    download, step, trail = executor.download, executor.step, []

    def watched_download(plan, number):
        trail.append((number, plan.state.mask, []))
        return download(plan, number)

    def watched_step(expected, place=None, /, **offered):
        params = offered["params"]
        _, grads, _ = offered["loss"].value_and_grad(params, offered["carry"], offered["batch"])
        stepped = step(expected, place, **offered)
        grads = {name: g + decay * params[name] for name, g in grads.items()}
        trail[-1][2].append((offered["loss"].mask, params, grads, stepped.params))
        return stepped

    executor.download, executor.step, executor.replays = watched_download, watched_step, None
    rows, sizes, fewer = {}, {}, 0
    for report in engine.rounds(engine.start()):
        for number, mask, steps in trail:
            sizes[number] = len(engine.task.partition.train_of(number))
            row = rows.setdefault(number, optim.zeros(report.state.params))
            for name, old in row.items():
                total, count, was, left = 0 * old, 0 * old, mask.get(name), steps[0][1][name]
                for own, params, grads, moved in steps:
                    if was is not None:
                        restarted = (own[name] != was) | (params[name] != left)
                        total, count = total.masked_fill(restarted, 0), count.masked_fill(restarted, 0)
                        was = own[name]
                    trained = torch.ones_like(old) if was is None else was
                    total, count, left = total + grads[name] * trained, count + trained, moved[name]
                fewer += int(((count > 0) & (count < len(steps))).sum())
                row[name] = torch.where(count > 0, total / count, old)
                torch.testing.assert_close(report.state.rows[number]["control"][name], row[name])
        trail.clear()
        control = report.state.memory["aggregate"]["control"]
        for name, total in control.items():
            expected = sum(n * rows[number][name] for number, n in sizes.items())
            torch.testing.assert_close(total, expected, atol=1e-4, rtol=1e-4)  # float32 sums, 40 a client
    assert fewer > 100


OSCILLATING = {
    "federation__rounds": 12,
    "method__freeze_policy__period": 1,
    "method__freeze_policy__alpha": 0.5,
    "method__freeze_policy__threshold": 0.6,
}
"""APF that freezes and thaws within a few rounds."""


def thaws(engine, at_least):
    """Plays the engine; its last state, once weights were frozen in an earlier round and are not now."""
    ever, thawed, state = {}, 0, engine.start()
    for report in engine.rounds(state):
        state = report.state
        for name, frozen in state.frozen.items():
            ever[name] = ever.get(name, frozen) | frozen
            thawed += int((ever[name] & ~frozen).sum())
    assert thawed > at_least
    return state


@pytest.mark.parametrize(
    ("swap", "changes"),
    [("readjust=set", REWIRED), ("freeze_policy=apf", OSCILLATING)],
    ids=["grown", "thawed"],
)
def test_scaffold_corrects_by_the_mean_of_all_rows_where_weights_train(make_engine, watch, swap, changes):
    """Also at weights that the server has grown, or thawed, at the start of the round."""
    engine = make_engine("scaffold", [swap], **changes)
    watched, pool, state = watch(engine), len(engine.task.partition.train_indices), engine.start()
    for report in engine.rounds(state):
        before, state = state, report.state
        for _, _, client in watched.downloads[-3:]:
            for name, correction in client.carry.state["correction"].items():
                rows = {number: row["control"][name] for number, row in before.rows.items()}
                mean = sum(len(engine.task.partition.train_of(n)) * row for n, row in rows.items()) / pool
                expected = mean - rows.get(client.number, 0) + torch.zeros_like(correction)
                free = client.trainable.get(name, torch.ones_like(correction, dtype=torch.bool))
                torch.testing.assert_close(correction[free], expected[free], atol=1e-5, rtol=1e-4)
                assert name not in state.mask or not correction[~client.mask[name]].any()


def test_feddyns_h_is_the_mean_of_all_rows_after_weights_have_thawed(make_engine):
    """Frozen for some rounds, with clients away: λ and h rest."""
    engine = make_engine("feddyn", ["freeze_policy=apf"], method__local_step__alpha=0.2, **OSCILLATING)
    state = thaws(engine, 100)
    for name, drift in state.memory["aggregate"]["drift"].items():
        sizes = {client: len(engine.task.partition.train_of(client)) for client in state.rows}
        total = sum(n * state.rows[client]["dual"][name] for client, n in sizes.items())
        torch.testing.assert_close(-0.2 * drift, total, atol=1e-4, rtol=1e-4)  # float32 sums, 40 a client
        assert total.any()
        assert name not in state.mask or not total[~state.mask[name]].any()


def test_feddyns_h_is_the_mean_of_all_rows(make_engine):
    """Full participation or not, under a mask that rests: Σ n_k·λ_k = -α·Σ n_k·drift; zero off the mask."""
    engine = make_engine("feddyn", federation__rounds=10, method__local_step__alpha=0.2)
    state = play(engine)[-1].state
    drift = state.memory["aggregate"]["drift"]
    for name in state.params:
        total = sum(
            len(engine.task.partition.train_of(client)) * row["dual"][name]
            for client, row in state.rows.items()
        )
        torch.testing.assert_close(
            -0.2 * drift[name], total, atol=1e-4, rtol=1e-4
        )  # float32 sums, 40 a client
        if name in state.mask:
            assert not total[~state.mask[name]].any()
            assert total.any()


def test_feddyns_rows_are_zero_off_the_mask_and_rest_where_frozen(make_engine, watch):
    """Rewired on the client, frozen by the server."""
    engine = make_engine("feddyn", ["readjust=feddst", "freeze_policy=pffdst"], **MOVING)
    watched, rested = watch(engine), 0
    *_, before, last = (report.state for report in play(engine))
    for client in [client for round_, client in watched.uploads if round_ == 11]:
        row, old = last.rows[client.number]["dual"], before.rows[client.number]["dual"]
        for name, mask in client.mask.items():
            assert not row[name][~mask].any()
            assert row[name][client.trainable[name]].any()
            assert torch.equal(row[name][last.frozen[name]], old[name][last.frozen[name]])
            rested += int((last.frozen[name] & (row[name] != 0)).sum())
    assert rested > 50


# --- what is sent, and where it runs ---


def test_scaffold_sends_twice_the_values_and_feddyn_nothing_more(make_engine):
    runs = {
        name: play(make_engine(name, federation__rounds=3, ledger__encode=True))
        for name in ("fedavg", "scaffold", "feddyn")
    }
    state = runs["fedavg"][0].state
    values = sum(masks.active(state.mask).values())
    values += sum(p.numel() for name, p in state.params.items() if name not in state.mask)
    for round_, plain in enumerate(runs["fedavg"]):
        more = {
            name: [
                runs[name][round_].metrics[f"{way}_bytes"] - plain.metrics[f"{way}_bytes"]
                for way in ("upload", "download")
            ]
            for name in ("scaffold", "feddyn")
        }
        size = 3 * (HEADER + 4 * values)
        assert more["scaffold"] == [size, size * (round_ > 0)]
        assert more["feddyn"] == [0, 0]


@pytest.mark.parametrize("plugin", ["fedprox", "scaffold", "feddyn"])
def test_client_hooks_with_rows_under_vmap_equal_the_loop(make_engine, plugin):
    """Three clients with rows of their own, two steps, contribution and row, in float64."""
    engine = make_engine(plugin)
    start, hooks = engine.start(), engine.hooks
    start.params = {name: p.double() for name, p in start.params.items()}
    generator = torch.Generator().manual_seed(0)

    def noise():
        drawn = {
            n: torch.randn(p.shape, generator=generator, dtype=torch.float64) for n, p in start.params.items()
        }
        return masks.apply(drawn, start.mask)

    broadcast = {f"control/{name}": value for name, value in noise().items()}
    kind = {"scaffold": "control", "feddyn": "dual"}.get(plugin, "none")
    rows = [{kind: noise()} for _ in range(3)]
    drawn = [engine.task.batches(client, 0, 0) for client in range(3)]
    batches = [[Batch(c[i].inputs.double(), c[i].targets) for c in drawn] for i in range(2)]
    frozen = {n: m & (start.params[n] > 0.1) for n, m in start.mask.items()}
    free = movable(start.mask, frozen)

    def client(row, *both):
        offered = {"params": start.params, "mask": start.mask, "momentum": 0.9, "anchor": start.params}
        offered |= {
            "broadcast": broadcast,
            "memory": row,
            "trainable": free,
            "lr": 0.05,
            "weight_decay": 0.01,
        }
        offered |= {"loss": ClientLoss(engine.loss, start.mask, start.params)}
        carry = Carry({}, hooks.call("client_init", dict, **offered))
        params = start.params
        for batch in both:
            offered |= {"params": params, "carry": carry, "batch": batch}
            params, carry, _ = hooks.call("local_step", tuple, **offered)
        offered |= {"params": params, "carry": carry, "weight": torch.tensor(40.0, dtype=torch.float64)}
        sums = hooks.call("contribute", dict, **offered, moved=True)
        final = hooks.call("client_final", dict, **offered) if hooks.get("client_final") else row
        return params, sums, final[kind]

    together = [Batch(*(torch.stack(field) for field in zip(*pair, strict=True))) for pair in batches]
    stacked_row = {kind: {n: torch.stack([row[kind][n] for row in rows]) for n in start.params}}
    stacked = torch.func.vmap(client)(stacked_row, *together)
    for number in range(3):
        alone = client(rows[number], *(pair[number] for pair in batches))
        for ours, theirs in zip(alone, stacked, strict=True):
            for name, value in ours.items():
                # batched kernels sum in another order: 1e-16 a sum
                torch.testing.assert_close(theirs[name][number], value, atol=1e-10, rtol=1e-8)
        assert all(torch.equal(alone[0][n][f], start.params[n][f]) for n, f in frozen.items())
