"""Top-K, the baseline of SparsyFed (Guastella et al., ICLR 2025): clients send their largest weights.

Clients train every weight of the model that they received; after its last local epoch each keeps the
largest magnitudes of the whole network and sends those. The server averages and prunes nothing, so the
model that it sends back is denser than an upload, and weights that were pruned grow again in training.

Fidelity: the baseline as the authors of SparsyFed ran it: plain SGD, one threshold over all prunable
weights, zeros counted in the mean. The mask of the server stays full, because clients may train what is
0; bytes are those of the support, as `sends` says. `floor` generalises a guard that is commented out in
the released code (a dead layer gets its top 1 % back); 0, the default, is what was run. Our reading: what
a freeze policy froze is kept, and a smaller mask from another slot limits what grows.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from ..core import masks
from ..core.budget import Budget
from ..core.hookspecs import hookimpl
from ..core.method import Method
from ..core.part import Part
from ..core.schedule import share
from ..core.state import Aggregated, Masks, Memory, Params, Readjusted, Sums


class FullMask(Part):
    """Every weight exists, whatever the sparsity."""

    budget_promise: ClassVar[Literal["none"]] = "none"

    @hookimpl
    def mask_init(self, params: Params, budget: Budget) -> Masks:
        return masks.full(params, budget)


class GlobalTopK(Part):
    """Clients keep the largest magnitudes of the whole network after their last epoch of every round."""

    budget_promise: ClassVar[Literal["none"]] = "none"  # one threshold for the network, no count a layer
    site: ClassVar[Literal["client"]] = "client"

    floor: float = Field(
        0.0,
        ge=0,
        le=1,
        description="fraction of the density 1-S that every layer keeps in any case; 0, as published, lets "
        "layers die, which a network without residual connections does not survive; 1 is Top-K by layer",
    )

    @hookimpl
    def readjust(self, params: Params, mask: Masks, frozen: Masks, budget: Budget) -> Readjusted:
        protected = dict(frozen)
        for name, active in mask.items() if self.floor else ():
            least = share(active.numel(), self.floor * (1 - budget.sparsity))
            ranked = masks.where(active, params[name].abs(), -1.0)
            protected[name] = frozen[name] | (masks.largest(ranked, least) & active)
        kept = masks.global_top(params, mask, budget, protected)
        return Readjusted(masks.apply(params, kept), kept, {})


class PlainMean(Part):
    """The sample-weighted mean, zeros counted; nothing is pruned, and the server's mask stays as it is."""

    linear: ClassVar[bool] = True
    budget_promise: ClassVar[Literal["none"]] = "none"
    sends: ClassVar[Literal["support"]] = "support"

    @hookimpl
    def contribute(self, params: Params, weight: Tensor) -> Sums:
        return {**{name: weight * p for name, p in params.items()}, "weight": weight}

    @hookimpl
    def aggregate(self, sums: Sums, params: Params, mask: Masks, memory: Memory) -> Aggregated:
        mean = {name: sums[name] / sums["weight"] for name in params}
        union = {name: active | (mean[name] != 0) for name, active in mask.items()}
        return Aggregated(mean, union, memory)


METHOD = Method(
    "topk",
    mask_init=FullMask(),
    readjust=GlobalTopK(),
    aggregate=PlainMean(),
    paper="Guastella et al., SparsyFed: Sparse Adaptive Federated Training, ICLR 2025 (baseline)",
)
