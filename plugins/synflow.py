"""SynFlow (Tanaka et al., NeurIPS 2020, arXiv 2006.05467): a mask without data that keeps the flow.

R is the sum of the outputs for an all-ones input when every parameter has its absolute value. The synaptic
flow |w|·∂R/∂|w| through a hidden unit is the same on its way in as on its way out, so pruning the smallest
flow step by step, scoring anew each time, empties no layer that all flow must pass (the branch of a
residual block can go). The mask never moves afterwards.

Fidelity: the paper's algorithm 1 with its exponential schedule of 100 rounds: density (1-S)^(k/n) after
round k of n. It ranks over the whole network ("global", the preset). Evaluation mode, as in the released
code, on a copy of the model: at initialisation BatchNorm then is the identity up to its epsilon. Computed in
float64, because the flow of deep networks leaves the range of float32. Our reading: parameters that are not
prunable and named "bias" count as 0, as in the paper's equation for R; the released code takes their
absolute value, and then biases can feed a unit that has lost its inputs. Conservation needs layers that
are homogeneous: it does not hold through GroupNorm, and a network that ends in softmax has no flow at all,
which is an error.
"""

from __future__ import annotations

import copy
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.func import functional_call

from ..core import masks
from ..core.budget import Budget
from ..core.hookspecs import hookimpl
from ..core.loss import Probe, gradient
from ..core.method import Method
from ..core.part import Part
from ..core.state import Masks, Params, Scores


class Synflow(Part):
    """Prunes the smallest synaptic flow in many small steps."""

    budget_promise: ClassVar[Literal["exact"]] = "exact"

    rounds: int = Field(100, ge=1, le=10_000, description="n: scorings on the way to the budget")

    @hookimpl
    def mask_init(self, params: Params, budget: Budget, probe: Probe) -> Masks:
        mask = masks.full(params, budget)
        weights = positive(probe.of.weights(params, mask), mask)
        for k in range(1, self.rounds + 1):
            flow, total = synaptic_flow(probe, masks.apply(weights, mask), list(mask))
            if k == 1 and not 1e-6 * total < sum(float(f.sum()) for f in flow.values()) < float("inf"):
                raise ValueError(
                    "the outputs do not grow with the weights, or overflow; does the network end in softmax?"
                )
            # a weight without flow still ranks before one that is gone
            ranked = {name: torch.where(mask[name], f, -1.0) for name, f in flow.items()}
            # the last step is the budget itself, to the unit
            step = budget if k == self.rounds else budget.at(1 - (1 - budget.sparsity) ** (k / self.rounds))
            mask = masks.by_budget(ranked, step)
        return mask


def positive(weights: Params, prunable: Masks) -> Params:
    """|w| in float64; biases that cannot be pruned are 0."""
    values = {name: w.detach().double().abs() for name, w in weights.items()}
    absent = [name for name in values if name.endswith("bias") and name not in prunable]
    return values | {name: torch.zeros_like(values[name]) for name in absent}


def synaptic_flow(probe: Probe, weights: Params, names: list[str]) -> tuple[Scores, float]:
    """w·∂R/∂w of the named tensors, and R, at non-negative weights."""
    model = copy.deepcopy(probe.of.model).eval()  # the model's own mode stays as it is
    buffers = {n: b.double().abs() if b.is_floating_point() else b for n, b in probe.buffers.items()}
    ones: Tensor = torch.ones_like(probe.batch.inputs[:1], dtype=torch.float64)
    leaves = {name: weights[name].detach().requires_grad_() for name in names}
    with torch.enable_grad():
        total = functional_call(model, {**weights, **buffers, **leaves}, (ones,)).sum()
    found = gradient(total, leaves)
    return {name: (weights[name] * found[name]).abs() for name in names}, float(total.detach())


METHOD = Method(
    "synflow",
    mask_init=Synflow(),
    paper="Tanaka et al., Pruning neural networks without any data by iteratively conserving synaptic flow, "
    "NeurIPS 2020",
)
