"""A breach by one client of several names that client, whichever executor checks it, and whenever."""

import dataclasses
from typing import ClassVar, Literal

import pytest
import torch
from pydantic import Field

from fedsparse.core import rng, task
from fedsparse.core.contracts import OPEN, ContractError
from fedsparse.core.engine import Engine
from fedsparse.core.hookspecs import hookimpl
from fedsparse.core.part import Part
from fedsparse.core.state import Readjusted, Stepped
from fedsparse.plugins.fedavg import MaskedSgd

from . import simulated

KINDS = ("sequential", "vectorised", "graph")
BAD = 4  # of six clients, all of which take part
EVERYBODY = {"federation__clients_per_round": 6, "execution__chunk": 3, "federation__local_epochs": 1}


class Spoils(Part):
    """Readjusts one client's model in a way that it must not."""

    site: ClassVar[Literal["client"]] = "client"
    budget_promise: ClassVar[Literal["exact"]] = "exact"

    how: Literal["off the mask", "nan", "budget"] = Field("nan", description="what is spoiled")

    @hookimpl
    def readjust(self, params, mask, key):
        bad = key == rng.number(0, "readjust", 0, BAD, 1)
        name = "fc1.weight"
        value, active = params[name], mask[name]
        if self.how == "off the mask":
            value = torch.where(bad, 1.0, value)
        if self.how == "nan":
            value = torch.where(bad & active, torch.nan, value)
        if self.how == "budget":
            first = torch.zeros_like(active).flatten().index_fill(0, torch.tensor(0), True).view(active.shape)
            active = active ^ (bad & first)
            value = torch.where(active, value, 0.0)
        return Readjusted({**params, name: value}, {**mask, name: active}, {})


class Leaks(Part):
    """One client's step writes off the mask; `raises`, that client's row cannot be made afterwards."""

    raises: bool = Field(False, description="whether a later hook fails because of it")

    @hookimpl
    def local_step(self, loss, params, carry, batch, trainable, lr, momentum, weight_decay, key):
        made = MaskedSgd().local_step(loss, params, carry, batch, trainable, lr, momentum, weight_decay)
        bad = torch.zeros((), dtype=torch.bool, device=key.device)
        for epoch, index in ((0, 0), (0, 1), (0, 2)):
            bad = bad | (key == rng.fold(_stream(key.device), epoch, index))
        moved = {name: torch.where(bad, 1.0, p) for name, p in made.params.items()}
        return Stepped(moved, made.carry, made.metrics)

    @hookimpl
    def client_final(self, params):
        if self.raises and float(params["fc1.weight"].mean()) > 0.5:
            raise ValueError("a client of ones")
        return {}


def _stream(device):
    return rng.key(0, "step", 0, BAD, device=device)


def engine(make_resolved, part, slot, **changes):
    made = make_resolved("fedavg", federation__momentum=0.0, **EVERYBODY, **changes)
    method = dataclasses.replace(made.method, **{slot: part})
    made = dataclasses.replace(made, method=method)
    return Engine(made, task.build(made.config))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("off the mask", "not 0 off the mask"),
        ("nan", "NaN or infinity"),
        ("budget", "active weights; the budget"),
    ],
)
def test_a_readjustment_of_one_client_that_breaks_names_it(make_resolved, kind, how, said):
    made = engine(make_resolved, Spoils(how=how), "readjust", execution__executor=kind)
    with pytest.raises(ContractError, match=rf"part Spoils, .*round 0, client {BAD}: .*{said}"):
        next(made.rounds(made.start()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("device", ["cpu", "simulated"])
def test_a_step_of_one_client_that_breaks_names_it(make_resolved, monkeypatch, kind, device):
    """On a device, clients one after another are looked at together at the end."""
    if device == "simulated" and not simulated.available:
        pytest.skip("this PyTorch has no backends written in Python")
    with simulated.simulated() as there:
        if device == "simulated":
            monkeypatch.setattr(task, "choose_device", lambda name: there)
        made = engine(make_resolved, Leaks(), "local_step", execution__executor=kind)
        with pytest.raises(
            ContractError, match=rf"part Leaks, .*round 0, client {BAD}: .*not 0 off the mask"
        ):
            next(made.rounds(made.start()))
        assert not made.contracts.open


@pytest.mark.skipif(not simulated.available, reason="this PyTorch has no backends written in Python")
def test_a_breach_is_told_before_the_error_that_it_caused(make_resolved, monkeypatch):
    with simulated.simulated() as there:
        monkeypatch.setattr(task, "choose_device", lambda name: there)
        changes = {"execution__executor": "sequential"}
        made = engine(make_resolved, Leaks(raises=True), "local_step", **changes)
        with pytest.raises(ContractError, match=rf"client {BAD}: .*not 0 off the mask"):
            next(made.rounds(made.start()))
        unchecked = engine(
            make_resolved, Leaks(raises=True), "local_step", **changes, execution__contracts=False
        )
        with pytest.raises(Exception, match="a client of ones"):
            next(unchecked.rounds(unchecked.start()))


@pytest.mark.skipif(not simulated.available, reason="this PyTorch has no backends written in Python")
def test_an_interrupted_round_leaves_nothing_to_be_judged_later(make_resolved, monkeypatch):
    with simulated.simulated() as there:
        monkeypatch.setattr(task, "choose_device", lambda name: there)
        made = engine(make_resolved, Leaks(), "local_step", execution__executor="sequential")
        upload = made.executor.upload

        def interrupted(plan, client, uploads):
            upload(plan, client, uploads)
            if client.number == BAD:
                raise KeyboardInterrupt

        made.executor.upload = interrupted
        with pytest.raises(KeyboardInterrupt):
            next(made.rounds(made.start()))
        assert not made.contracts.open


def test_open_checks_are_few(make_resolved):
    """However many clients a round has."""
    made = engine(make_resolved, MaskedSgd(), "local_step")
    state, where = made.start(), made.hooks.where("local_step")
    for _ in range(OPEN + 3):
        made.contracts.values(where, state.params, state.mask, later=True)
    assert len(made.contracts.open) == 3
