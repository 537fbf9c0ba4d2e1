"""Differentially private federated averaging (McMahan et al., ICLR 2018): clipped updates and Gaussian noise.

Each client scales its update Δ, over all trainable values that exist for it, to an L2 norm of at most `clip`
= C, and adds N(0, (zC)²/K) to each of them, K clients a round; so the sum over a round has noise of standard
deviation zC. As an extra it goes into every method (`--extra privacy`). With z = `noise_multiplier` = 0 it
only clips, which bounds what a single client can do, and promises no privacy.

What is promised (`accounting = "strict"`): (ε, δ)-differential privacy of clients. Two runs are neighbours if
one client's training data is replaced by other data. Replacing a client moves the sum by up to 2C, so the
accountant's noise multiplier is z/2; a round samples K of N clients uniformly without replacement, and the
rounds compose by Rényi differential privacy (dp_accounting; Wang, Balle, Kasiviswanathan, AISTATS 2019). The
promise is for who sees the models, the masks made from them, and ε. It takes a server that sees only the sum
(secure aggregation) and does not tell who was sampled. Clients that fail cost noise; ε then says so, if they
failed for reasons other than their data. Clients count alike: weights by samples would break the bound.

What is not covered: test data, on which accuracies are measured and by which a freeze policy may go back to
the best model ("released" of `pffdst`); that a run whose client diverges ends; `metrics.jsonl` (losses, who
was sampled, counts of samples and bytes), which is the experimenter's; the choice of hyper-parameters. This
is a simulation: noise is drawn in float32 from keyed streams, so whoever knows the seed can take it away.
Methods that let more than the noisy sum out are refused with what to change: masks or scores that clients
choose by their data, a first mask from gradients of their data, other aggregations than means, buffers
(BatchNorm's running statistics), sampling with replacement, uploads that a 16-bit wire rounds after the
noise. `accounting = "off"` adds the noise to any method, weighs clients as the method does, and promises
nothing.

Fidelity: McMahan et al. draw the cohort by Poisson sampling and clip per layer or whole; here it has a fixed
size, and clipping is whole. On the server their noise is added once, here by the clients in shares; the sum
is the same. Values off the mask and frozen ones are neither clipped nor noised, and count in no norm.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib.util import find_spec
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ..core import masks, rng
from ..core.config import RunConfig
from ..core.hookspecs import hookimpl
from ..core.method import Method
from ..core.part import Part
from ..core.state import Masks, Measured, Memory, Params, Uploaded


class GaussianMechanism(Part):
    """Clips each client's update and adds its share of Gaussian noise, where weights exist and train."""

    clip: float = Field(1.0, gt=0, description="C: largest L2 norm of a client's update")
    noise_multiplier: float = Field(
        1.0, ge=0, description="z: the noise of a round's sum has standard deviation z·C; 0 clips only"
    )
    delta: float = Field(1e-5, gt=0, lt=1, description="δ for which ε is reported; below 1/clients")
    accounting: Literal["strict", "off"] = Field(
        "strict", description="'strict' refuses what would break the promise; 'off' promises nothing"
    )

    def promises(self) -> bool:
        """Whether ε is reported."""
        return self.noise_multiplier > 0 and self.accounting == "strict"

    @hookimpl
    def upload(
        self,
        params: Params,
        anchor: Params,
        mask: Masks,
        frozen: Masks,
        weight: Tensor,
        cohort: int,
        key: Tensor,
    ) -> Uploaded:
        free = masks.movable(mask, frozen)
        update = masks.apply({name: p - anchor[name] for name, p in params.items()}, free)
        norm = torch.stack([u.double().square().sum() for u in update.values()]).sum().sqrt()
        whole = norm.isfinite()  # what diverged has no direction, and would be seen: it counts as no update
        scale = torch.where(whole, self.clip / norm.clamp(min=self.clip), 0.0)
        sent = {}
        for name, u in update.items():
            moved = anchor[name] + (scale * torch.where(whole, u, 0.0)).to(u.dtype)
            if self.noise_multiplier > 0:
                share = self.noise_multiplier * self.clip / cohort**0.5
                moved = moved + share * rng.normal(rng.fold(key, name), u.shape).to(u.dtype)
            # bit for bit: a client that was not clipped sends what it trained
            moved = torch.where(scale < 1, moved, moved if self.noise_multiplier > 0 else params[name])
            sent[name] = torch.where(free[name], moved, params[name]) if name in free else moved
        return Uploaded(sent, torch.ones_like(weight) if self.promises() else weight)

    @hookimpl
    def round_metrics(self, cohort: int, arrived: int, pool: int, memory: Memory) -> Measured:
        if not self.promises():
            return Measured({}, memory)
        rounds = {**memory, str(arrived): memory.get(str(arrived), 0) + 1}
        found = epsilon(rounds, cohort, pool, self.noise_multiplier, self.delta)
        return Measured({"epsilon": found, "delta": self.delta}, rounds)

    @hookimpl
    def objections(self, method: Method, config: RunConfig, buffers: tuple[str, ...] | None) -> list[str]:
        if not self.promises():
            return []
        found = [
            f'{what}; {change}, or set accounting = "off", which promises nothing'
            for what, change in leaks(method, config, buffers)
        ]
        if self.delta * config.federation.clients >= 1:
            found.append(
                f"delta is {self.delta:g}; with {config.federation.clients} clients use less than "
                f"{1 / config.federation.clients:g}: else publishing one client's data would pass as private"
            )
        if find_spec("dp_accounting") is None:
            found.append("the accountant is not installed: pip install 'fedsparse[privacy]'")
        return found


def leaks(method: Method, config: RunConfig, buffers: tuple[str, ...] | None) -> Iterator[tuple[str, str]]:
    """What lets more out than the noisy sum, each with what to change."""
    given = config.method
    readjust, aggregate, first = (
        type(part or default)
        for part, default in (
            (method.readjust, given.readjust),
            (method.aggregate, given.aggregate),
            (method.mask_init, given.mask_init),
        )
    )
    scored = "score" in readjust.takes("readjust")
    chosen = "readjust" in readjust.hooks() and getattr(method.readjust, "site", "") == "client"
    last = [type(part) for part in method.parts() if "upload" in part.hooks()][-1]
    if "probe" in first.takes("mask_init"):
        yield (
            f"{first.__name__} gets clients' data for the first mask",
            "--swap mask_init=fedavg or random",
        )
    if scored:
        yield f"{readjust.__name__} collects growth scores without noise", "--swap readjust=set"
    elif chosen:
        change = "--swap readjust=set or pffdst"
        yield f"{readjust.__name__} lets clients choose masks by their data", change
    if not vars(aggregate).get("linear", False):  # of its own contributions: inherited ones can be changed
        yield f"{aggregate.__name__} sees more than the sum of the updates", "--swap aggregate=fedavg"
    if last is not GaussianMechanism:
        yield f"{last.__name__} changes uploads after the noise", "list its plugin before this one"
    if (values := config.ledger.values) != "float32":
        yield f"ledger.values = {values!r} rounds uploads after the noise", "set ledger.values=float32"
    for name, default in (("deadline", None), ("non_finite", "stop")):
        if (value := getattr(config.faults, name)) != default:
            change = f"leave faults.{name} at its default"
            yield f"faults.{name} = {value!r} loses clients by their data", change
    if config.federation.replacement:
        yield "a client can be sampled twice a round", "set federation.replacement=false"
    if buffers:
        yield f"the model's buffers are sent without noise ({buffers[0]}, …)", "use a model without"


def epsilon(
    rounds: Mapping[str, int], cohort: int, pool: int, noise_multiplier: float, delta: float
) -> float:
    """ε at δ of so many rounds by the clients that arrived, `cohort` of `pool` sampled in each."""
    from dp_accounting.rdp import compute_epsilon
    from dp_accounting.rdp.rdp_privacy_accountant import DEFAULT_RDP_ORDERS

    total = [0.0] * len(DEFAULT_RDP_ORDERS)
    for arrived, count in rounds.items():
        if arrived == "0":
            continue  # nothing was let out
        # who did not arrive left its share of the noise out
        each = divergence(cohort, pool, noise_multiplier * (int(arrived) / cohort) ** 0.5)
        total = [before + count * one for before, one in zip(total, each, strict=True)]
    return float(compute_epsilon(DEFAULT_RDP_ORDERS, total, delta)[0])


@lru_cache(maxsize=64)
def divergence(cohort: int, pool: int, noise_multiplier: float) -> tuple[float, ...]:
    """The Rényi divergence of one round at each of the accountant's orders: a second's work."""
    import dp_accounting as dp
    from dp_accounting import rdp

    accountant = rdp.RdpAccountant(neighboring_relation=dp.NeighboringRelation.REPLACE_ONE)
    # its multiplier is relative to the sensitivity: with one client replaced the sum moves by up to 2C
    event = dp.GaussianDpEvent(noise_multiplier / 2)
    accountant.compose(dp.SampledWithoutReplacementDpEvent(pool, cohort, event))
    return tuple(map(float, accountant.rdp))


METHOD = Method(
    "privacy",
    extras=(GaussianMechanism(),),
    paper="McMahan et al., Learning Differentially Private Recurrent Language Models, ICLR 2018",
)
