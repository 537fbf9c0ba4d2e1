"""SNIP (Lee et al., ICLR 2019, arXiv 1810.02340): keeps the connections that the loss feels most.

Before training, the gradient of the loss on one batch gives each weight its connection sensitivity
|∂L/∂c| = |w·∂L/∂w|, c = 1 being the connection's indicator; the largest stay, and the mask never moves.

Fidelity: the paper's definition; dividing by the sum of sensitivities changes no rank and is left
out. The paper ranks over the whole network ("global", the preset); other allocations rank within layers.
Our reading: the batch is the engine's sample of the pooled training data, with batch statistics in
normalisation layers; where a local step reparametrises, w is the weight that the layers use. A weight that
is exactly 0 is never sensitive: with prunable = "all" that takes biases initialised to 0, and scales of
BatchNorm are ranked as well, which FedSparsify's code leaves out. The initial weights are the framework's,
the paper asks for variance scaling.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from ..core import masks
from ..core.budget import Budget
from ..core.hookspecs import hookimpl
from ..core.loss import Probe
from ..core.method import Method
from ..core.part import Part
from ..core.state import Masks, Params


class Snip(Part):
    """Keeps the largest |w·∂L/∂w| of the initial weights."""

    budget_promise: ClassVar[Literal["exact"]] = "exact"

    @hookimpl
    def mask_init(self, params: Params, budget: Budget, probe: Probe) -> Masks:
        weights = probe.of.weights(params, masks.full(params, budget))
        gradient = probe.gradient(weights)
        sensitivity = {
            layer.name: (weights[layer.name] * gradient[layer.name]).abs() for layer in budget.layers
        }
        return masks.by_budget(sensitivity, budget)


METHOD = Method(
    "snip",
    mask_init=Snip(),
    paper="Lee et al., SNIP: Single-shot Network Pruning based on Connection Sensitivity, ICLR 2019",
)
