"""ZeroFL and SWAT against Appendix A (and quirks 9.14, 9.17) of the SparsyFed document."""

import math

import pytest
import torch
from torch.func import functional_call, grad, vmap

from fedsparse.core import masks
from fedsparse.core.activations import Pruning
from fedsparse.core.budget import Budget, Layer
from fedsparse.core.evaluation import evaluate
from fedsparse.core.loss import ClientLoss
from fedsparse.core.state import Batch, Carry
from fedsparse.plugins.zerofl import Swat, UploadTopK, straight_through

CONV = {"task__model__use": "cnn", "task__model__hidden": 8, "task__model__widths": [4]}
DEEP = CONV | {"task__model__widths": [4, 4]}
PLAIN = {"federation__momentum": 0.0, "federation__learning_rate": 0.3}


def played(engine, rounds):
    return [report for _, report in zip(range(rounds), engine.rounds(engine.start()), strict=False)]


def in_float64(engine, client=0):
    params = {n: p.double() for n, p in engine.start().params.items()}
    drawn = engine.task.batches(client, 0, 0)[:2]
    return params, [Batch(b.inputs.double(), b.targets) for b in drawn]


@pytest.mark.parametrize(("size", "sparsity"), [(10, 0.7), (10, 0.75), (1000, 0.9), (7, 0.0), (3, 0.99)])
def test_passes_use_the_largest_weights_of_each_layer(size, sparsity):
    """Density 1-S, rounded up; the rest of a copy is 0, and the gradient reaches every weight."""
    torch.manual_seed(0)
    weight = torch.randn(size)
    used = straight_through(weight, sparsity)
    kept = used != 0
    assert int(kept.sum()) == math.ceil(round((1 - sparsity) * size, 9))
    assert torch.equal(used[kept], weight[kept])
    assert sparsity == 0 or kept.all() or weight[kept].abs().min() >= weight[~kept].abs().max()
    upstream = torch.randn(size)
    assert torch.equal(grad(lambda w: (straight_through(w, sparsity) * upstream).sum())(weight), upstream)


def test_the_first_convolution_is_dense(make_engine):
    engine = make_engine("zerofl", **DEEP)
    used = engine.loss.weights(engine.params, {})
    dense = [name for name in engine.params if used[name] is engine.params[name]]
    assert dense == ["conv1.weight", "conv1.bias", "conv2.bias", "fc1.bias", "fc2.bias"]
    for name in ("conv2.weight", "fc1.weight", "fc2.weight"):
        size = used[name].numel()
        assert int((used[name] != 0).sum()) == math.ceil(round(0.2 * size, 9))
    assert Swat().pruned(make_engine("zerofl").params) == ["fc1.weight", "fc2.weight", "fc3.weight"]


def test_gradients_of_a_step(make_engine):
    """Input gradients by the sparse weights, weight gradients dense and by the inputs kept, per minibatch."""
    engine = make_engine("zerofl", **DEEP)
    params, (batch, _) = in_float64(engine)
    part = Swat()
    loss = ClientLoss(engine.loss, {}, params)
    stepped = part.local_step(loss, params, Carry({}, {}), batch, {}, 1.0, 0.0, 0.0, 0.8)
    found = {name: params[name] - stepped.params[name] for name in params}

    # by hand: a plain pass with the sparse copies, in which each layer's inputs are noted
    used = {n: p.detach().requires_grad_() for n, p in part.effective_params(params, 0.8).items()}
    noted, layers = {}, dict(engine.task.model.named_children())
    hooks = [
        layer.register_forward_hook(lambda _, inputs, out, name=name: noted.update({name: (*inputs, out)}))
        for name, layer in layers.items()
    ]
    out = functional_call(engine.task.model, used, (batch.inputs,))
    value = torch.nn.functional.cross_entropy(out, batch.targets)
    by_out = torch.autograd.grad(value, [noted[name][1] for name in layers], retain_graph=True)
    plain = dict(zip(used, torch.autograd.grad(value, list(used.values())), strict=True))
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(stepped.metrics["loss"], value.detach())
    for (name, layer), g in zip(layers.items(), by_out, strict=True):
        torch.testing.assert_close(found[f"{name}.bias"], plain[f"{name}.bias"])
        inputs = noted[name][0].detach()
        if name != "conv1":
            count = math.ceil(round(0.2 * inputs.numel(), 9))
            threshold = inputs.abs().flatten().sort(descending=True).values[count - 1]
            inputs = torch.where(inputs.abs() >= threshold, inputs, 0.0)
        weight = used[f"{name}.weight"].detach().requires_grad_()
        again = functional_call(layer, {"weight": weight, "bias": used[f"{name}.bias"]}, (inputs,))
        torch.testing.assert_close(found[f"{name}.weight"], torch.autograd.grad(again, weight, g)[0])
    assert found["fc1.weight"][part.effective_params(params, 0.8)["fc1.weight"] == 0].any()


def test_quirk_9_17_weights_stay_dense(make_engine, watch):
    """The passes' sparse copies leave the stored weights dense: nothing is zeroed before the Top-K."""
    engine = make_engine("zerofl", **CONV, **PLAIN)
    watched = watch(engine)
    played(engine, 1)
    for _, params, _ in watched.steps:
        assert all((params[n] != 0).all() for n in engine.prunable)


@pytest.mark.parametrize(("ratio", "sparsity"), [(0.0, 0.8), (0.2, 0.6), (0.9, 0.0)])
def test_upload_is_denser_by_the_mask_ratio(make_engine, watch, ratio, sparsity):
    """S - r_mask, at least 0; the server's mask is full and its mean plain (quirk 9.14)."""
    engine = make_engine("zerofl", **PLAIN, method__readjust__mask_ratio=ratio)
    watched, reports = watch(engine), played(engine, 2)
    weights = sum(layer.weights for layer in engine.task.layers)
    for _, client in watched.uploads:
        assert sum(masks.active(client.mask).values()) == weights - round(sparsity * weights)
    first = [client for round_, client in watched.uploads if round_ == 0]
    counts = [len(engine.task.partition.train_of(client.number)) for client in first]
    for name in engine.prunable:
        mean = sum(c.params[name] * n for c, n in zip(first, counts, strict=True)) / sum(counts)
        torch.testing.assert_close(reports[0].state.params[name], mean)
        assert reports[0].state.mask[name].all()


def test_the_threshold_of_the_upload_is_one_for_the_network():
    params = {"a": torch.tensor([5.0, 4, 3, 0.1]), "b": torch.tensor([2.0, 0.3, 0.2, 0.05])}
    budget = Budget((Layer("a", (4,)), Layer("b", (4,))), "erk", 0.75)
    mask = {n: torch.ones(4, dtype=torch.bool) for n in params}
    none = {n: torch.zeros(4, dtype=torch.bool) for n in params}
    assert masks.active(UploadTopK().readjust(params, mask, none, budget).mask) == {"a": 2, "b": 0}
    denser = UploadTopK(mask_ratio=0.25).readjust(params, mask, none, budget)
    assert masks.active(denser.mask) == {"a": 3, "b": 1}


def test_evaluation_uses_the_sparse_copies_and_prunes_no_inputs(make_engine, monkeypatch):
    engine = make_engine("zerofl", **CONV, **PLAIN)
    state = played(engine, 1)[-1].state
    used = engine.loss.weights(state.params, state.mask)
    assert int((used["fc1.weight"] != 0).sum()) <= math.ceil(0.2 * used["fc1.weight"].numel())
    monkeypatch.setattr(Pruning, "kept", None)  # calling it would raise
    found = evaluate(engine.task, engine.loss, state.params, state.buffers, state.mask)
    inputs, targets = next(engine.task.test_batches())
    hits = functional_call(engine.task.model, used, (inputs,)).argmax(1) == targets
    assert found["test_accuracy"] == pytest.approx(float(hits.float().mean()))


def test_vmap_equals_the_loop(make_engine):
    """In float64, where batched kernels that sum in another order leave 1e-16 a sum."""
    torch.manual_seed(0)
    engine, part = make_engine("zerofl", **DEEP), Swat()
    clients = [in_float64(engine, number) for number in range(3)]
    starts = [
        {n: p * (1 + number * torch.rand_like(p)) for n, p in c[0].items()}
        for number, c in enumerate(clients)
    ]

    def train(params, *batches):
        state = Carry({}, part.client_init(params, 0.9))
        loss = ClientLoss(engine.loss, {}, params)
        for batch in batches:
            params, state, _ = part.local_step(loss, params, state, batch, {}, 0.3, 0.9, 0.001, 0.8)
        return params

    alone = [train(start, *batches) for start, (_, batches) in zip(starts, clients, strict=True)]
    stacked = {n: torch.stack([start[n] for start in starts]) for n in starts[0]}
    batches = [
        Batch(*(torch.stack(field) for field in zip(*[c[1][i] for c in clients], strict=True)))
        for i in (0, 1)
    ]
    together = vmap(train)(stacked, *batches)
    for number, params in enumerate(alone):
        for name, value in params.items():
            torch.testing.assert_close(together[name][number], value, atol=1e-12, rtol=0)
