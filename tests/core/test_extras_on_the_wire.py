"""What travels beside the model, and parts that send only what is not 0."""

from dataclasses import replace
from typing import ClassVar

import torch

from fedsparse import Aggregated, Part, hookimpl
from fedsparse.core import masks, task
from fedsparse.core.engine import Engine
from fedsparse.core.ledger import HEADER
from fedsparse.plugins.fedavg import MaskedSgd, WeightedMean

SEEN = []


class Listening(Part):
    """Masked SGD that notes what the server sent along."""

    @hookimpl
    def client_init(self, params, momentum, broadcast):
        SEEN.append(dict(broadcast))
        return MaskedSgd().client_init(params, momentum)

    @hookimpl
    def local_step(self, loss, params, carry, batch, trainable, lr, momentum, weight_decay):
        return MaskedSgd().local_step(loss, params, carry, batch, trainable, lr, momentum, weight_decay)


class Broadcasting(Part):
    """FedAvg that sends the last mean of the first layer along, and asks for a number from each client."""

    @hookimpl
    def contribute(self, params, mask, weight, moved):
        sums = WeightedMean().contribute(params, mask, weight, moved)
        return sums | {"extra/fc1.weight": params["fc1.weight"], "extra/number": torch.ones(())}

    @hookimpl
    def aggregate(self, sums, params, mask, frozen, budget, memory):
        made = WeightedMean().aggregate(sums, params, mask, frozen, budget, memory)
        return made._replace(memory={"broadcast": {"fc1.weight": made.params["fc1.weight"]}})


class OnlyNonzero(Part):
    """Trains densely, sends the support."""

    sends: ClassVar[str] = "support"
    budget_promise: ClassVar[str] = "none"

    @hookimpl
    def contribute(self, params, weight):
        return {"weight": weight, **{n: weight * p for n, p in params.items()}}

    @hookimpl
    def aggregate(self, sums, params, mask, memory):
        mean = {n: sums[n] / sums["weight"] for n in params}
        for name in mask:
            mean[name] = torch.where(masks.largest(mean[name].abs(), 10), mean[name], 0.0)
        return Aggregated(mean, mask, memory)


def play(make_resolved, rounds, **parts):
    made = make_resolved("fedavg", federation__rounds=rounds, sparsity__target=0.0)
    made = replace(made, method=made.method.with_parts(**parts))
    engine = Engine(made, task.build(made.config))
    return engine, list(engine.rounds(engine.start()))


def test_broadcasts_reach_clients_and_are_charged(make_resolved):
    SEEN.clear()
    engine, reports = play(make_resolved, 2, local_step=Listening(), aggregate=Broadcasting())
    assert [list(seen) for seen in SEEN] == [[]] * 3 + [["fc1.weight"]] * 3
    assert torch.equal(SEEN[-1]["fc1.weight"], reports[0].state.params["fc1.weight"])
    _, plain = play(make_resolved, 2)
    layer = 4 * engine.params["fc1.weight"].numel()
    extra = [
        [after.metrics[f"{way}_bytes"] - before.metrics[f"{way}_bytes"] for way in ("download", "upload")]
        for after, before in zip(reports, plain, strict=True)
    ]
    up, down = 3 * (HEADER + layer + 4), 3 * (HEADER + layer)
    assert extra == [[0, up], [down, up]]


def test_a_part_that_sends_its_support_is_charged_for_it(make_resolved):
    engine, reports = play(make_resolved, 3, aggregate=OnlyNonzero())
    _, plain = play(make_resolved, 3)
    biases = sum(p.numel() for n, p in engine.params.items() if n not in engine.prunable)
    down = [report.metrics["download_bytes"] for report in reports]
    assert down[0] == plain[0].metrics["download_bytes"]
    values = 3 * (HEADER + 4 * (10 * len(engine.prunable) + biases))
    assert values < down[1] < values + plain[1].metrics["download_bytes"] / 20
    # clients train every weight: what grows is uploaded, and the FLOPs are dense
    assert reports[2].metrics["upload_bytes"] > 2 * values
    assert reports[2].metrics["flops_total"] == plain[2].metrics["flops_total"]
