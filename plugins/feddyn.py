"""FedDyn (Acar et al., ICLR 2021): a dynamic regulariser aligns the clients' optima with the server's.

Client k minimises L_k(θ) - <λ_k, θ> + (α/2)·‖θ - θ_t‖² and then sets λ_k ← λ_k - α(θ_k - θ_t), its gradient
at its optimum. The server keeps h, the mean of all λ, by h ← h - (α/m)·Σ(θ_k - θ_t), and sends the mean of
the uploads minus h/α. Nothing is sent beside the model.

Fidelity: the paper's Algorithm 1; the server keeps -h/α, in which α cancels: α belongs to the clients alone.
So α → 0 makes the clients FedAvg's, not the server. Our reading: means are weighted by samples, so that the
objective is FedAvg's (the paper's are unweighted); `federation.momentum` and weight decay act on the
regularised gradient. Masks: λ and h rest where a weight is frozen and are 0 off the mask; both start at 0
where a weight is 0, which tells that the server has drawn it anew, and h also where clients have grown a
weight, which enters with its mean as value. h is the mean of the λ to rounding while the mask rests, also
after a thaw; a client that was absent while a weight left the mask and came back still holds its old λ there.
Meant for both slots: with another mean the clients' λ come to rest at any model.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from ..core import masks, optim
from ..core.budget import Budget
from ..core.hookspecs import hookimpl
from ..core.loss import ClientLoss
from ..core.method import Method
from ..core.part import Part
from ..core.state import Aggregated, Batch, Carry, Masks, Memory, Params, Stepped, Sums
from .fedavg import MaskedSgd, WeightedMean


def begun(memory: Params, params: Params, mask: Masks) -> Params:
    """λ or h at the start of a round: 0 at weights that are off the mask or have only just been drawn."""
    return masks.apply(memory, masks.support(params, mask))


class DynamicSgd(Part):
    """Masked SGD on the loss with the dynamic regulariser."""

    needs: ClassVar[dict[str, str]] = {"aggregate": "DynamicMean"}  # another mean lets λ rest at any model

    alpha: float = Field(0.1, gt=0, description="α: weight of the regulariser")

    @hookimpl
    def client_init(self, params: Params, mask: Masks, momentum: float, memory: Memory) -> dict[str, Params]:
        state = MaskedSgd().client_init(params, momentum)
        return state | {"dual": begun(memory.get("dual", optim.zeros(params)), params, mask)}

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
        value, grads, (buffers, state) = loss.value_and_grad(params, carry, batch)
        dual = state["dual"]  # λ - α(θ - θ_t), of which both regularising terms are the gradient
        grads = {name: g - dual[name] for name, g in grads.items()}
        moved, state = optim.sgd(params, grads, state, trainable, lr, momentum, weight_decay)
        # what cannot move keeps its λ: frozen; or 0, off the mask, where the engine clears what is dropped
        dual = {name: d - self.alpha * (moved[name] - params[name]) for name, d in dual.items()}
        return Stepped(moved, Carry(buffers, {**state, "dual": dual}), {"loss": value})

    @hookimpl
    def client_final(self, carry: Carry) -> Memory:
        return {"dual": carry.state["dual"]}


class DynamicMean(Part):
    """FedAvg's mean minus h/α."""

    @hookimpl
    def contribute(
        self, params: Params, mask: Masks, anchor: Params, weight: Tensor, moved: bool, carry: Carry
    ) -> Sums:
        sums = WeightedMean().contribute(params, mask, weight, moved)
        if "dual" not in carry.state:
            return sums
        drift = masks.apply({name: weight * (p - anchor[name]) for name, p in params.items()}, mask)
        return sums | {f"moved/{name}": m for name, m in drift.items()}

    @hookimpl
    def aggregate(
        self,
        sums: Sums,
        params: Params,
        mask: Masks,
        frozen: Masks,
        budget: Budget,
        pool_samples: int,
        memory: Memory,
    ) -> Aggregated:
        mean, kept, _ = WeightedMean().aggregate(sums, params, mask, frozen, budget, {})
        if not any(name.startswith("moved/") for name in sums):
            return Aggregated(mean, kept, {})
        drift = begun(memory.get("drift", optim.zeros(params)), params, mask)
        stays = {name: m & kept[name] for name, m in mask.items()}
        drift = masks.apply({name: d + sums[f"moved/{name}"] for name, d in drift.items()}, stays)
        shifted = {name: p + drift[name] / pool_samples for name, p in mean.items()}
        return Aggregated(shifted, kept, {"drift": drift})


METHOD = Method(
    "feddyn",
    local_step=DynamicSgd(),
    aggregate=DynamicMean(),
    paper="Acar et al., Federated Learning Based on Dynamic Regularization, ICLR 2021",
)
