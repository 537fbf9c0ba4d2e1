"""Every single-slot swap among the shipped methods keeps the contracts; loops and vmap agree."""

import pytest
import torch

from fedsparse.core import rng
from fedsparse.core.execution.sequential import trainable
from fedsparse.core.hookspecs import SLOTS
from fedsparse.core.loss import ClientLoss
from fedsparse.core.state import Carry

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
def test_three_rounds_on_digits_keep_the_contracts(make_engine, base, slot, other):
    """Contracts are on; the short periods put freezing and readjustments into the three rounds."""
    changes = {"sparsity__target": 0.7}
    readjust = other if slot == "readjust" else base
    if readjust != "fedavg":
        changes["method__readjust__period"] = 1
    if readjust == "feddst":
        changes["method__readjust__annealing"] = "constant"
    if readjust == "pffdst":
        changes |= {"method__readjust__starts": [0.0], "method__readjust__window": 0.5}
    engine = make_engine(
        base,
        [f"{slot}={other}"],
        **DIGITS,
        task__dataset__use="digits",
        federation__rounds=3,
        federation__clients=12,
        output__evaluate_every=1,
        **changes,
    )
    assert engine.contracts is not None
    reports = list(engine.rounds(engine.start()))
    assert len(reports) == 3
    budget = engine.budget(engine.clock(2))
    assert sum(int(m.sum()) for m in reports[-1].state.mask.values()) <= budget.total
    moved = sum(report.metrics["mask_changed"] for report in reports)
    freezes = (other if slot == "freeze_policy" else base) == "pffdst"
    assert (moved > 0) == (readjust != "fedavg" or freezes)


@pytest.mark.parametrize("plugin", METHODS)
@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_local_step_under_vmap_equals_the_loop(make_engine, plugin, model):
    """Three clients with masks of their own, three steps; the methods' steps and client readjustments."""
    widths = {"task__model__hidden": None} if model == "cnn" else {}
    engine = make_engine(plugin, task__model__use=model, federation__rounds=8, **widths)
    state, hooks = engine.start(), engine.hooks
    federation = engine.config.federation
    cohort = range(3)
    batches = [[engine.task.batches(c, 0, 0)[i] for c in cohort] for i in range(2)]
    frozen = {n: torch.zeros_like(m) for n, m in state.mask.items()}
    frozen["fc1.weight"] = state.mask["fc1.weight"] & (state.params["fc1.weight"] > 0)
    masks = []
    for client in cohort:
        own = {
            n: m & (frozen[n] | (rng.uniform(rng.key(client, n), m.shape) < 0.8))
            for n, m in state.mask.items()
        }
        masks.append(own)

    def train(mask, first, second):
        params = {n: torch.where(mask[n], p, 0.0) if n in mask else p for n, p in state.params.items()}
        carry = Carry(state.buffers, {"momentum": {n: torch.zeros_like(p) for n, p in params.items()}})
        for batch in (first, second):
            offered = {
                "loss": ClientLoss(engine.loss, mask, state.params),
                "params": params,
                "carry": carry,
                "batch": batch,
                "trainable": trainable(mask, frozen),
                "anchor": state.params,
                "lr": 0.05,
                "momentum": federation.momentum,
                "weight_decay": 0.001,
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
        return params, moved

    stacked = {n: torch.stack([mask[n] for mask in masks]) for n in masks[0]}
    together = [type(pair[0])(*(torch.stack(field) for field in zip(*pair, strict=True))) for pair in batches]
    params, moved = torch.func.vmap(train)(stacked, *together)
    for client in cohort:
        alone, own = train(masks[client], *(pair[client] for pair in batches))
        for name, value in alone.items():
            # batched kernels sum in another order; float32 keeps about 1e-7 relative a step
            torch.testing.assert_close(params[name][client], value, atol=1e-6, rtol=1e-5)
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
