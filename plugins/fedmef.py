"""FedMef (Huang et al., CVPR 2024, arXiv 2403.14737): squeeze weights towards 0 before they are pruned.

From a random mask, the server adjusts every layer as FedTiny does, all layers at once. Budget-aware
extrusion: in a round that ends with an adjustment, clients mark the weights θ_low that it is going to prune,
the a_t^l smallest of each layer l, and train on L + λ·‖θ_low‖², which moves what they know into the others.
So that the short budget of T steps suffices, step t takes the rate μ_t = max(η_t, β_t), where
β_t = p(t)·(2σ(‖θ_low‖) - 1)·η_0 and p(t) = (2T - 2t)/(2T - t), the REX schedule.

Fidelity: the paper's equations (2) to (5) as public code quotes them, not checked against its text; λ, ΔR,
R_stop (300 of 500 rounds) and ratio from the authors' library. Of the other half, scaled activation pruning,
there is the pruning: with `inputs` below 1 a layer keeps only its largest inputs for its weights' gradient
(the library's 0.5 when switched on); the normalised sparse convolution that the paper scales with is not
here, because it replaces the model's layers. Our reading: the budget is the round of the adjustment, t and
T count local epochs; weights are marked once, by their magnitude in the model that was downloaded; clients'
whole gradients decide on growth (see fedtiny). `period`, `stop` and `ratio` here and in `readjust` say the
same thing twice, because a part does not look into another: Progressive must be set alike, with one block.
Other readjustments have schedules of their own, and then the three say when and how much is squeezed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor

from ..core import activations, masks, optim
from ..core.hookspecs import hookimpl
from ..core.ledger import PassDensity
from ..core.loss import ClientLoss
from ..core.method import Method
from ..core.part import Part
from ..core.state import Batch, Carry, Clock, Masks, Params, Stepped
from .fedtiny import Adjustments, Progressive
from .random import RandomMask


class Extrusion(Part):
    """SGD that pulls the weights about to be pruned to 0 in the rounds that end with an adjustment."""

    agrees: ClassVar[dict[str, tuple[str, ...]]] = {"readjust": ("adjustments",)}

    strength: float = Field(0.01, ge=0, description="λ: weight of the penalty ‖θ_low‖²")
    peak_rate: float | None = Field(
        None, gt=0, description="η_0 of the extrusion's rate β; unset keeps the learning rate as it is"
    )
    inputs: float = Field(
        1.0,
        gt=0,
        le=1,
        description="fraction of its inputs that a layer keeps for the gradient of its weights",
    )
    period: int = Field(10, ge=1, description="ΔR: rounds between adjustments, as in readjust")
    stop: float = Field(0.6, gt=0, le=1, description="R_stop, as in readjust")
    ratio: float = Field(0.2, ge=0, le=1, description="a_0/n: fraction replaced at first, as in readjust")

    @property
    def adjustments(self) -> Adjustments:
        """Those that the step prepares, in every layer."""
        return Adjustments(self.period, self.stop, self.ratio)

    @property
    def whole_batches(self) -> bool:
        return self.inputs < 1  # a threshold is of all inputs of a minibatch

    @hookimpl
    def client_init(self, params: Params, mask: Masks, momentum: float) -> dict[str, Params]:
        # n for the smallest of n weights, 1 for the largest, 0 off the mask
        place = {n: (masks.rank(torch.where(m, params[n].abs(), -1.0)) + 1) * m for n, m in mask.items()}
        return {"place": place, **({"momentum": optim.zeros(params)} if momentum else {})}

    @hookimpl
    def local_step(
        self,
        loss: ClientLoss,
        params: Params,
        carry: Carry,
        batch: Batch,
        trainable: Masks,
        lr: float,
        momentum: float,
        weight_decay: float,
        target: float,
        clock: Clock,
    ) -> Stepped:
        if self.inputs < 1:
            layers = activations.layers(params)
            value, grads, carry = activations.value_and_grad(loss, params, carry, batch, layers, self.inputs)
        else:
            value, grads, carry = loss.value_and_grad(params, carry, batch)
        part = self.adjustments.fraction(clock)
        if target > 0 and part > 0:  # a dense network is not pruned
            low = marked(params, carry.state["place"], part)
            grads = {
                name: g + 2 * self.strength * low[name] if name in low else g for name, g in grads.items()
            }
            if self.peak_rate is not None:
                lr = cast(float, self.rate(low, lr, clock))  # a 0-d tensor multiplies as a number does
        params, state = optim.sgd(params, grads, carry.state, trainable, lr, momentum, weight_decay)
        return Stepped(params, Carry(carry.buffers, state), {"loss": value})

    @hookimpl
    def pass_densities(self, params: Params, density: Mapping[str, float]) -> dict[str, PassDensity]:
        return activations.pass_densities(params, density, self.inputs) if self.inputs < 1 else {}

    def rate(self, low: Params, lr: float, clock: Clock) -> Tensor:
        """μ_t = max(η_t, β_t)."""
        norm = torch.stack([values.square().sum() for values in low.values()]).sum().sqrt()
        rex = 2 * (clock.epochs - clock.epoch) / (2 * clock.epochs - clock.epoch)
        return (rex * (2 * norm.sigmoid() - 1) * (self.peak_rate or 0.0)).clamp(min=lr)


def marked(params: Params, place: Params, part: float) -> Params:
    """θ_low: the smallest fraction `part` of each layer's weights at download, as they are now, else 0."""
    low = {}
    for name, order in place.items():
        count = order.amax()
        low[name] = params[name] * (order > count - (part * count.double() + 1e-9).floor())
    return low


METHOD = Method(
    "fedmef",
    mask_init=RandomMask(),
    local_step=Extrusion(),
    readjust=Progressive(stop=0.6, ratio=0.2, blocks=1),
    paper="Huang et al., FedMef: Towards Memory-efficient Federated Dynamic Pruning, CVPR 2024",
)
