"""FLOPs of methods whose passes use fewer weights or inputs of a layer than its mask has."""

import math

import pytest
import torch

from fedsparse.core.contracts import ContractError
from fedsparse.core.ledger import forward_macs

CONV = {"task__model__use": "cnn", "task__model__hidden": 8, "task__model__widths": [4]}


def one_round(make_engine, plugin, **changes):
    """FLOPs a sample of the first step's kind, and those of each layer's dense forward pass."""
    engine = make_engine(
        plugin, **(CONV | {"federation__rounds": 1, "federation__local_epochs": 1} | changes)
    )
    (report,) = engine.rounds(engine.start())
    macs = forward_macs(engine.task.model, engine.task.dataset.input_shape, ())
    return report.metrics["flops_total"] / report.metrics["samples"], [2 * mac for mac in macs.values()]


def test_flops_count_what_swat_computes(make_engine):
    """ZeroFL: passes use 1-S of the weights, and of the inputs, but not in the first convolution."""
    found, (first, *others) = one_round(make_engine, "zerofl", sparsity__target=0.75)
    assert found == pytest.approx(3 * first + 0.75 * sum(others), rel=1e-12)


def test_flops_count_pruned_inputs_once_the_weights_are_sparse(make_engine):
    engine = make_engine("sparsyfed", **CONV, federation__rounds=2, federation__local_epochs=1)
    first, second = engine.rounds(engine.start())
    macs = forward_macs(engine.task.model, engine.task.dataset.input_shape, ())
    dense = 6 * sum(macs.values()) * first.metrics["samples"]
    assert first.metrics["flops_total"] == pytest.approx(dense, rel=1e-12)
    density = {name: m.double().mean().item() for name, m in first.state.mask.items()}
    step = sum(2 * macs[name] * (2 * d + d * d) for name, d in density.items())
    assert second.metrics["flops_total"] - dense == pytest.approx(step * second.metrics["samples"], rel=1e-9)


def test_flops_count_what_fedmef_keeps_of_the_inputs(make_engine):
    whole, _ = one_round(make_engine, "fedmef")
    half, _ = one_round(make_engine, "fedmef", method__local_step__inputs=0.5)
    assert half == pytest.approx(whole * 2.5 / 3, rel=1e-12)


def test_nothing_is_saved_where_no_inputs_are_pruned(make_engine):
    changes = {
        "sparsity__target": 0.5,
        "federation__rounds": 2,
        "method__local_step__prune_activations": False,
    }
    pruned, whole = (
        list(e.rounds(e.start()))[-1].metrics["flops_total"]
        for e in (
            make_engine("sparsyfed", **(CONV | changes | {"method__local_step__prune_activations": True})),
            make_engine("sparsyfed", **(CONV | changes)),
        )
    )
    assert pruned < whole


def test_frozen_weights_have_no_gradient_and_passes_use_no_more_than_the_mask(make_engine):
    """ZeroFL's step in PFFDST: half of the weights, of which half are frozen, under passes at 1-S = 0.5."""
    engine = make_engine("pffdst", ["local_step=zerofl"], **CONV, federation__rounds=16, sparsity__target=0.5)
    reports = list(engine.rounds(engine.start()))
    before, last = reports[-2:]
    macs = forward_macs(engine.task.model, engine.task.dataset.input_shape, ())
    first = next(iter(macs))
    mask, frozen = last.state.mask, last.state.frozen
    size = {name: m.numel() for name, m in mask.items()}
    step = 0.0
    for name, mac in macs.items():
        density = mask[name].sum().item() / size[name]
        live = (mask[name] & ~frozen[name]).sum().item() / size[name]
        passes = density if name == first else min(density, math.ceil(size[name] / 2) / size[name])
        step += 2 * mac * (2 * passes + live * (1 if name == first else 0.5))
    assert before.state.mask is mask or all(torch.equal(before.state.mask[n], m) for n, m in mask.items())
    spent = last.metrics["flops_total"] - before.metrics["flops_total"]
    epochs = engine.config.federation.local_epochs
    assert spent == pytest.approx(step * last.metrics["samples"] * epochs, rel=1e-9)


PART = """
from fedsparse import Method, PassDensity, hookimpl
from fedsparse.plugins.fedavg import MaskedSgd


class Own(MaskedSgd):
    @hookimpl
    def pass_densities(self, density):
        return {returned}


METHOD = Method("own", local_step=Own())
"""


@pytest.mark.parametrize(
    "returned",
    [
        "{name: PassDensity(1.5) for name in density}",
        "{name: PassDensity(0.1, -0.5) for name in density}",
        "{name: PassDensity('0.1') for name in density}",
        "{name: 0.1 for name in density}",
        "{'nowhere': PassDensity(0.5)}",
        "{name: PassDensity(d + 0.01) for name, d in density.items()}",
    ],
)
def test_a_hook_that_returns_no_densities_of_layers_is_named(make_engine, tmp_path, returned):
    path = tmp_path / "own.py"
    path.write_text(PART.replace("{returned}", returned), encoding="utf-8")
    engine = make_engine("random", [f"local_step={path}"], sparsity__target=0.5, federation__rounds=1)
    with pytest.raises(
        ContractError, match=r"part Own, .* hook pass_densities.*expected a PassDensity, of weights at most"
    ):
        list(engine.rounds(engine.start()))
