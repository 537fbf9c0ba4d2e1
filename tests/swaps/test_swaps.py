"""Every single-slot swap among the shipped methods keeps the contracts; loops and vmap agree."""

import pytest
import torch

from fedsparse.core import rng
from fedsparse.core.hookspecs import SLOTS
from fedsparse.core.loss import ClientLoss
from fedsparse.core.masks import movable
from fedsparse.core.state import Batch, Carry

METHODS = ("fedavg", "feddst", "pffdst")
DIGITS = dict.fromkeys(
    (
        "task__dataset__train",
        "task__dataset__test",
        "task__dataset__classes",
        "task__dataset__channels",
        "task__dataset__height",
        "task__dataset__width",
    )
)


SWAPS = [(base, slot, other) for base in METHODS for slot in SLOTS for other in METHODS if base != other]


@pytest.mark.parametrize(("base", "slot", "other"), SWAPS)
def test_every_swap_on_digits_keeps_the_contracts(make_engine, base, slot, other):
    """Contracts are on; short periods put freezing, drop and growth, and a closing into six rounds."""
    changes = {"sparsity__target": 0.7}
    readjust = other if slot == "readjust" else base
    if readjust != "fedavg":
        changes["method__readjust__period"] = 1
    if readjust == "feddst":
        changes["method__readjust__annealing"] = "constant"
    if readjust == "pffdst":
        changes |= {"method__readjust__starts": [0.0], "method__readjust__window": 0.49}
    engine = make_engine(
        base,
        [f"{slot}={other}"],
        **DIGITS,
        task__dataset__use="digits",
        federation__rounds=6,
        ledger__encode=True,
        federation__clients=12,
        output__evaluate_every=1,
        **changes,
    )
    assert engine.contracts is not None
    reports = list(engine.rounds(engine.start()))
    assert len(reports) == 6
    budget = engine.budget(engine.clock(5))
    assert sum(int(m.sum()) for m in reports[-1].state.mask.values()) <= budget.total
    moved = sum(report.metrics["mask_changed"] for report in reports)
    freezes = (other if slot == "freeze_policy" else base) == "pffdst"
    assert (moved > 0) == (readjust != "fedavg" or freezes)


@pytest.mark.parametrize("plugin", METHODS)
@pytest.mark.parametrize("model", ["mlp", "cnn", pytest.param("resnet18", marks=pytest.mark.slow)])
def test_local_step_under_vmap_equals_the_loop(make_engine, plugin, model):
    """Three clients with masks of their own, two steps; the methods' steps and client readjustments.

    In float64, where batched kernels that sum in another order leave 1e-16 a sum: BatchNorm at 1x1 pixels
    divides by small deviations and would blow up float32's 1e-7 beyond any useful bound.
    """
    widths = {} if model == "mlp" else {"task__model__hidden": None}
    if model == "resnet18":  # BatchNorm: buffers of their own for each client
        widths |= {
            "federation__batch_size": 4,
            "task__dataset__channels": 3,
            "task__dataset__height": 8,
            "task__dataset__width": 8,
        }
    engine = make_engine(plugin, task__model__use=model, federation__rounds=8, **widths)
    state, hooks = engine.start(), engine.hooks
    state.params = {n: p.double() for n, p in state.params.items()}
    state.buffers = {n: b.double() if b.is_floating_point() else b for n, b in state.buffers.items()}
    close = {"atol": 1e-10, "rtol": 1e-8}
    federation = engine.config.federation
    cohort = range(3)
    drawn = [engine.task.batches(c, 0, 0) for c in cohort]
    batches = [[Batch(client[i].inputs.double(), client[i].targets) for client in drawn] for i in range(2)]
    frozen = {n: torch.zeros_like(m) for n, m in state.mask.items()}
    first = next(iter(state.mask))
    frozen[first] = state.mask[first] & (state.params[first] > 0)
    masks = []
    for client in cohort:
        own = {
            n: m & (frozen[n] | (rng.uniform(rng.key(client, n), m.shape) < 0.8))
            for n, m in state.mask.items()
        }
        masks.append(own)

    def train(mask, buffers, first, second):
        params = {n: torch.where(mask[n], p, 0.0) if n in mask else p for n, p in state.params.items()}
        carry = Carry(buffers, {"momentum": {n: torch.zeros_like(p) for n, p in params.items()}})
        for batch in (first, second):
            offered = {
                "loss": ClientLoss(engine.loss, mask, state.params),
                "params": params,
                "carry": carry,
                "batch": batch,
                "trainable": movable(mask, frozen),
                "anchor": state.params,
                "lr": 0.05,
                "momentum": federation.momentum,
                "weight_decay": 0.001,
                "target": 0.8,
                "clock": engine.clock(0),
                "key": rng.key(0),
            }
            params, carry, _ = hooks.call("local_step", tuple, **offered)
        moved = mask
        if hooks.site == "client" and hooks.get("readjust"):
            score = {n: params[n].sin().abs() for n in mask}
            params, moved, _ = hooks.call(
                "readjust",
                tuple,
                params=params,
                mask=mask,
                frozen=frozen,
                score=score,
                target=0.8,
                budget=engine.budget(engine.clock(1)),
                clock=engine.clock(1),
                key=rng.key(0),
                memory={},
            )
        return params, moved, carry.buffers

    stacked = {n: torch.stack([mask[n] for mask in masks]) for n in masks[0]}
    buffers = {n: torch.stack([b] * len(masks)) for n, b in state.buffers.items()}  # vmap shares none
    together = [type(pair[0])(*(torch.stack(field) for field in zip(*pair, strict=True))) for pair in batches]
    params, moved, buffers = torch.func.vmap(train)(stacked, buffers, *together)
    for client in cohort:
        alone, own, kept_buffers = train(masks[client], state.buffers, *(pair[client] for pair in batches))
        for name, value in kept_buffers.items():
            torch.testing.assert_close(buffers[name][client], value, **close)
        for name, value in alone.items():
            torch.testing.assert_close(params[name][client], value, **close)
            if name in own:
                assert torch.equal(moved[name][client], own[name])
                kept = frozen[name] & masks[client][name]
                assert torch.equal(params[name][client][kept], state.params[name][kept])


def test_two_methods_of_one_seed_see_the_same_clients_and_weights(make_engine):
    engines = [make_engine(plugin, federation__rounds=5) for plugin in METHODS]
    runs = [list(engine.rounds(engine.start())) for engine in engines]
    clients = [[report.metrics["clients"] for report in run] for run in runs]
    assert clients[0] == clients[1] == clients[2]
    assert len({tuple(c) for c in clients[0]}) > 1
    for name in engines[0].params:
        assert all(torch.equal(engine.params[name], engines[0].params[name]) for engine in engines)
