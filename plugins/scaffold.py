"""SCAFFOLD (Karimireddy et al., ICML 2020, option II): control variates against client drift.

Client i keeps c_i, an estimate of its own gradient, the server c, their mean over all clients. Every local
step is w ← w - η(g - c_i + c). After K steps c_i ← c_i - c + (x - y_i)/(Kη), which is the mean of the
gradients g on the way; the client sends the change of c_i beside the model, and the server c beside it.

Fidelity: option II, η_g = 1. c_i is taken as that mean of gradients, summed up as they come: equal to the
paper's quotient for its plain SGD, and still a gradient where `federation.momentum`, which acts on the
corrected gradient, scales the steps. Weight decay counts as part of the gradient. Our reading: model and
variates are averaged by samples, so that the objective is FedAvg's (the paper's means are unweighted).
Masks: the correction acts on, and c_i changes at, trainable weights; elsewhere both rest and nothing of them
is sent, so c stays the mean of the c_i to rounding however masks move. A weight that the client itself has
(re)grown takes its steps since then: uncorrected in that round, c_i⁺ the mean of their g; one without a step
keeps c_i. Meant for both slots: with another part in one of the two slots the other is FedAvg's.
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
    """c_i⁺ - c_i: the mean of g - c_i over each weight's own steps, 0 without any."""
    means = {name: total / state["steps"][name] for name, total in state["gradients"].items()}
    moved = {name: mean - state["control"][name][0] for name, mean in means.items()}
    return masks.apply(moved, {name: count > 0 for name, count in state["steps"].items()})


class ControlledSgd(Part):
    """Masked SGD along g - c_i + c."""

    @hookimpl
    def client_init(
        self, params: Params, mask: Masks, momentum: float, broadcast: Params, memory: Memory
    ) -> dict[str, Params]:
        own = memory.get("control", optim.zeros(params))
        # without a server that sends c there is nothing to correct towards
        correction = {name: broadcast.get(f"control/{name}", c) - c for name, c in own.items()}
        return {
            **MaskedSgd().client_init(params, momentum),
            "correction": masks.apply(correction, mask),
            # Σg and the steps behind it: shaped as weights, so that the engine clears what is rewired
            "gradients": optim.zeros(params),
            "steps": optim.zeros(params),
            # c_i: of another shape, so that it stays
            "control": {name: c.unsqueeze(0) for name, c in own.items()},
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
        total = {name: state["gradients"][name] + g for name, g in grads.items()}
        steps = {name: count + trainable.get(name, 1) for name, count in state["steps"].items()}
        corrected = {name: g + state["correction"][name] for name, g in grads.items()}
        params, state = optim.sgd(params, corrected, state, trainable, lr, momentum)
        state = {**state, "gradients": total, "steps": steps}
        return Stepped(params, Carry(buffers, state), {"loss": value})

    @hookimpl
    def client_final(self, carry: Carry) -> Memory:
        own = carry.state["control"]
        return {"control": {name: own[name][0] + d for name, d in change(carry.state).items()}}


class ControlledMean(Part):
    """FedAvg's mean, and the mean of all control variates, which goes out with the next model."""

    @hookimpl
    def contribute(self, params: Params, mask: Masks, weight: Tensor, moved: bool, carry: Carry) -> Sums:
        sums = WeightedMean().contribute(params, mask, weight, moved)
        if "control" not in carry.state:
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
        # clients get, and pay for, what trains next round, which may be more than now
        broadcast = {f"control/{name}": c / pool_samples for name, c in total.items()}
        return made._replace(memory={"control": total, "broadcast": broadcast})


METHOD = Method(
    "scaffold",
    local_step=ControlledSgd(),
    aggregate=ControlledMean(),
    paper="Karimireddy et al., SCAFFOLD: Stochastic Controlled Averaging, ICML 2020",
)
