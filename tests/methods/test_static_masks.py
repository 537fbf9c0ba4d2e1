"""Masks found before training: random, SNIP, GraSP, SynFlow and PruneFL's first one."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, linear

from fedsparse.core import masks, rng
from fedsparse.core.budget import ALLOCATIONS, Budget, Layer
from fedsparse.core.loss import ModelLoss, Probe
from fedsparse.core.state import Batch
from fedsparse.plugins.grasp import Grasp, hessian_gradient
from fedsparse.plugins.prunefl import InitialImportance
from fedsparse.plugins.random import RandomMask
from fedsparse.plugins.snip import Snip
from fedsparse.plugins.synflow import Synflow, positive, synaptic_flow

PLUGINS = ("random", "snip", "grasp", "synflow", "prunefl")
PLAIN = ("random", "snip", "grasp", "synflow")
"""Those that bring a mask and nothing else."""


def tiny(*layers, inputs=(5,), samples=12, classes=3):
    """A probe on a small float64 network with smooth activations, its parameters, and its weights' layers."""
    torch.manual_seed(0)
    model = nn.Sequential(*layers).double()
    batch = Batch(torch.randn(samples, *inputs, dtype=torch.float64), torch.randint(classes, (samples,)))
    params = {n: p.detach().clone() for n, p in model.named_parameters()}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    named = tuple(Layer(n, tuple(p.shape)) for n, p in params.items() if p.dim() > 1)
    return Probe(ModelLoss(model), buffers, batch), params, named


def smooth():
    return tiny(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def check_exact(mask, budget):
    counts = masks.active(mask)
    assert list(counts) == [layer.name for layer in budget.layers]
    assert sum(counts.values()) == budget.total
    if budget.counts is not None:
        assert counts == dict(budget.counts)


@pytest.mark.parametrize("prunable", ["weights", "all"])
@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("plugin", PLUGINS)
def test_counts_are_exact_under_every_allocation(make_engine, plugin, allocation, prunable):
    engine = make_engine(plugin, sparsity__allocation=allocation, sparsity__prunable=prunable)
    state = engine.start()
    check_exact(state.mask, engine.budget(engine.clock(0)))
    assert len(state.mask) == (3 if prunable == "weights" else 6)


@pytest.mark.parametrize("plugin", PLUGINS)
def test_the_same_seed_gives_the_same_mask_and_leaves_the_model_as_it_was(make_engine, plugin):
    engine, again, other = (make_engine(plugin, seed=seed) for seed in (3, 3, 4))
    mask = engine.start().mask
    assert all(torch.equal(mask[n], again.start().mask[n]) for n in mask)
    assert not all(torch.equal(mask[n], other.start().mask[n]) for n in mask)
    assert all(torch.equal(p, engine.params[n]) for n, p in engine.task.model.named_parameters())
    assert all(module.training for module in engine.task.model.modules())


@pytest.mark.parametrize("plugin", PLAIN)
@pytest.mark.parametrize("base", ["feddst", "pffdst"])
def test_each_mask_under_another_method(make_engine, base, plugin):
    """Four rounds with contracts on, from a mask that is not the base's own."""
    changes = {"method__readjust__period": 1, "method__readjust__ratio": 0.3, "federation__rounds": 4}
    engine = make_engine(base, [f"mask_init={plugin}"], **changes)
    own = make_engine(base, **changes).start().mask
    state = engine.start()
    assert engine.contracts is not None
    assert not all(torch.equal(state.mask[n], own[n]) for n in own)
    reports = list(engine.rounds(state))
    assert len(reports) == 4
    assert sum(report.metrics["mask_changed"] for report in reports) > 0
    check_exact(reports[-1].state.mask, engine.budget(engine.clock(3)))


@pytest.mark.parametrize("plugin", PLAIN)
def test_the_mask_stays_through_training(make_engine, plugin):
    engine = make_engine(plugin, federation__rounds=3)
    state = engine.start()
    last = list(engine.rounds(state))[-1].state
    assert all(torch.equal(state.mask[n], last.mask[n]) for n in state.mask)


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_random_draws_every_weight_as_often(allocation):
    """400 masks of 24 weights at density 1/4: counts of 100 ± 5 standard deviations of √75."""
    params = {"a": torch.zeros(4, 3), "b": torch.zeros(3, 4)}
    budget = Budget((Layer("a", (4, 3)), Layer("b", (3, 4))), allocation, 0.75)
    drawn = [RandomMask().mask_init(params, budget, rng.key(seed)) for seed in range(400)]
    counts = torch.stack([torch.cat([m["a"].flatten(), m["b"].flatten()]) for m in drawn]).sum(0)
    assert (counts - 100).abs().max() < 44
    assert len({tuple(m["a"].flatten().tolist()) for m in drawn}) > 100


def stub(gradient):
    """A probe of a given gradient."""
    return SimpleNamespace(of=SimpleNamespace(weights=lambda p, mask: p), gradient=lambda w: gradient)


def test_fedsparsify_document_10_6_snip():
    """|w·g| = [0.2, 0.1, 0.18, 0]: the zero weight always goes."""
    params = {"w": torch.tensor([0.5, -1, 0.2, 0])}
    gradient = {"w": torch.tensor([0.4, -0.1, -0.9, 2])}
    budget = Budget((Layer("w", (4,)),), "global", 0.5)
    assert Snip().mask_init(params, budget, stub(gradient))["w"].int().tolist() == [1, 0, 1, 0]


def test_snip_is_the_gradient_by_the_indicators():
    """|∂L/∂c| at c = 1 for weights c·w, by a forward pass written out here."""
    probe, params, layers = smooth()
    c = {layer.name: torch.ones(layer.shape, dtype=torch.float64, requires_grad=True) for layer in layers}
    hidden = torch.tanh(linear(probe.batch.inputs, c["0.weight"] * params["0.weight"], params["0.bias"]))
    logits = linear(hidden, c["2.weight"] * params["2.weight"], params["2.bias"])
    value = -logits.log_softmax(1)[range(12), probe.batch.targets].mean()
    value.backward()
    flat = torch.cat([c[layer.name].grad.abs().flatten() for layer in layers])
    budget = Budget(layers, "global", 0.6)
    kept = Snip().mask_init(params, budget, probe)
    chosen = torch.cat([kept[layer.name].flatten() for layer in layers])
    assert set(flat.topk(budget.total).indices.tolist()) == set(chosen.nonzero().flatten().tolist())


def test_scores_are_of_the_weights_that_the_layers_use():
    """Under w = θ·|θ|, SNIP scores w and not θ."""
    probe, params, layers = smooth()
    budget = Budget(layers, "global", 0.5)
    used = {n: p * p.abs() for n, p in params.items()}
    through = Probe(ModelLoss(probe.of.model, lambda p, mask: used), probe.buffers, probe.batch)
    for part in (Snip(), Grasp(), Synflow()):
        expected = part.mask_init(used, budget, probe)
        found = part.mask_init(params, budget, through)
        assert all(torch.equal(expected[n], found[n]) for n in expected)
    assert any(not torch.equal(expected[n], part.mask_init(params, budget, probe)[n]) for n in expected)


def test_grasp_product_equals_finite_differences():
    probe, params, layers = smooth()
    names = [layer.name for layer in layers]
    product = hessian_gradient(probe, params, names)
    g, step = probe.gradient(params), 1e-4
    ahead, behind = (
        probe.gradient({n: p + s * step * g[n] if n in names else p for n, p in params.items()})
        for s in (1, -1)
    )
    for name in names:
        # central differences: an error of step² and rounding of 1e-16/step, both below 1e-8
        torch.testing.assert_close(
            product[name], (ahead[name] - behind[name]) / (2 * step), atol=1e-8, rtol=0
        )


def test_grasp_removes_what_hurts_the_gradient_flow_least():
    """Shrinking w by ε·w changes ‖g‖² by -2ε·w·(Hg): what raises it most goes, what lowers it stays."""
    probe, params, layers = smooth()
    names, step = [layer.name for layer in layers], 1e-5

    def flow(weights):
        g = probe.gradient(weights)
        return sum(float(g[n].square().sum()) for n in names)

    change = []
    for name in names:
        for index in range(params[name].numel()):
            shrunk = params[name].clone()
            shrunk.view(-1)[index] *= 1 - step
            change.append(flow({**params, name: shrunk}) - flow(params))
    budget = Budget(layers, "global", 0.6)
    kept = Grasp().mask_init(params, budget, probe)
    chosen = torch.cat([kept[n].flatten() for n in names])
    assert max(c for c, k in zip(change, chosen, strict=True) if k) < min(
        c for c, k in zip(change, chosen, strict=True) if not k
    )
    assert min(change) < 0 < max(change)


def test_synflow_conserves_flow_through_every_hidden_unit():
    """Σ of scores into a unit = Σ out of it; convolution, pooling, ReLU and BatchNorm at its start."""
    layers = (nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2))
    probe, params, named = tiny(
        *layers, nn.Conv2d(3, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(4, 3), inputs=(2, 4, 4)
    )
    names = [layer.name for layer in named]
    mask = {n: rng.uniform(rng.key(n), params[n].shape) < 0.7 for n in names}
    weights = masks.apply(positive(params, mask), mask)
    scores, total = synaptic_flow(probe, weights, names)
    first, second, third = (scores[n] for n in names)
    close = {"atol": 0, "rtol": 1e-12}  # sums of a few dozen float64
    torch.testing.assert_close(first.sum((1, 2, 3)), second.sum((0, 2, 3)), **close)
    torch.testing.assert_close(second.sum((1, 2, 3)), third.sum(0), **close)
    assert float(third.sum()) == pytest.approx(total, rel=1e-12)
    assert total > 0
    assert all((score[~mask[n]] == 0).all() for n, score in scores.items())


def test_synflow_leaves_no_layer_empty_where_magnitude_does(make_engine):
    """5 of 1,008 weights over three layers."""
    changes = {"sparsity__target": 0.995, "sparsity__allocation": "global"}
    by_magnitude = masks.active(make_engine("fedavg", **changes).start().mask)
    by_flow = masks.active(make_engine("synflow", **changes).start().mask)
    assert sum(by_magnitude.values()) == sum(by_flow.values()) == 5
    assert min(by_magnitude.values()) == 0
    assert min(by_flow.values()) >= 1


def test_synflow_in_many_steps_keeps_connected_paths(make_engine):
    """Scored once more, nearly all of its 50 weights have flow; one step severs most of them."""
    severed = {}
    for rounds in (1, 100):
        engine = make_engine("synflow", sparsity__target=0.95, method__mask_init__rounds=rounds)
        state = engine.start()
        probe = Probe(engine.loss, engine.buffers, engine.task.sample(4))
        weights = masks.apply(positive(engine.params, state.mask), state.mask)
        scores, _ = synaptic_flow(probe, weights, list(state.mask))
        severed[rounds] = sum(int((m & (scores[n] == 0)).sum()) for n, m in state.mask.items())
    assert severed[100] <= 5
    assert severed[1] >= 25


def test_synflow_never_revives_what_it_pruned(make_engine, monkeypatch):
    """Not even where active weights have no flow left, as pruned ones: layer budgets force some to stay."""
    made, real = [], masks.by_budget

    def watched(scores, budget):
        made.append(real(scores, budget))
        return made[-1]

    monkeypatch.setattr(masks, "by_budget", watched)
    make_engine("synflow", sparsity__target=0.98, sparsity__allocation="scaled").start()
    assert len(made) == 100
    for before, after in pairwise(made):
        assert all((after[n] <= before[n]).all() for n in after)


def test_synflow_is_the_released_iteration():
    """Three rounds by a loop written out here: prune, score, keep density^(k/n)."""
    probe, params, layers = tiny(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
    budget = Budget(layers, "global", 0.8)
    alive = {layer.name: torch.ones(layer.shape, dtype=torch.float64) for layer in layers}
    for k in (1, 2, 3):
        w = {n: (params[n].abs() * alive[n]).requires_grad_() for n in alive}
        (torch.ones(5, dtype=torch.float64) @ w["0.weight"].T @ w["2.weight"].T).sum().backward()
        flat = torch.cat([(v * v.grad).detach().flatten() for v in w.values()])
        threshold = flat.topk(round(0.2 ** (k / 3) * 48)).values[-1]
        alive = {n: ((v * v.grad) >= threshold).double().detach() for n, v in w.items()}
    found = Synflow(rounds=3).mask_init(params, budget, probe)
    assert all(torch.equal(found[n], alive[n].bool()) for n in alive)


def test_synflow_leaves_buffers_and_modes_alone():
    probe, params, layers = tiny(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3), inputs=(2, 4, 4)
    )
    probe.of.model[1].eval()
    before = {n: b.clone() for n, b in probe.buffers.items()}
    Synflow(rounds=3).mask_init(params, Budget(layers, "global", 0.5), probe)
    assert [module.training for module in probe.of.model] == [True, False, True, True, True]
    assert all(torch.equal(before[n], b) for n, b in probe.buffers.items())
    assert all(torch.equal(before[n], b) for n, b in probe.of.model.named_buffers())


def test_synflow_refuses_a_network_without_flow():
    """A softmax makes the sum of the outputs 1 whatever the weights."""
    probe, params, layers = tiny(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3), nn.Softmax(1))
    with pytest.raises(ValueError, match="softmax"):
        Synflow().mask_init(params, Budget(layers, "global", 0.5), probe)


@pytest.mark.parametrize("part", [Snip(), Grasp(), InitialImportance(), Synflow(rounds=5)])
def test_masks_through_batch_statistics(part):
    """BatchNorm in training mode: twice differentiable, and the buffers given stay as they are."""
    probe, params, layers = tiny(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3), inputs=(2, 4, 4)
    )
    before = {n: b.clone() for n, b in probe.buffers.items()}
    for allocation in ALLOCATIONS:
        budget = Budget(layers, allocation, 0.7)
        check_exact(part.mask_init(params, budget, probe), budget)
    assert all(torch.equal(before[n], b) for n, b in probe.buffers.items())
    loss = cross_entropy(functional_call(probe.of.model, params, (probe.batch.inputs,)), probe.batch.targets)
    torch.testing.assert_close(probe.loss(params), loss)
