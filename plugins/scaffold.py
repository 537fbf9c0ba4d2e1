"""SCAFFOLD (Karimireddy et al., ICML 2020, option II): control variates against client drift.

Client i keeps c_i, an estimate of its own gradient, the server c, their mean over all clients. Every local
step is w ← w - η(g - c_i + c). After K steps c_i ← c_i - c + (x - y_i)/(Kη), which is the mean of the
gradients g on the way; the client sends the change of c_i beside the model, and the server c beside it.

Fidelity: option II, η_g = 1. c_i is taken as that mean of gradients, summed up as they come: equal to the
paper's quotient for its plain SGD, and still a gradient where `federation.momentum`, which acts on the
corrected gradient, scales the steps. Weight decay counts as part of the gradient. Our reading: model and
variates are averaged by samples, so that the objective is FedAvg's (the paper's means are unweighted).
Masks: the correction acts on, and c_i changes at, trainable weights; elsewhere both rest and nothing of them
is sent, so c stays the mean of the c_i to rounding however masks move. Where a client rewires, its c_i
counts the steps before growth, too, and is that mean only roughly. Meant for both slots: with another part
in one of the two slots the other is FedAvg's.
"""

from __future__ import annotations

from torch import Tensor

from ..core import masks, optim
from ..core.budget import Budget
from ..core.hookspecs import hookimpl
from ..core.loss import ClientLoss
from ..core.method import Method
from ..core.part import Part
from ..core.state import Aggregated, Batch, Carry, Masks, Memory, Params, Stepped, Sums
from .fedavg import MaskedSgd, WeightedMean


def change(state: dict[str, Params]) -> Params:
    """c_i⁺ - c_i: the mean of g - c_i over the client's steps."""
    return {name: total / state["steps"]["taken"].clamp(min=1) for name, total in state["change"].items()}


class ControlledSgd(Part):
    """Masked SGD along g - c_i + c."""

    @hookimpl
    def client_init(
        self, params: Params, momentum: float, broadcast: Params, memory: Memory
    ) -> dict[str, Params]:
        own = memory.get("control", optim.zeros(params))
        return {
            **MaskedSgd().client_init(params, momentum),
            "own": own,
            # without a server that sends c there is nothing to correct towards
            "correction": {name: broadcast.get(f"control/{name}", c) - c for name, c in own.items()},
            "change": optim.zeros(params),
            "steps": {"taken": next(iter(params.values())).new_zeros(())},
        }

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
        grads = {name: g + weight_decay * params[name] for name, g in grads.items()}
        total = {name: state["change"][name] + g - state["own"][name] for name, g in grads.items()}
        corrected = {name: g + state["correction"][name] for name, g in grads.items()}
        params, state = optim.sgd(params, corrected, state, trainable, lr, momentum)
        steps = {"taken": state["steps"]["taken"] + 1}
        state = {**state, "change": masks.apply(total, trainable), "steps": steps}
        return Stepped(params, Carry(buffers, state), {"loss": value})

    @hookimpl
    def client_final(self, carry: Carry, memory: Memory) -> Memory:
        moved = change(carry.state)
        # the row and not `own`, which the engine clears where the client rewires
        return {"control": {n: memory["control"][n] + d if memory else d for n, d in moved.items()}}


class ControlledMean(Part):
    """FedAvg's mean, and the mean of all control variates, which goes out with the next model."""

    @hookimpl
    def contribute(self, params: Params, mask: Masks, weight: Tensor, carry: Carry) -> Sums:
        sums = WeightedMean().contribute(params, mask, weight)
        if "change" not in carry.state:
            return sums
        return sums | {f"extra/{name}": weight * d for name, d in change(carry.state).items()}

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
        made = WeightedMean().aggregate(sums, params, mask, frozen, budget, {})
        if not any(name.startswith("extra/") for name in sums):
            return made
        total = memory.get("control", optim.zeros(params))
        total = {name: c + sums[f"extra/{name}"] for name, c in total.items()}
        mean = {name: c / pool_samples for name, c in total.items()}
        mean = masks.apply(mean, masks.movable(made.mask, frozen))
        broadcast = {f"control/{name}": c for name, c in mean.items()}
        return made._replace(memory={"control": total, "broadcast": broadcast})


METHOD = Method(
    "scaffold",
    local_step=ControlledSgd(),
    aggregate=ControlledMean(),
    paper="Karimireddy et al., SCAFFOLD: Stochastic Controlled Averaging, ICML 2020",
)
