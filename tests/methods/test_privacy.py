"""Clipping and noise: norms and statistics, where they act, and the ε that is reported."""

import math
from dataclasses import replace
from typing import ClassVar

import dp_accounting as dp
import pytest
import torch
from dp_accounting import rdp

from fedsparse import Aggregated, Part, hookimpl, masks, rng
from fedsparse.core.errors import ConfigError
from fedsparse.core.execution.workers import join, launch, leave
from fedsparse.core.hookspecs import SLOTS
from fedsparse.core.registry import Registry
from fedsparse.core.state import Uploaded
from fedsparse.plugins.privacy import GaussianMechanism, epsilon

NAMES = Registry().names()
EXTRA = "method__extras__GaussianMechanism__"


def play(engine):
    return list(engine.rounds(engine.start()))


def client(free=1000, seed=0):
    """A model with masked and frozen weights, what a client made of it, and where it may change."""
    anchor = {"w": torch.randn(free * 2, generator=torch.Generator().manual_seed(seed)), "b": torch.ones(7)}
    mask = {"w": torch.arange(free * 2) % 4 != 0}
    frozen = {"w": torch.arange(free * 2) % 4 == 1, "b": torch.arange(7) < 2}
    anchor = masks.apply(anchor, mask)
    moves = masks.apply(
        {name: torch.full_like(p, 0.3) for name, p in anchor.items()}, masks.movable(mask, frozen)
    )
    return anchor, mask, frozen, {name: p + moves[name] for name, p in anchor.items()}


def sent(part, key=0, cohort=4, **changed):
    anchor, mask, frozen, params = client(**changed)
    made = part.upload(params, anchor, mask, frozen, torch.tensor(37.0), cohort, rng.key(key))
    return {name: p - anchor[name] for name, p in made.params.items()}, made, (anchor, mask, frozen, params)


def test_updates_are_clipped_to_the_norm_and_only_if_longer():
    for clip in (0.01, 1.0, 5.0):
        update, made, (_, mask, frozen, params) = sent(GaussianMechanism(clip=clip, noise_multiplier=0))
        norm = math.sqrt(sum(u.double().square().sum().item() for u in update.values()))
        assert norm == pytest.approx(clip, rel=1e-4)  # values near 1 hold moves to 1e-7
        free = masks.movable(mask, frozen)
        assert all((update[name][~free[name]] == 0).all() for name in free)
        moved = torch.cat([u[free[n]] for n, u in update.items()])
        assert moved.max() - moved.min() < 1e-6  # it was 0.3 everywhere, so the direction is kept
        assert made.weight == 37
    _, made, (*_, params) = sent(GaussianMechanism(clip=100, noise_multiplier=0))
    assert all(torch.equal(made.params[name], p) for name, p in params.items())


def test_noise_is_normal_on_free_weights_and_nowhere_else():
    part = GaussianMechanism(clip=2.0, noise_multiplier=3.0)
    quiet = sent(GaussianMechanism(clip=2.0, noise_multiplier=0), free=20_000)[0]
    loud, made, (anchor, mask, frozen, _) = sent(part, free=20_000, cohort=9)
    free = masks.movable(mask, frozen)
    for name, where in free.items():
        assert torch.equal(made.params[name][~where], anchor[name][~where])
    noise = (loud["w"] - quiet["w"])[free["w"]].double()
    std, n = 3.0 * 2.0 / 3, len(noise)  # z·C/√K
    assert n == 20_000
    assert abs(noise.mean()) < 5 * std / math.sqrt(n)
    assert noise.std() == pytest.approx(std, rel=5 / math.sqrt(2 * n))
    # the tails of a normal distribution: 4.55 % beyond two deviations
    beyond = (noise.abs() > 2 * std).double().mean()
    assert beyond == pytest.approx(0.0455, abs=5 * math.sqrt(0.0455 / n))
    assert made.weight == 1  # clients count alike, or the bound would not hold
    again, other = sent(part, free=20_000, cohort=9)[0], sent(part, key=1, free=20_000, cohort=9)[0]
    assert torch.equal(again["w"], loud["w"])
    assert abs(torch.corrcoef(torch.stack([loud["w"], other["w"]]) - quiet["w"])[0, 1]) < 0.03


def test_noise_differs_by_round_and_client_and_agrees_in_every_executor(make_engine):
    runs = []
    for kind in ("sequential", "vectorised", "graph"):
        engine = make_engine(
            "fedavg", federation__rounds=2, execution__executor=kind, execution__chunk=2, extras=["privacy"]
        )
        runs.append(play(engine)[-1].state.params)
    for other in runs[1:]:
        for name, value in runs[0].items():
            torch.testing.assert_close(other[name], value, atol=1e-5, rtol=1e-4)
    keys = [engine.executor.upload_key(plan(round_), number) for round_ in (0, 1) for number in (0, 1)]
    assert len({int(key) for key in keys}) == 4


def plan(round_):
    from types import SimpleNamespace

    return SimpleNamespace(clock=SimpleNamespace(round=round_))


def noisy(make_engine):
    torch.set_num_threads(1)
    join()
    try:
        return numbers(make_engine)
    finally:
        leave()


def numbers(make_engine):
    report = play(make_engine("fedavg", federation__rounds=3, extras=["privacy"]))[-1]
    return {n: p.numpy() for n, p in report.state.params.items()}, report.metrics["epsilon"]


def test_two_workers_send_the_same_noise(make_engine):
    (one, ε), (two, other) = numbers(make_engine), launch(2, noisy, make_engine)
    assert ε == other
    for name, value in one.items():
        torch.testing.assert_close(torch.from_numpy(two[name]), torch.from_numpy(value), rtol=1e-6, atol=1e-7)


def test_clients_keep_what_they_trained_and_the_model_moves_no_further_than_the_clip(make_engine):
    engine = make_engine(
        "scaffold",
        federation__rounds=1,
        extras=["privacy"],
        **{EXTRA + "clip": 0.01, EXTRA + "noise_multiplier": 0},
    )
    start = engine.start()
    state = engine.play(start).state
    gap = sum((p - start.params[n]).double().square().sum().item() for n, p in state.params.items())
    assert 0 < math.sqrt(gap) <= 0.01 * (1 + 1e-4)
    variate = next(iter(state.rows.values()))["control"]
    assert sum(v.double().square().sum().item() for v in variate.values()) > 0.01


# the accountant


def test_epsilon_is_the_accountants_own():
    """Replacing a client moves the sum by twice the clip: half the multiplier."""
    accountant = rdp.RdpAccountant(neighboring_relation=dp.NeighboringRelation.REPLACE_ONE)
    event = dp.SampledWithoutReplacementDpEvent(1000, 20, dp.GaussianDpEvent(1.5 / 2))
    accountant.compose(dp.SelfComposedDpEvent(event, 30))
    assert epsilon({"20": 30}, 20, 1000, 1.5, 1e-5) == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-12)


def test_epsilon_without_sampling_is_within_the_known_bounds_of_the_gaussian_mechanism():
    """All clients in every round: T rounds are one Gaussian mechanism with noise s = z/2/√T.

    Its Rényi divergence α/(2s²) gives ε = 1/(2s²) + √(2·log(1/δ))/s (Mironov, CSF 2017), which the
    conversion of Canonne, Kamath and Steinke (NeurIPS 2020) improves by some per cent; the exact trade-off is
    Balle and Wang's (ICML 2018).
    """
    z, rounds, delta = 8.0, 4, 1e-5
    s = z / 2 / math.sqrt(rounds)
    found = epsilon({"10": rounds}, 10, 10, z, delta)
    plain = 1 / (2 * s**2) + math.sqrt(2 * math.log(1 / delta)) / s

    def phi(x):
        return 0.5 * math.erfc(-x / math.sqrt(2))

    def exact(eps):
        return phi(1 / (2 * s) - eps * s) - math.exp(eps) * phi(-1 / (2 * s) - eps * s)

    assert exact(found) <= delta  # never promises too much
    assert 0.85 * plain < found < plain


def test_fewer_arrivals_cost_privacy_and_none_cost_nothing():
    whole, part = epsilon({"10": 5}, 10, 100, 4, 1e-5), epsilon({"10": 4, "5": 1}, 10, 100, 4, 1e-5)
    assert epsilon({"10": 4}, 10, 100, 4, 1e-5) < whole < part
    assert epsilon({"10": 5, "0": 7}, 10, 100, 4, 1e-5) == whole


def test_clients_that_are_lost_take_their_share_of_the_noise_along(make_engine):
    engine = make_engine("fedavg", federation__rounds=4, faults__upload_failure=0.5, extras=["privacy"])
    reports = play(engine)
    arrived = [3 - sum(map(len, report.metrics.get("lost", {}).values())) for report in reports]
    assert set(arrived) - {0, 3}  # in some round some are lost
    counts = {str(n): arrived.count(n) for n in arrived}
    assert reports[-1].metrics["epsilon"] == pytest.approx(epsilon(counts, 3, 6, 1.0, 1e-5))


def test_each_round_reports_what_all_before_it_cost(make_engine):
    engine = make_engine("fedavg", federation__rounds=3, extras=["privacy"])
    reports = play(engine)
    expected = [epsilon({"3": n + 1}, 3, 6, 1.0, 1e-5) for n in range(3)]
    assert [report.metrics["epsilon"] for report in reports] == expected
    assert reports[-1].state.memory["extras"] == {"GaussianMechanism": {"3": 3}}


# with every method


@pytest.mark.parametrize("name", NAMES)
def test_every_method_takes_noise_or_says_why_not(make_engine, name):
    """Strict: it works or is refused with a reason; without a promise every method works, contracts on."""
    changes = {"federation__rounds": 2, "federation__momentum": 0.0}
    extras = [] if name == "privacy" else ["privacy"]
    for accounting in ("strict", "off"):
        changes[EXTRA + "accounting"] = accounting
        if accounting == "strict" and name in REFUSED:
            with pytest.raises(ConfigError, match='or set accounting = "off", which promises nothing'):
                make_engine(name, extras=extras, **changes)
            continue
        engine = make_engine(name, extras=extras, **changes)
        report = play(engine)[-1]
        assert ("epsilon" in report.metrics) == (accounting == "strict")
        for layer, mask in report.state.mask.items():
            assert not report.state.params[layer][~mask].any()


REFUSED = {
    "feddst": "clients choose masks",
    "fedmef": "scores",
    "fedsparsify": "sees masks",
    "fedtiny": "first mask from data",
    "flash": "clients choose masks",
    "feddyn": "sees counts of samples",
    "grasp": "first mask from data",
    "median": "sees each update",
    "prunefl": "first mask from data",
    "rigl": "scores",
    "scaffold": "sees control variates",
    "snip": "first mask from data",
    "sparsyfed": "clients choose masks",
    "synflow": "gets a probe",
    "topk": "clients choose masks",
    "trimmed_mean": "sees each update",
    "zerofl": "clients choose masks",
}


def test_what_would_break_the_promise_is_refused_at_once(make_resolved, make_engine):
    with pytest.raises(
        ConfigError, match=r"a client can be sampled twice a round; set federation\.replacement=false"
    ):
        make_resolved("privacy", federation__replacement=True)
    for fault in ({"faults__deadline": 2.0}, {"faults__non_finite": "drop"}):
        with pytest.raises(ConfigError, match=r"loses clients by their data; leave faults\."):
            make_resolved("privacy", **fault)
    assert make_resolved("privacy", faults__dropout=0.1)
    with pytest.raises(ConfigError, match=r"delta is 0.5; with 6 clients use less than 0.166"):
        make_resolved("privacy", **{EXTRA + "delta": 0.5})
    images = {"task__dataset__channels": 3, "task__dataset__height": 32, "task__dataset__width": 32}
    batchnorm = images | {"task__model__use": "resnet18", "task__model__hidden": None}
    with pytest.raises(ConfigError, match=r"buffers are sent without noise \(\S+running_mean"):
        make_engine("privacy", **batchnorm)
    assert make_resolved("privacy", federation__replacement=True, **{EXTRA + "noise_multiplier": 0})


def test_what_diverged_counts_as_no_update():
    """Else one client's data could make the sum NaN, which no clip bounds; contracts may be off."""
    for bad in (math.nan, math.inf):
        anchor, mask, frozen, params = client()
        params = params | {"w": torch.where(masks.movable(mask, frozen)["w"], bad, params["w"])}
        for noise in (0.0, 1.0):
            part = GaussianMechanism(noise_multiplier=noise)
            made = part.upload(params, anchor, mask, frozen, torch.tensor(37.0), 4, rng.key(0)).params
            if noise:
                assert all(p.isfinite().all() for p in made.values())
            else:
                assert all(torch.equal(made[name], p) for name, p in anchor.items())


class Rescales(Part):
    @hookimpl
    def upload(self, params, weight):
        return Uploaded(params, 2 * weight)


class Tells(Part):
    linear: ClassVar[bool] = True

    @hookimpl
    def contribute(self, params, weight):
        return {**{name: weight * p for name, p in params.items()}, "weight": weight}

    @hookimpl
    def aggregate(self, sums, params, mask, memory):
        return Aggregated({name: sums[name] / sums["weight"] for name in params}, mask, memory)


class TellsMore(Tells):
    @hookimpl
    def contribute(self, params, weight, carry):
        return {**{name: weight * p for name, p in params.items()}, "weight": weight, "loss": weight}


def test_parts_that_undo_the_promise_are_refused(make_resolved):
    with pytest.raises(ConfigError, match=r"ledger\.values = 'bfloat16' rounds uploads after the noise; set"):
        make_resolved("privacy", ledger__values="bfloat16")
    made = make_resolved("privacy")
    noise = made.method.extras[0]
    for extras, refused in (((Rescales(), noise), False), ((noise, Rescales()), True)):
        found = noise.objections(replace(made.method, extras=extras), made.config, None)
        assert [text.partition(" after")[0] for text in found] == ["Rescales changes uploads"] * refused
    for aggregate, refused in ((Tells(), False), (TellsMore(), True)):
        found = noise.objections(replace(made.method, aggregate=aggregate), made.config, None)
        assert [text.partition(" of")[0] for text in found] == ["TellsMore sees more than the sum"] * refused


def test_a_missing_accountant_is_named_with_its_extra(make_resolved, monkeypatch):
    monkeypatch.setattr("fedsparse.plugins.privacy.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'fedsparse\[privacy\]'"):
        make_resolved("privacy")


def test_the_part_fills_no_slot():
    assert GaussianMechanism.slot() not in SLOTS
