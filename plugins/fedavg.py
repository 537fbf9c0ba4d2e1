"""FedAvg (McMahan et al., AISTATS 2017): the default part of every slot.

With a sparsity target it trains a fixed mask: the largest weights of the initialisation under the
allocation rule ("RandomMask" of the FedDST paper), averaged as they are.

Fidelity: clients are weighted by their number of samples and sampled without replacement; local momentum
starts at zero every round.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from ..core import masks, optim
from ..core.budget import Budget
from ..core.hookspecs import hookimpl
from ..core.loss import ClientLoss
from ..core.method import Method
from ..core.part import Part
from ..core.state import Aggregated, Batch, Carry, Masks, Memory, Params, Stepped, Sums


class MagnitudeMask(Part):
    """Keeps the largest initial weights of each layer; everything at sparsity 0."""

    budget_promise: ClassVar[Literal["exact"]] = "exact"

    @hookimpl
    def mask_init(self, params: Params, budget: Budget) -> Masks:
        return masks.by_budget({layer.name: params[layer.name].abs() for layer in budget.layers}, budget)


class MaskedSgd(Part):
    """SGD with momentum and weight decay on the trainable weights."""

    @hookimpl
    def client_init(self, params: Params, momentum: float) -> dict[str, Params]:
        return {"momentum": optim.zeros(params)} if momentum else {}

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
        value, grads, carry = loss.value_and_grad(params, carry, batch)
        params, state = optim.sgd(params, grads, carry.state, trainable, lr, momentum, weight_decay)
        return Stepped(params, Carry(carry.buffers, state), {"loss": value})


class NoFreezing(Part):
    """Every weight keeps training; one phase at the target sparsity."""

    @hookimpl
    def base_sparsity(self, target: float) -> float:
        return target


class NoReadjustment(Part):
    """The mask never moves."""

    @hookimpl
    def target_sparsity(self, base: float) -> float:
        return base


class WeightedMean(Part):
    """The sample-weighted mean of all clients; a weight that a client lacks counts as 0.

    If clients moved their masks, the union is pruned back to the budget by magnitude.
    """

    linear: ClassVar[bool] = True

    @hookimpl
    def contribute(self, params: Params, mask: Masks, weight: Tensor, moved: bool) -> Sums:
        held = {f"held/{name}": m.to(weight.dtype) for name, m in mask.items()} if moved else {}
        return {**{name: weight * p for name, p in params.items()}, **held, "weight": weight}

    @hookimpl
    def aggregate(
        self, sums: Sums, params: Params, mask: Masks, frozen: Masks, budget: Budget, memory: Memory
    ) -> Aggregated:
        mean = {name: sums[name] / sums["weight"] for name in params}
        union = {name: sums.get(f"held/{name}", m) > 0 for name, m in mask.items()}
        kept = masks.prune_smallest(mean, union, budget, frozen)
        return Aggregated(masks.apply(mean, kept), kept, memory)


METHOD = Method(
    "fedavg",
    mask_init=MagnitudeMask(),
    local_step=MaskedSgd(),
    freeze_policy=NoFreezing(),
    readjust=NoReadjustment(),
    aggregate=WeightedMean(),
    paper="McMahan et al., Communication-Efficient Learning of Deep Networks, AISTATS 2017",
)
