"""Adaptive parameter freezing (APF; Chen et al., ICDCS 2021): parameters that only oscillate stay put.

Every `period` rounds the server takes the update Δ of each scalar since its last check and moves two
averages, E ← αE + (1-α)Δ and A ← αA + (1-α)|Δ|. The effective perturbation P = |E|/A is 1 for a steady
drift and near 0 for oscillation. A scalar with P below the threshold T_s is stable: its freezing length
grows by one check, else it is halved. It is frozen for that many checks, then trains for one and is checked
again; E and A rest while it is frozen. When most scalars are frozen, T_s is halved.

Fidelity: equations as in the released code, with the paper's α = 0.99 and T_s = 0.05 (the code: 0.95, 0.1)
and a check every 5 synchronisations; rounds are counted, where code and paper count local iterations. Every
parameter is checked, biases and normalisation too. Our reading, for sparse networks: only active weights can
be frozen; one that is off the mask at a check forgets its history; the
80 % are of the scalars that exist. Lengths count checks, so "additive increase" adds one check. The paper's
extension that also freezes scalars at random is not here.
"""

from __future__ import annotations

import torch
from pydantic import Field

from ..core import masks
from ..core.hookspecs import hookimpl
from ..core.ledger import Traffic
from ..core.method import Method
from ..core.part import Part
from ..core.state import Clock, Frozen, Masks, Memory, Params


class FreezeStable(Part):
    """Freezes scalars whose updates cancel out, for longer each time that they are found stable."""

    threshold: float = Field(
        0.05, gt=0, lt=1, description="T_s: stable below this effective perturbation; above 1-alpha to act"
    )
    alpha: float = Field(0.99, ge=0, lt=1, description="α: memory of the moving averages")
    period: int = Field(5, ge=1, description="F_c: rounds between checks")
    tighten: float = Field(
        0.8, gt=0, le=1, description="T_s is halved when more than this fraction of the scalars is frozen"
    )

    @hookimpl
    def freeze(
        self, params: Params, mask: Masks, frozen: Masks, clock: Clock, memory: Memory
    ) -> Frozen | None:
        if clock.round % self.period:
            return None
        number = clock.round // self.period
        if not memory:
            zeros = {name: torch.zeros_like(p) for name, p in params.items()}
            never = {name: z.to(torch.int32) for name, z in zeros.items()}
            held = {"drift": zeros, "size": zeros, "length": never, "thaw": never, "params": params}
            return Frozen(frozen, mask, {**held, "threshold": self.threshold})
        new: dict[str, Params] = {"drift": {}, "size": {}, "length": {}, "thaw": {}}
        still, exists = {}, {}
        for name, value in params.items():
            update, old = value - memory["params"][name], {kind: memory[kind][name] for kind in new}
            drift = self.alpha * old["drift"] + (1 - self.alpha) * update
            size = self.alpha * old["size"] + (1 - self.alpha) * update.abs()
            stable = drift.abs() < memory["threshold"] * size
            length = torch.where(stable, old["length"] + 1, old["length"] // 2)
            checked = {"drift": drift, "size": size, "length": length, "thaw": number + length}
            trained = old["thaw"] < number  # since the last check; what was frozen is not judged
            exists[name] = mask[name] if name in mask else torch.ones_like(trained)
            for kind, now in checked.items():
                new[kind][name] = torch.where(trained, now, old[kind]).masked_fill(~exists[name], 0)
            still[name] = new["thaw"][name] > number
        share = sum(masks.active(still).values()) / sum(masks.active(exists).values())
        threshold = memory["threshold"] / 2 if share > self.tighten else memory["threshold"]
        return Frozen(still, mask, {**new, "params": params, "threshold": threshold})


class UnfrozenCost(Part):
    """Bytes as the paper counts them: 32 bits both ways for each prunable weight that is not frozen, and
    for each unmasked parameter."""

    @hookimpl
    def paper_bytes(self, traffic: Traffic) -> float:
        return 4.0 * (traffic.active + traffic.active_upload - 2 * traffic.frozen + 2 * traffic.unmasked)


METHOD = Method(
    "apf",
    freeze_policy=FreezeStable(),
    extras=(UnfrozenCost(),),
    paper="Chen et al., Communication-Efficient Federated Learning with Adaptive Parameter Freezing, "
    "ICDCS 2021",
)
