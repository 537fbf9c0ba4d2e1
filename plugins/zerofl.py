"""ZeroFL (Qiu et al., ICLR 2022), as SparsyFed compares with it: sparse passes over dense weights.

The local step is SWAT (Raihan and Aamodt, NeurIPS 2020): layers use only the largest weights of each, at
density 1-S, and keep only the largest of their inputs, at the same density, for the gradient of the
weight; that gradient is dense, and the optimiser moves every weight. After its last epoch a client sends
the largest weights of the whole network at sparsity S - r_mask (the rule Top-K-Weights).

Fidelity: Appendix A of the SparsyFed baselines. SWAT is the original: dense weights, of which each pass
takes a sparse copy; the released baseline zeroes the stored weights in place, with a threshold that
convolutions hold from the first minibatch. The first convolution is dense, and excluded from the Top-K of
SWAT only; the baseline's list of layers misses down-sampling convolutions, too, which here are sparse. Its
"FedAvgNZ" is the plain mean. Our reading: Top-K-Weights has one threshold for the network; evaluation and
export use the sparse copies, as SWAT's layers do; a network without convolutions excludes no layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from ..core import activations, masks, optim
from ..core.budget import Budget
from ..core.hookspecs import hookimpl
from ..core.ledger import PassDensity
from ..core.loss import ClientLoss
from ..core.method import Method
from ..core.part import Part
from ..core.schedule import share
from ..core.state import Batch, Carry, Masks, Params, Readjusted, Stepped
from .fedavg import MaskedSgd
from .topk import FullMask, PlainMean


class Swat(Part):
    """SGD on dense weights, of which the passes use the largest, with the largest inputs of each layer."""

    whole_batches: ClassVar[bool] = True  # a threshold is of all inputs of a minibatch

    def pruned(self, params: Params) -> list[str]:
        """Every layer but the first convolution."""
        first = next((name for name, p in params.items() if p.dim() > 2), None)
        return [name for name in activations.layers(params) if name != first]

    @hookimpl
    def effective_params(self, params: Params, target: float) -> Params:
        return params | {name: straight_through(params[name], target) for name in self.pruned(params)}

    @hookimpl
    def client_init(self, params: Params, momentum: float) -> dict[str, Params]:
        return MaskedSgd().client_init(params, momentum)

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
    ) -> Stepped:
        pruned = self.pruned(params)
        weights = params | {name: largest(params[name], target) for name in pruned}
        value, grads, carry = activations.value_and_grad(
            loss.bare, weights, carry, batch, pruned, density=1 - target
        )
        penalty, pull = loss.penalty(params)
        grads |= {name: grads[name] + pulled for name, pulled in pull.items()}
        params, state = optim.sgd(params, grads, carry.state, trainable, lr, momentum, weight_decay)
        return Stepped(params, Carry(carry.buffers, state), {"loss": value + penalty})

    @hookimpl
    def pass_densities(
        self, params: Params, density: Mapping[str, float], target: float
    ) -> dict[str, PassDensity]:
        sizes = {name: params[name].numel() for name in self.pruned(params) if name in density}
        used = {name: min(density[name], 1 - share(size, target) / size) for name, size in sizes.items()}
        return {name: PassDensity(used[name], 1 - target) for name in sizes}


def largest(weight: Tensor, sparsity: float) -> Tensor:
    """The largest weights, others 0."""
    return masks.keep_largest(weight, weight.numel() - share(weight.numel(), sparsity))


def straight_through(weight: Tensor, sparsity: float) -> Tensor:
    """The largest weights, others 0; the gradient is that of a dense layer, for all of them."""
    return weight + (largest(weight.detach(), sparsity) - weight.detach())


class UploadTopK(Part):
    """Clients keep the largest magnitudes of the whole network at sparsity S - r_mask, every round."""

    budget_promise: ClassVar[Literal["none"]] = "none"  # denser than the budget by r_mask
    site: ClassVar[Literal["client"]] = "client"

    mask_ratio: float = Field(
        0.0, ge=0, le=1, description="r_mask: fraction of all weights sent beyond the density 1-S"
    )

    @hookimpl
    def readjust(self, params: Params, mask: Masks, frozen: Masks, budget: Budget) -> Readjusted:
        denser = budget.at(max(budget.sparsity - self.mask_ratio, 0.0))
        kept = masks.global_top(params, mask, denser, frozen)
        return Readjusted(masks.apply(params, kept), kept, {})


METHOD = Method(
    "zerofl",
    mask_init=FullMask(),
    local_step=Swat(),
    readjust=UploadTopK(),
    aggregate=PlainMean(),
    paper="Qiu et al., ZeroFL: Efficient On-Device Training for Federated Learning, ICLR 2022",
)
