"""The hooks: read this first when writing a method.

A sparse federated method is five decisions, each a *slot*; a *part* fills a slot by implementing its hooks
with `@hookimpl`. The classes below are the slots, their methods the hooks; each says when it is called. An
implementation takes only the arguments that it wants, by name, and returns new tensors: hooks are pure.
Client hooks see one client, must run under `torch.func.vmap` and so never branch on the value of a tensor.

Types are in `core/state.py`; all are importable from `fedsparse`. `params` holds every trainable tensor by
name; `mask` a bool tensor for each *prunable* one, on the same device; `frozen` the same for weights that no
longer change; `key` seeds `core.rng` draws; `memory` is the part's own, empty at first: nested dicts of
tensors and plain values. `target` is the user's final sparsity, `budget` this round's: `budget.layers` (name,
shape), `budget.counts[name]` (None under "global" allocation), `budget.total`, `budget.at(sparsity)`.
`core/masks.py` has the arithmetic. A part says by `budget_promise` (see `Part`) how far its masks meet the
budget.

A slot needs `mask_init`, `local_step`, `contribute` and `aggregate` from whatever part fills it; every other
hook has the default that its docstring names. A part may bring extras besides, which then travel with it.
"""

# mypy: disable-error-code="empty-body"

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from .budget import Budget
    from .config import RunConfig
    from .ledger import PassDensity, Traffic
    from .loss import ClientLoss, Probe
    from .method import Method
    from .state import (
        Aggregated,
        Batch,
        Best,
        Carry,
        Clock,
        Frozen,
        Masks,
        Measured,
        Memory,
        Params,
        Readjusted,
        Report,
        Scores,
        Stepped,
        Sums,
        Uploaded,
    )

PROJECT = "fedsparse"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

# The stubs below are specifications: bodies are docstrings, called by nobody.


class MaskInit:
    """Which weights exist in round 0."""

    @hookspec(firstresult=True)
    def mask_init(self, params: Params, budget: Budget, probe: Probe, key: Tensor) -> Masks:
        """Once, on the server, before round 0.

        `params` are the dense initial weights; `probe` gives loss and gradients on a sample of the training
        data (SNIP, GraSP). Return a mask for every layer of `budget`; a part whose `budget_promise` is
        "exact" must meet the counts to the unit. Equations of this kind: ER/ERK at random, magnitude,
        saliency at initialisation.
        """


class LocalStep:
    """One optimiser step of one client, and what surrounds it."""

    @hookspec(firstresult=True)
    def initial_params(self, params: Params) -> Params:
        """Once, before `mask_init`: maps the framework's initial weights. Default: identity."""

    @hookspec(firstresult=True)
    def effective_params(self, params: Params, mask: Masks, target: float) -> Params:
        """In every forward pass of training and evaluation, and on export: the weights the layers use.

        For reparametrisations (w = θ·|θ|^(β-1)). Return an entry for every parameter. Default: identity.
        """

    @hookspec(firstresult=True)
    def client_init(
        self, params: Params, mask: Masks, momentum: float, broadcast: Params, memory: Memory
    ) -> dict[str, Params]:
        """When a client starts its round: the fresh optimiser state, by name, e.g. {"momentum": zeros}.

        `memory` is this client's row, as its last `client_final` left it. `broadcast` holds what the
        `aggregate` part keeps in memory["broadcast"]: tensors sent to every client beside the model, and
        charged (SCAFFOLD's control variate); empty if there are none. Default: no state.
        """

    @hookspec(firstresult=True)
    def local_step(
        self,
        loss: ClientLoss,
        params: Params,
        carry: Carry,
        batch: Batch,
        trainable: Masks,
        anchor: Params,
        lr: float,
        momentum: float,
        weight_decay: float,
        target: float,
        clock: Clock,
        key: Tensor,
    ) -> Stepped:
        """For every minibatch: the hot hook, a function of its arguments alone.

        Executors stack it, capture it, and run its operations again from a recording, without calling it.
        `loss.value_and_grad(params, carry, batch)` gives loss, gradients and the carry with new buffers.
        `trainable` (mask & ~frozen) lists only tensors that have an entry which must not move; those
        entries must come back bit-identical. `anchor` is what the client downloaded. `core.optim.sgd` does
        all this. Metrics must hold "loss".
        """

    @hookspec(firstresult=True)
    def client_final(self, params: Params, anchor: Params, carry: Carry, memory: Memory) -> Memory:
        """After a client's last step: its row for its next participation (SCAFFOLD, kept momentum).

        Default: none.
        """

    @hookspec(firstresult=True)
    def pass_densities(
        self, params: Params, density: Mapping[str, float], target: float
    ) -> dict[str, PassDensity]:
        """For the FLOPs, in round 0 and when mask or frozen set have changed: what steps compute of layers.

        `density` is the fraction of active weights in [0, 1] by the name of each layer's weights; of
        `params` only shapes matter. Return entries for layers of which passes use fewer weights than these,
        in the output and in the gradient of the inputs, or fewer inputs in that of the weights. Default:
        none does.
        """


class FreezePolicy:
    """Which weights stop changing, and the base sparsity from then on."""

    @hookspec(firstresult=True)
    def base_sparsity(self, target: float, clock: Clock) -> float:
        """Every round: the sparsity in [0, 1) that this phase of training aims at. Default: `target`."""

    @hookspec(firstresult=True)
    def freeze(
        self,
        params: Params,
        mask: Masks,
        frozen: Masks,
        target: float,
        budget: Budget,
        clock: Clock,
        key: Tensor,
        memory: Memory,
        best: Best | None,
    ) -> Frozen | None:
        """At the start of every round, on the server; None changes nothing.

        `frozen` returned must lie within the mask returned; it may also name unprunable parameters. Newly
        active weights start at 0. Values change only by going back to `best`, the evaluated model of best
        accuracy so far (None before the first evaluation), which is kept if a part asks for it.
        """


class Readjust:
    """How the mask moves. The part's attribute `site` says where: "client", "server:start", "server:end"."""

    @hookspec(firstresult=True)
    def target_sparsity(self, base: float, target: float, clock: Clock) -> float:
        """Every round, after `base_sparsity`: the sparsity of the round's budget. Default: `base`."""

    @hookspec(firstresult=True)
    def due(self, clock: Clock, budget: Budget) -> bool:
        """Whether `readjust` runs: asked every round on a server, and on a client after each local epoch.

        `clock.epoch` counts completed local epochs: 0 is before training. Default: a server always, a
        client after the last epoch.
        """

    @hookspec(firstresult=True)
    def grow_score(self, params: Params, dense_grad: Params) -> Scores:
        """When due and `readjust` takes `score`: a score for each prunable weight, from the dense gradient.

        The gradient is of the plain loss on `score_batches` minibatches (attribute of the part, default 1).
        On the server, the scores of the clients are averaged with their weights. Default: |gradient|.
        """

    @hookspec(firstresult=True)
    def readjust(
        self,
        params: Params,
        mask: Masks,
        frozen: Masks,
        score: Scores,
        target: float,
        budget: Budget,
        clock: Clock,
        key: Tensor,
        memory: Memory,
    ) -> Readjusted:
        """When due: drops and grows. Dropped and newly grown weights are 0, frozen ones untouched.

        On a client `memory` is empty and not kept, and the engine clears the optimiser state wherever mask
        or value changed. Asking for `score` costs a dense gradient; without it none is computed.
        """


class Aggregate:
    """How uploads become the next global model."""

    @hookspec(firstresult=True)
    def contribute(
        self, params: Params, mask: Masks, anchor: Params, weight: Tensor, carry: Carry, moved: bool
    ) -> Sums:
        """For every client that reports: tensors by name that the engine adds over these.

        `weight` is the client's number of training samples, 0-d, or what an `upload` part made of it.
        `moved` is the same for all clients of a round: whether they readjust in it, so that masks may
        differ from the server's. Buffers are averaged by the engine. What is named "extra/…" is
        charged as sent beside the model; where the rest of its name is a parameter's, it arrives as 0
        wherever that does not train. A part whose attribute `sends` is "support" (default "mask")
        sends what is not 0, both ways, not all that the mask allows (Top-K). A part whose attribute
        `gathered` is True gets the contributions of all clients stacked instead of added; every
        worker then holds as many of them as the round has clients.
        """

    @hookspec(firstresult=True)
    def aggregate(
        self,
        sums: Sums,
        params: Params,
        mask: Masks,
        frozen: Masks,
        budget: Budget,
        pool_samples: int,
        key: Tensor,
        memory: Memory,
    ) -> Aggregated:
        """Once a round: the next global model from the summed contributions; zero off the mask it returns.

        For a `gathered` part `sums` holds them stacked, clients first, in the order in which they were
        sampled, whatever the executor and the workers, and in the types that clients sent.
        `pool_samples` counts the training samples of all clients of the pool, sampled this round or not. The
        sums are of the clients that reported: fewer than were sampled, if `[faults]` says so. A round in
        which nobody did leaves the model as it is, without this hook and `readjust` at "server:end".

        The engine writes frozen values back afterwards, so that rounding cannot move them.
        """


class Extras:
    """Hooks that any part may bring, any number of them."""

    @hookspec
    def penalty(self, params: Params, anchor: Params) -> Tensor:
        """In every step: a 0-d term added to the training loss (FedProx is one line)."""

    @hookspec
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
        """For every client after its training, before `contribute`: what it sends in place of its model.

        Several parts run one after another, as they are listed. `anchor` is what the client downloaded,
        `mask` its own, `weight` what it counts in the aggregate: its training samples, 0-d, unless a part
        before said otherwise; `cohort` counts the clients that a round samples. Zeros off the mask and
        frozen values stay bit-identical. What the client itself keeps, its buffers and what `contribute`
        takes from `carry` are not touched.
        """

    @hookspec(firstresult=True)
    def paper_bytes(self, traffic: Traffic) -> float:
        """For every client and round: the bytes, both ways, by the paper's own formula."""

    @hookspec
    def round_metrics(self, clock: Clock, cohort: int, arrived: int, pool: int, memory: Memory) -> Measured:
        """After every round: more numbers for its line of `metrics.jsonl`.

        Of `pool` clients `cohort` are sampled a round, and the uploads of `arrived` were aggregated.
        `memory` is for this hook alone, apart from that of a slot, and checkpointed.
        """

    @hookspec
    def objections(self, method: Method, config: RunConfig, buffers: tuple[str, ...] | None) -> list[str]:
        """When a run is put together: why the part must not take part in it, and what to do; [] if it may.

        Asked twice: before the model exists, when `buffers` is None, and then with the names of its buffers.
        """

    @hookspec
    def on_run_begin(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Before the first round of a run or of its resumption: its folder and its settings as tables."""

    @hookspec
    def on_run_end(self, summary: Mapping[str, Any]) -> None:
        """After the last round, or Ctrl-C: what `summary.json` holds. Not after an error."""

    @hookspec
    def on_round_end(self, report: Report) -> None:
        """After every round: the metrics record and the state, to read only."""


SLOTS: dict[str, type] = {
    "mask_init": MaskInit,
    "local_step": LocalStep,
    "freeze_policy": FreezePolicy,
    "readjust": Readjust,
    "aggregate": Aggregate,
}


def hooks_of(spec: type) -> tuple[str, ...]:
    """Names of the hooks that a class above specifies."""
    return tuple(name for name in vars(spec) if not name.startswith("_"))
