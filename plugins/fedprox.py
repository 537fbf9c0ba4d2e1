"""FedProx (Li et al., MLSys 2020): FedAvg whose clients are held near the model that they downloaded.

Every client minimises its loss plus (μ/2)·‖w - w_t‖², w_t being the download; all else is FedAvg.

Fidelity: the term covers all parameters, masked weights included at 0, and acts: the one of the FedDST
code is built from detached tensors, so that its gradient is 0 and the published "+FedProx" figures are
reruns without it. It is part of the reported training loss. The term belongs to the local step and travels
with it: FedDST+FedProx is `--plugin feddst --swap local_step=fedprox`, where growth scores are of the plain
loss, as they are in FedDST's code. The paper's γ-inexact local solutions are a number of local epochs; its
dropping of stragglers is not modelled.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from ..core.hookspecs import hookimpl
from ..core.loss import ClientLoss
from ..core.method import Method
from ..core.part import Part
from ..core.state import Batch, Carry, Masks, Params, Stepped
from .fedavg import MaskedSgd


class ProximalSgd(Part):
    """FedAvg's masked SGD on the loss with the proximal term."""

    mu: float = Field(1.0, ge=0, description="μ: weight of the proximal term; 0 is FedAvg")

    @hookimpl
    def penalty(self, params: Params, anchor: Params) -> Tensor:
        return self.mu / 2 * torch.stack([(p - anchor[n]).square().sum() for n, p in params.items()]).sum()

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
    ) -> Stepped:
        return MaskedSgd().local_step(loss, params, carry, batch, trainable, lr, momentum, weight_decay)


METHOD = Method(
    "fedprox",
    local_step=ProximalSgd(),
    paper="Li et al., Federated Optimization in Heterogeneous Networks, MLSys 2020",
)
