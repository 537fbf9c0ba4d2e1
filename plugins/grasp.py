"""GraSP (Wang et al., ICLR 2020, arXiv 2002.07376): keeps the connections that carry the gradient flow.

Removing weight w changes the squared norm of the gradient, to first order, by -w·(Hg) (times 2). GraSP
prunes the weights with the largest -w·(Hg), whose removal lets the norm grow or hurts it least; so those
with the largest w·(Hg), signed, stay, and the mask never moves.

Fidelity: the paper's score and its sign; g and H are taken over the prunable weights, as in the
released code. The paper ranks over the whole network ("global", the preset). Our reading: g and H come
from one and the same sample of the pooled training data (released: two halves of a class-balanced one, and
BatchNorm with its running statistics, here with the batch's);
where a local step reparametrises, w is the weight that the layers use. Differs from the released code:
logits are not divided by its temperature 200, because the probe's loss is the training loss.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from ..core import masks
from ..core.budget import Budget
from ..core.hookspecs import hookimpl
from ..core.loss import Probe, gradient
from ..core.method import Method
from ..core.part import Part
from ..core.state import Masks, Params


class Grasp(Part):
    """Keeps the largest w·(Hg) of the initial weights."""

    budget_promise: ClassVar[Literal["exact"]] = "exact"

    @hookimpl
    def mask_init(self, params: Params, budget: Budget, probe: Probe) -> Masks:
        weights = probe.of.weights(params, masks.full(params, budget))
        product = hessian_gradient(probe, weights, [layer.name for layer in budget.layers])
        return masks.by_budget({name: weights[name] * hg for name, hg in product.items()}, budget)


def hessian_gradient(probe: Probe, weights: Params, names: list[str]) -> Params:
    """Hg of the probe's loss over the named tensors: the gradient of g·stop(g)."""
    leaves = {name: weights[name].detach().requires_grad_() for name in names}
    value = probe.loss({**weights, **leaves})
    first = torch.autograd.grad(value, list(leaves.values()), create_graph=True, materialize_grads=True)
    with torch.enable_grad():
        flow = torch.stack([(g * g.detach()).sum() for g in first]).sum()
    return gradient(flow, leaves)


METHOD = Method(
    "grasp",
    mask_init=Grasp(),
    paper="Wang et al., Picking Winning Tickets Before Training by Preserving Gradient Flow, ICLR 2020",
)
