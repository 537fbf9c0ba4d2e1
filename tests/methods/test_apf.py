"""APF: the paper has no worked examples; numbers here are by hand from its equations."""

from itertools import pairwise

import pytest
import torch

from fedsparse.core.state import Clock
from fedsparse.plugins.apf import FreezeStable


def play(part, values, mask=None):
    """Feeds the global values of one tensor, round by round; yields what is frozen and the memory."""
    memory, frozen = {}, {}
    mask = {} if mask is None else mask
    for number, value in enumerate(values):
        made = part.freeze({"w": torch.tensor(value)}, mask, frozen, Clock(number, 100), memory)
        if made is not None:
            frozen, memory = made.frozen, made.memory
        yield frozen, memory


def test_freeze_stay_lengthen_thaw_and_halve():
    """One scalar oscillates, one drifts. α = 1/2, T_s = 0.4, a check every round.

    check 1: Δ=1, E=.5, A=.5, P=1. 2: Δ=-1, E=-.25, A=.75, P=1/3: frozen for 1. 3: trains again. 4: Δ=.2,
    E=-.025, A=.475, P=.05: frozen for 2. 6: trains. 7: Δ=1, E=.4875, A=.7375, P=.66: halved to 1, so frozen
    once more. 8: trains. 9: Δ=1: halved to 0.
    """
    first = [0.0, 1.0, 0.0, 0.0, 0.2, 0.2, 0.2, 1.2, 1.2, 2.2]
    values = [[a, float(number)] for number, a in enumerate(first)]
    part = FreezeStable(alpha=0.5, threshold=0.4, period=1, tighten=1.0)
    seen = list(play(part, values))
    assert [bool(frozen["w"][0]) for frozen, _ in seen[1:]] == [
        False,
        True,
        False,
        True,
        True,
        False,
        True,
    ] + [False] * 2
    assert [int(memory["length"]["w"][0]) for _, memory in seen] == [0, 0, 1, 1, 2, 2, 2, 1, 1, 0]
    assert not any(frozen["w"][1] for frozen, _ in seen[1:])
    drift, size = seen[2][1]["drift"]["w"], seen[2][1]["size"]["w"]
    torch.testing.assert_close(drift, torch.tensor([-0.25, 0.75]))
    torch.testing.assert_close(size, torch.tensor([0.75, 0.75]))
    # the averages rest while it is frozen and while it has just been thawed
    assert all(float(memory["drift"]["w"][0]) == -0.25 for _, memory in seen[2:4])
    assert float(seen[4][1]["drift"]["w"][0]) == pytest.approx(-0.025)


def test_checks_come_every_period_rounds_and_lengths_count_checks():
    part = FreezeStable(alpha=0.5, threshold=0.4, period=3, tighten=1.0)
    values = [[float(number // 3 % 2)] for number in range(12)]
    memory, decided = {}, []
    for number, value in enumerate(values):
        made = part.freeze({"w": torch.tensor(value)}, {}, {}, Clock(number, 100), memory)
        decided.append(made is not None)
        memory = made.memory if made else memory
    assert decided == [True, False, False] * 4
    assert int(memory["thaw"]["w"]) == 3  # frozen at check 2 for one check


def test_a_weight_off_the_mask_is_never_frozen_and_forgets():
    part = FreezeStable(alpha=0.5, threshold=0.9, period=1, tighten=1.0)
    mask, memory, history = torch.tensor([True, True]), {}, []
    for number, value in enumerate([[0, 0], [1, 1], [0, 0], [0, 0.0]]):
        held = {"w": mask if number < 3 else torch.tensor([True, False])}
        made = part.freeze(
            {"w": torch.tensor(value, dtype=torch.float32)}, held, {}, Clock(number, 9), memory
        )
        memory = made.memory
        history.append(made.frozen.get("w"))
    assert history[2].tolist() == [True, True]
    assert not history[3][1]
    assert memory["size"]["w"][1] == 0 != memory["size"]["w"][0]
    assert int(memory["length"]["w"][1]) == 0


def test_the_threshold_is_halved_when_most_scalars_are_frozen():
    part = FreezeStable(alpha=0.5, threshold=0.4, period=1, tighten=0.7)
    three_of_four = [[1.0 * (n % 2)] * 3 + [float(n)] for n in range(3)]
    assert [memory["threshold"] for _, memory in play(part, three_of_four)] == [0.4, 0.4, 0.2]
    two_of_four = [[1.0 * (n % 2)] * 2 + [float(n)] * 2 for n in range(3)]
    assert [memory["threshold"] for _, memory in play(part, two_of_four)] == [0.4] * 3


EAGER = {
    "method__freeze_policy__alpha": 0.5,
    "method__freeze_policy__threshold": 0.6,
    "method__freeze_policy__period": 1,
}
"""Settings that freeze within a few rounds."""


def test_frozen_fraction_is_reported_and_frozen_values_keep_their_bits(make_engine):
    engine = make_engine("apf", federation__rounds=10, ledger__encode=True, **EAGER)
    reports = list(engine.rounds(engine.start()))
    fractions = [report.metrics["frozen_fraction"] for report in reports]
    assert fractions[:2] == [0, 0]  # the first two checks cannot find anything stable
    assert max(fractions) > 0.1
    thawed = 0
    for before, after in pairwise(reports):
        for name, still in after.state.frozen.items():
            assert torch.equal(after.state.params[name][still], before.state.params[name][still])
            if name in before.state.frozen:
                thawed += int((before.state.frozen[name] & ~still).sum())
    assert thawed > 0
    assert any(reports[-1].state.frozen[f"fc{n}.bias"].any() for n in (1, 2, 3))  # all scalars, as the paper
    uploads = [report.metrics["upload_bytes"] for report in reports]
    assert min(uploads) < uploads[0]


def test_nothing_freezes_above_an_unreachable_threshold(make_engine):
    """Then APF is FedAvg, to the bit."""
    settings = {"federation__rounds": 5, "sparsity__target": 0.0}
    never = {**EAGER, "method__freeze_policy__threshold": 1e-9}
    ends = [
        list(engine.rounds(engine.start()))[-1].state.params
        for engine in (make_engine("apf", **settings, **never), make_engine("fedavg", **settings))
    ]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize("base", ["fedavg", "feddst", "pffdst", "flash", "fedtiny", "fedmef"])
def test_freezing_under_every_way_to_move_a_mask(make_engine, base):
    """Contracts on: frozen weights lie within every mask and keep their bits, whoever rewires."""
    moving = {
        "feddst": {"period": 1, "annealing": "constant", "ratio": 0.3},
        "pffdst": {"period": 1, "starts": [0.0], "window": 0.49},
        "flash": {"variant": "jmwst"},
        "fedtiny": {"period": 1, "stop": 1.0},
        "fedmef": {"period": 1, "stop": 1.0},
    }.get(base, {})
    slots = ["readjust", "local_step"] if base == "fedmef" else ["readjust"]  # its squeeze must agree
    changes = {f"method__{slot}__{name}": value for slot in slots for name, value in moving.items()}
    engine = make_engine(
        base, ["freeze_policy=apf"], federation__rounds=10, ledger__encode=True, **EAGER, **changes
    )
    reports = list(engine.rounds(engine.start()))
    assert max(report.metrics["frozen_fraction"] for report in reports) > 0
    assert (sum(report.metrics["mask_changed"] for report in reports) > 0) == (base != "fedavg")


@pytest.mark.parametrize("base", ["fedavg", "feddst", "pffdst"])
def test_swap_for_four_rounds(make_engine, base):
    engine = make_engine(base, ["freeze_policy=apf"], federation__rounds=4, ledger__encode=True, **EAGER)
    assert len(list(engine.rounds(engine.start()))) == 4
