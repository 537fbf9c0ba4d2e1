"""Contributions that stay apart: one stack from every executor and worker; parts that are robust."""

from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from scipy.stats import trim_mean

from fedsparse import Aggregated, Part, hookimpl
from fedsparse.core.budget import Budget, Layer
from fedsparse.core.errors import ConfigError
from fedsparse.core.execution.workers import join, launch, leave
from fedsparse.core.state import ServerState
from fedsparse.plugins.median import Median
from fedsparse.plugins.trimmed_mean import TrimmedMean


def play(engine):
    return list(engine.rounds(engine.start()))


def spied(engine):
    """The stacks that the engine's aggregate part gets, round by round, as arrays."""
    seen, call = [], engine.hooks.call

    def spying(name, expected, **offered):
        if name == "aggregate":
            seen.append({key: value.clone() for key, value in offered["sums"].items()})
        return call(name, expected, **offered)

    engine.hooks.call = spying
    return seen


def stacks(make_engine, executor, **changes):
    engine = make_engine(
        "feddst",
        ["aggregate=median"],
        federation__rounds=3,
        method__readjust__period=1,
        task__partition__use="dirichlet",
        execution__executor=executor,
        execution__chunk=2,
        **changes,
    )
    seen = spied(engine)
    report = play(engine)[-1]
    return seen, report


@pytest.mark.parametrize("other", ["vectorised", "graph"])
def test_every_executor_stacks_clients_in_the_order_of_sampling(make_engine, other):
    (one, _), (two, _) = (stacks(make_engine, kind) for kind in ("sequential", other))
    assert len(one) == 3
    for first, second in zip(one, two, strict=True):
        assert first.keys() == second.keys()
        for name, value in first.items():
            assert value.shape[0] == 3
            assert value.dtype == (torch.bool if name.startswith("held/") else torch.float32)
            assert value.is_contiguous()
            torch.testing.assert_close(second[name], value, atol=1e-6, rtol=1e-5)
    # they are the clients' own: what each uploaded, in the order of the round's line
    name = "fc1.weight" if "fc1.weight" in one[0] else next(iter(one[0]))
    assert not torch.equal(one[0][name][0], one[0][name][1])


def test_the_stack_is_what_clients_uploaded(make_engine, watch):
    engine = make_engine("fedavg", ["aggregate=median"], federation__rounds=2)
    seen, watched = spied(engine), watch(engine)
    reports = play(engine)
    for round_, report in enumerate(reports):
        uploaded = {client.number: client.params for at, client in watched.uploads if at == round_}
        for place, number in enumerate(report.metrics["clients"]):
            for name, value in uploaded[number].items():
                assert torch.equal(seen[round_][name][place], value)
        for name, value in report.state.params.items():
            expected = np.median(seen[round_][name].numpy(), axis=0)
            mask = report.state.mask.get(name)
            expected = expected if mask is None else np.where(mask.numpy(), expected, 0)
            np.testing.assert_allclose(value.numpy(), expected, rtol=1e-6, atol=1e-8)


def by_two(make_engine):
    """Runs in a worker: unequal shares, a client sampled twice, and rounds with one worker idle."""
    torch.set_num_threads(1)
    join()
    try:
        return shares(make_engine)
    finally:
        leave()


def shares(make_engine):
    found = []
    for changes in ({}, {"federation__replacement": True, "federation__clients_per_round": 2}):
        seen, report = stacks(make_engine, "sequential", **{"federation__clients": 3, **changes})
        found.append([{name: value.numpy() for name, value in sums.items()} for sums in seen])
        found.append({name: p.numpy() for name, p in report.state.params.items()})
    return found


def test_two_workers_stack_what_one_does_bit_for_bit(make_engine):
    one, two = shares(make_engine), launch(2, by_two, make_engine)
    for kind in (0, 2):
        for first, second in zip(one[kind], two[kind], strict=True):
            assert all(np.array_equal(second[name], value) for name, value in first.items())
        assert all(np.array_equal(two[kind + 1][name], value) for name, value in one[kind + 1].items())


class Twice(Part):
    """Not a bool."""

    gathered: ClassVar[int] = 2

    @hookimpl
    def contribute(self, params):
        return params

    @hookimpl
    def aggregate(self, params, mask, memory):
        return Aggregated(params, mask, memory)


def test_gathered_is_a_bool(make_resolved):
    from fedsparse.core.compose import compose

    with pytest.raises(ConfigError, match="gathered is 2; expected True or False"):
        compose(make_resolved("fedavg").method.with_parts(aggregate=Twice()))


# robust parts on vectors


def settle(part, values, held=None, budget=None, frozen=None, mask=None):
    """One layer of so many weights, a row of values a client."""
    values = torch.tensor(values, dtype=torch.float32)
    count = values.shape[1]
    layer = Layer("w", (count,))
    allowed = Budget((layer,), "uniform", 1 - (budget or count) / count)
    sums = {"w": values, "b": values[:, :1]}
    if held is not None:
        sums["held/w"] = torch.tensor(held).bool()
    full = torch.ones(count, dtype=torch.bool) if mask is None else torch.tensor(mask).bool()
    none = torch.zeros(count, dtype=torch.bool) if frozen is None else torch.tensor(frozen).bool()
    made = part.aggregate(
        sums, {"w": values[0] * 0, "b": values[0, :1]}, {"w": full}, {"w": none}, allowed, {}
    )
    return made.params["w"].tolist(), made.mask["w"].tolist(), made.params["b"].tolist()


@pytest.mark.parametrize("clients", [1, 2, 5, 6])
def test_median_and_trimmed_mean_are_numpys_and_scipys(clients):
    values = np.random.default_rng(clients).normal(size=(clients, 40)).astype(np.float32)
    found, mask, _ = settle(Median(), values.tolist())
    np.testing.assert_allclose(found, np.median(values, axis=0), rtol=1e-6)
    assert all(mask)
    for trim in (0.0, 0.2, 0.4):
        found = settle(TrimmedMean(trim=trim), values.tolist())[0]
        np.testing.assert_allclose(found, trim_mean(values, trim, axis=0), rtol=1e-5, atol=1e-7)


VALUES = [[1, 5, 0, 0, 2], [2, 6, 0, 4, 3], [3, 0, 9, 4, 0], [10, 7, 0, 0, 4], [2, 0, 0, 5, 0]]
HELD = [[1, 1, 0, 0, 1], [1, 1, 0, 1, 1], [1, 0, 1, 1, 0], [1, 1, 0, 0, 1], [1, 0, 0, 1, 0]]


def test_who_dropped_a_weight_casts_no_zero_and_a_few_set_no_value():
    """Held by 5, 3, 1, 3, 3 of 5: one holder's 9 is no value."""
    params, mask, bias = settle(Median(), VALUES, HELD)
    assert params == [2, 6, 0, 4, 3]
    assert mask == [True] * 5
    assert bias == [2]
    assert settle(TrimmedMean(trim=0.2), VALUES, HELD)[0] == pytest.approx([7 / 3, 6, 0, 13 / 3, 3])
    assert settle(TrimmedMean(trim=0.34), VALUES, HELD)[0] == pytest.approx([7 / 3, 6, 0, 4, 3])


def test_the_mask_is_pruned_to_the_budget_by_magnitude_and_filled_by_votes():
    params, mask, _ = settle(Median(), VALUES, HELD, budget=2)
    assert (params, mask) == ([0, 6, 0, 4, 0], [False, True, False, True, False])
    held = [[1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 1, 0], [1, 0, 0, 1, 0]]
    held[4][3] = 0
    params, mask, _ = settle(Median(), VALUES, held, budget=3)
    assert mask == [True, True, True, False, False]  # 5 votes, then 2 and 2; one vote is no place
    assert params == [2, 0, 0, 0, 0]


def test_nobody_holds_it_and_frozen_ones_stay():
    nobody = [[1, 0, 0, 0, 0]] * 5
    params, mask, _ = settle(Median(), VALUES, nobody, frozen=[0, 1, 0, 0, 0])
    assert mask == [True, True, False, False, False]
    assert params == [2, 0, 0, 0, 0]  # the engine writes frozen values back


def hostile(make_engine, swap):
    """Accuracy where one of five clients sends a million times its update."""
    engine = make_engine(
        "fedavg",
        [f"aggregate={swap}"] if swap != "fedavg" else [],
        federation__clients=5,
        federation__clients_per_round=5,
        federation__rounds=12,
        federation__learning_rate=0.1,
        output__evaluate_every=12,
        execution__executor="sequential",
        sparsity__target=0.5,
    )
    contribution = engine.executor.contribution

    def attacked(plan, client, weight):
        if client.number == 3:
            anchor = plan.state.params
            away = {name: anchor[name] + 1e6 * (p - anchor[name]) for name, p in client.params.items()}
            client = replace(client, params=away)
        return contribution(plan, client, weight)

    engine.executor.contribution = attacked
    state: ServerState = engine.start()
    for _ in range(engine.config.federation.rounds):
        try:
            report = engine.play(state)
        except Exception as error:
            return float("inf"), error
        state = report.state
    return max(p.abs().max().item() for p in state.params.values()), report.metrics["test_accuracy"]


def test_one_hostile_client_destroys_the_mean_and_neither_median_nor_trimmed_mean(make_engine):
    largest, _ = hostile(make_engine, "fedavg")
    assert largest > 1e3
    for swap in ("median", "trimmed_mean"):
        largest, accuracy = hostile(make_engine, swap)
        assert largest < 10
        assert accuracy > 0.6
