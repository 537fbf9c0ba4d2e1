"""Top-K, the baseline of Appendix A of the SparsyFed document; numbers are those of that document."""

import pytest
import torch

from fedsparse.core import masks
from fedsparse.core.budget import Budget, Layer
from fedsparse.core.ledger import HEADER
from fedsparse.plugins.topk import FullMask, GlobalTopK, PlainMean

PLAIN = {"federation__momentum": 0.0, "federation__learning_rate": 0.3}


def played(engine, rounds):
    return [report for _, report in zip(range(rounds), engine.rounds(engine.start()), strict=False)]


def total(engine):
    return sum(layer.weights for layer in engine.task.layers)


def test_uploads_meet_the_budget_and_weights_grow_back(make_engine, watch):
    """Invariant 13 and 22 hold; 10 and 18 do not: zeros move in training, and the mask is no support."""
    engine = make_engine("topk", **PLAIN)
    watched, reports = watch(engine), played(engine, 4)
    keep, regrown = total(engine) - round(0.8 * total(engine)), 0
    for number in range(4):
        uploads = [client for round_, client in watched.uploads if round_ == number]
        assert [sum(masks.active(client.mask).values()) for client in uploads] == [keep] * 3
        for client in uploads:
            assert all(torch.equal(client.params[n] != 0, m) for n, m in client.mask.items())
        if number:
            support = masks.support(reports[number - 1].state.params, reports[number - 1].state.mask)
            regrown += sum(int((c.mask[n] & ~support[n]).sum()) for c in uploads for n in support)
    assert regrown > 0
    for report in reports:
        assert all(m.all() for m in report.state.mask.values())
        nonzero = sum(int((report.state.params[n] != 0).sum()) for n in report.state.mask)
        assert keep < nonzero <= 3 * keep  # invariant 16: the union of the clients' choices


def test_clients_train_every_weight(make_engine, watch):
    engine = make_engine("topk", **PLAIN)
    watched = watch(engine)
    reports = played(engine, 2)
    first = reports[0].state.params["fc1.weight"]
    stepped = [params["fc1.weight"] for round_, params, _ in watched.steps if round_ == 1]
    zero = first == 0
    assert zero.any()
    assert stepped[0][zero].any()


def test_bytes_are_those_of_the_support(make_engine):
    """The first download is dense; what follows is as sparse as what it carries."""
    engine = make_engine("topk", **PLAIN)
    reports = played(engine, 3)
    dense = 3 * (HEADER + 4 * sum(p.numel() for p in engine.params.values()))
    down, up = ([r.metrics[f"{way}_bytes"] for r in reports] for way in ("download", "upload"))
    assert down[0] == dense
    assert max(down[1:]) < dense / 2
    assert max(up) < 0.3 * dense  # 0.2 of the values and the positions


def test_without_sparsity_it_is_fedavg(make_engine):
    """Invariant 15: at S = 0 the Top-K is the identity."""
    ends = [
        played(make_engine(plugin, sparsity__target=0.0, **PLAIN), 3)[-1].state.params
        for plugin in ("topk", "fedavg")
    ]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_the_mean_counts_zeros_and_keeps_the_mask():
    """Example 10.5."""
    rows = [[0.9, 0, 0.3, 0], [0.6, -0.2, 0, 0], [0.3, 0, 0.3, 0]]
    part, sums = PlainMean(), {}
    for row, count in zip(rows, (100, 50, 50), strict=True):
        for name, value in part.contribute({"w": torch.tensor(row)}, torch.tensor(float(count))).items():
            sums[name] = sums.get(name, 0) + value
    mask = {"w": torch.ones(4, dtype=torch.bool)}
    made = part.aggregate(sums, {"w": torch.zeros(4)}, mask, {})
    torch.testing.assert_close(made.params["w"], torch.tensor([0.675, -0.05, 0.225, 0]))
    assert made.mask["w"].all()


@pytest.mark.parametrize("floor", [0.0, 0.5])
def test_frozen_weights_are_kept_however_small(floor):
    """In a swap with a freeze policy."""
    torch.manual_seed(0)
    params = {"w": torch.randn(10, 10), "v": torch.randn(5, 10)}
    budget = Budget((Layer("w", (10, 10)), Layer("v", (5, 10))), "erk", 0.8)
    full = FullMask().mask_init(params, budget)
    frozen = {n: torch.zeros_like(m) for n, m in full.items()}
    frozen["w"][3] = True
    params["w"][3] = 1e-9
    made = GlobalTopK(floor=floor).readjust(params, full, frozen, budget)
    assert made.mask["w"][3].all()
    assert torch.equal(made.params["w"][3], params["w"][3])
    assert sum(masks.active(made.mask).values()) == 30


def test_a_smaller_mask_limits_what_grows(make_engine):
    """In a swap with FedAvg's initial mask the server keeps that mask."""
    engine = make_engine("topk", ["mask_init=fedavg"], **PLAIN)
    start = engine.start()
    for report in played(engine, 3):
        assert all(torch.equal(report.state.mask[n], m) for n, m in start.mask.items())
