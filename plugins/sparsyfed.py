"""SparsyFed (Guastella et al., ICLR 2025, arXiv 2504.05153): powered weights that stay where they are 0.

Layers use ω = sign(θ)·|θ|^β, and θ is what is trained, pruned, sent and averaged. The chain rule scales
each gradient by β·|θ|^(β-1): large weights learn faster, and a weight that is 0 gets exactly none. After its
last epoch a client keeps the largest |θ| of the whole network (one threshold, sparsity S); the server
averages and prunes nothing. The next round's clients train inside the support that they received, so their
choices agree and the mean stays near S: the mask can only shrink. For the gradient of a layer's weight its
inputs are pruned to the density of that weight.

Fidelity: the algorithm as the released code runs it, but with every convolution and linear layer powered
(the code misses those in containers that number them, the source of all its regrowth). A convolution keeps
the threshold for its inputs from a client's first minibatch of the round, a linear layer takes a new one
for each; ties are kept. Top-K is on θ; the paper's figure has it on the update, which would leave the
server's model dense. Round t of R has the rate of the schedule at t from 0, the code starts at 1. Our
reading: u, which θ = sign(u)·|u|^(1/β) starts from, is the framework's own initialisation (the code draws a
truncated normal); momentum, if set, moves only the support and starts afresh in each round; the spectral
norm takes 20 iterations from the vector of ones (the code: one, from a random vector), in evaluation as in
training, where the download decides it for the round.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from ..core import activations, optim
from ..core.hookspecs import hookimpl
from ..core.ledger import PassDensity
from ..core.loss import ClientLoss
from ..core.method import Method
from ..core.part import Part
from ..core.powers import chained, with_slopes
from ..core.state import Aggregated, Batch, Carry, Masks, Memory, Params, Stepped, Sums
from .fedavg import MaskedSgd
from .topk import FullMask, GlobalTopK, PlainMean


class PoweredSgd(Part):
    """SGD on θ where layers use sign(θ)·|θ|^β, with inputs pruned for the gradient of the weight."""

    whole_batches: ClassVar[bool] = True  # a threshold is of all inputs of a minibatch

    exponent: float = Field(
        1.25,
        ge=1,
        description="β; 1 leaves the weights as they are (the paper's β = 1: with --swap aggregate=topk)",
    )
    spectral: bool = Field(
        False, description="β = 1 + mean|θ|/σ(|θ|) of each layer, σ the spectral norm, instead of `exponent`"
    )
    prune_activations: bool = Field(
        True, description="prune a layer's inputs to its weight's density, for the gradient of the weight"
    )

    @property
    def moves_zeros(self) -> bool:
        """Whether a weight that is 0 has a gradient: only where no power is taken."""
        return self.exponent == 1 and not self.spectral

    @hookimpl
    def initial_params(self, params: Params) -> Params:
        # under a spectral exponent the initial weights are θ, as in the released code
        return params if self.spectral else powered(params, self.exponents(params), inverse=True)

    @hookimpl
    def effective_params(self, params: Params) -> Params:
        return powered(params, self.exponents(params))

    def exponents(self, params: Params) -> Params:
        """β of each powered layer, 0-d."""
        powers = {name: params[name] for name in activations.layers(params)}
        if self.spectral:
            return {name: spectral_exponent(theta) for name, theta in powers.items()}
        return {n: theta.new_full((), self.exponent) for n, theta in powers.items() if self.exponent > 1}

    @hookimpl
    def client_init(self, params: Params, momentum: float) -> dict[str, Params]:
        state = MaskedSgd().client_init(params, momentum) | {"exponent": self.exponents(params)}
        return state | ({"threshold": activations.unset(params)} if self.prune_activations else {})

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
    ) -> Stepped:
        # exponents are those of the download, the whole round
        powers, slopes = with_slopes(params, carry.state["exponent"])
        if self.spectral:  # where β is 1, 0 to the power of 0 is 1: a weight that is 0 has no gradient
            slopes = {name: slope * params[name].sign().abs() for name, slope in slopes.items()}
        weights = params | powers
        if self.prune_activations:
            pruned = activations.layers(params)
            value, grads, carry = activations.value_and_grad(loss.bare, weights, carry, batch, pruned)
        else:
            value, grads, carry = loss.bare.value_and_grad(weights, carry, batch)
        grads = chained(grads, slopes)  # the chain rule, by hand because it needs the same powers
        penalty, pull = loss.penalty(params)
        grads |= {name: grads[name] + pulled for name, pulled in pull.items()}
        params, state = optim.sgd(params, grads, carry.state, trainable, lr, momentum, weight_decay)
        return Stepped(params, Carry(carry.buffers, state), {"loss": value + penalty})

    @hookimpl
    def pass_densities(self, params: Params, density: Mapping[str, float]) -> dict[str, PassDensity]:
        return activations.pass_densities(params, density) if self.prune_activations else {}


def powered(params: Params, exponents: Params, inverse: bool = False) -> Params:
    """sign(θ)·|θ|^β, or with 1/β; this form has gradient 0 at 0, where θ·|θ|^(β-1) gives NaN."""
    return params | {
        name: params[name].sign() * params[name].abs().pow(1 / beta if inverse else beta)
        for name, beta in exponents.items()
    }


def spectral_exponent(theta: Tensor) -> Tensor:
    """1 + mean(A)/σ(A) of A = |θ| as a matrix (out, rest), without gradient; 1 for a layer of zeros."""
    a = theta.detach().abs().flatten(1)
    left = torch.ones_like(a[:, 0])  # never orthogonal to the first singular vector, as A has no sign
    for _ in range(20):
        right = normalize(left @ a, dim=0)
        left = normalize(a @ right, dim=0)
    sigma = left @ a @ right
    return 1 + a.mean() / sigma.clamp_min(1e-12)


class SupportMean(Part):
    """The sample-weighted mean, zeros counted; its support is the next mask, and the server never prunes."""

    linear: ClassVar[bool] = True
    budget_promise: ClassVar[Literal["none"]] = "none"  # the union of what clients kept

    @hookimpl
    def contribute(self, params: Params, weight: Tensor) -> Sums:
        return PlainMean().contribute(params, weight)

    @hookimpl
    def aggregate(self, sums: Sums, params: Params, mask: Masks, frozen: Masks, memory: Memory) -> Aggregated:
        mean = PlainMean().aggregate(sums, params, mask, memory).params
        return Aggregated(mean, {name: (mean[name] != 0) | frozen[name] for name in mask}, memory)


METHOD = Method(
    "sparsyfed",
    mask_init=FullMask(),
    local_step=PoweredSgd(),
    readjust=GlobalTopK(),
    aggregate=SupportMean(),
    paper="Guastella et al., SparsyFed: Sparse Adaptive Federated Training, ICLR 2025",
)
