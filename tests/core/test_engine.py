"""The engine: contracts, hooks that the shipped methods leave out, repeatability, checkpoints."""

import json
from typing import ClassVar

import pytest
import torch
from safetensors.torch import save_file

from fedsparse import Aggregated, Method, Part, Readjusted, Stepped, hookimpl, masks, optim
from fedsparse.core import checkpoint, task
from fedsparse.core.compose import PluginError, compose
from fedsparse.core.contracts import ContractError
from fedsparse.core.engine import Engine
from fedsparse.core.errors import ConfigError, RunError
from fedsparse.core.ledger import HEADER
from fedsparse.core.resolve import resolve
from fedsparse.core.runner import run
from fedsparse.core.schedule import learning_rate
from fedsparse.core.state import Carry
from fedsparse.plugins import fedavg


def with_part(make_resolved, part, plugin="fedavg", extras=(), **changes):
    """An engine of `plugin` with one part replaced by an object of a test."""
    from dataclasses import replace

    made = make_resolved(plugin, **changes)
    method = made.method if part is None else made.method.with_parts(**{part.slot(): part})
    made = replace(made, method=replace(method, extras=extras))
    return Engine(made, task.build(made.config))


def play(engine, rounds=1):
    reports = engine.rounds(engine.start())
    return [next(reports) for _ in range(rounds)]


class Same(Part):
    """Returns a mask of the wrong size."""

    @hookimpl
    def mask_init(self, params, budget):
        kept = masks.by_budget({layer.name: params[layer.name] for layer in budget.layers}, budget)
        first = next(iter(kept))
        kept[first] = kept[first][:1]
        return kept


class OffBudget(Part):
    """Keeps one weight too many."""

    budget_promise: ClassVar[str] = "exact"

    @hookimpl
    def mask_init(self, params, budget):
        kept = masks.by_budget({layer.name: params[layer.name] for layer in budget.layers}, budget)
        kept["fc2.weight"].view(-1)[kept["fc2.weight"].flatten().int().argmin()] = True
        return kept


class Leaky(Part):
    """Ignores the mask."""

    @hookimpl
    def local_step(self, loss, params, carry, batch, lr):
        value, grads, carry = loss.value_and_grad(params, carry, batch)
        return Stepped({n: p - lr * grads[n] for n, p in params.items()}, carry, {"loss": value})


class Diverging(Part):
    @hookimpl
    def local_step(self, loss, params, carry, batch):
        value, _, carry = loss.value_and_grad(params, carry, batch)
        return Stepped({n: p / 0 for n, p in params.items()}, carry, {"loss": value})


class Raising(Part):
    @hookimpl
    def readjust(self, params):
        raise ValueError("no such thing")


class WrongType(Part):
    @hookimpl
    def readjust(self, params):
        return params


class Overfull(Part):
    @hookimpl
    def contribute(self, params, weight):
        return {"weight": weight, **{n: weight * p for n, p in params.items()}}

    @hookimpl
    def aggregate(self, sums, params, mask):
        return Aggregated(dict(params), {n: torch.ones_like(m) for n, m in mask.items()}, {})


class Renaming(Part):
    @hookimpl
    def contribute(self, params, weight):
        return {"weight": weight}

    @hookimpl
    def aggregate(self, params, mask):
        return Aggregated({f"{n}.x": p for n, p in params.items()}, mask, {})


class Thawing(Part):
    """Changes frozen weights on the server."""

    site: ClassVar[str] = "server:end"

    @hookimpl
    def readjust(self, params, mask, memory):
        return Readjusted({n: p * 1.5 for n, p in params.items()}, mask, memory)


@pytest.mark.parametrize(
    ("part", "error", "texts"),
    [
        (Same(), ContractError, ["part Same, slot mask_init", "'fc1.weight' has shape (1, 36)", "(20, 36)"]),
        (OffBudget(), ContractError, ["'fc2.weight' has 49 active weights", "is 48"]),
        (Leaky(), ContractError, ["part Leaky", "round 0, client", "are not 0 off the mask"]),
        (Diverging(), ContractError, ["NaN or infinity"]),
        (Raising(), PluginError, ["part Raising", "round 0", "ValueError: no such thing", "test_engine.py:"]),
        (WrongType(), PluginError, ["returned dict; expected Readjusted"]),
        (Overfull(), ContractError, ["part Overfull", "'fc1.weight' has 720 active weights", "at most"]),
        (Renaming(), ContractError, ["missing ['fc1.weight'", "unknown ['fc1.weight.x'"]),
    ],
)
def test_a_breach_names_method_part_slot_tensor_and_counts(make_resolved, part, error, texts):
    engine = with_part(make_resolved, part, sparsity__allocation="uniform")
    with pytest.raises(error) as caught:
        play(engine)
    for text in ["method fedavg", *texts]:
        assert text in str(caught.value)


def test_frozen_values_may_not_move(make_resolved):
    engine = with_part(make_resolved, Thawing(), "pffdst", federation__rounds=4)
    with pytest.raises(ContractError, match=r"round 2.*frozen values changed \(allowed: 0\)"):
        play(engine, 3)


def test_contracts_can_be_switched_off(make_resolved):
    engine = with_part(make_resolved, Leaky(), execution__contracts=False)
    assert play(engine)[0].metrics["round"] == 0


class TwoSlots(Part):
    @hookimpl
    def mask_init(self, params):
        return {}

    @hookimpl
    def aggregate(self, params):
        return None


class UnknownArgument(Part):
    @hookimpl
    def readjust(self, params, gradients):
        return None


class EarlyScore(Part):
    site: ClassVar[str] = "server:start"

    @hookimpl
    def readjust(self, params, mask, score, memory):
        return Readjusted(params, mask, memory)


class NoHook(Part):
    pass


def test_parts_that_cannot_work_are_refused_when_composed():
    with pytest.raises(TypeError, match=r"2 slots \(mask_init, aggregate\)"):
        TwoSlots.slot()
    with pytest.raises(TypeError, match="implements no hook"):
        NoHook.slot()
    with pytest.raises(TypeError, match="holds UnknownArgument, which fills readjust"):
        Method("x", aggregate=UnknownArgument())
    with pytest.raises(TypeError, match="expected an instance of a Part"):
        Method("x", aggregate=UnknownArgument)
    for part, text in ((UnknownArgument(), "gradients"), (EarlyScore(), "at the start of a round")):
        with pytest.raises(ConfigError, match=text):
            compose(fedavg.METHOD.with_parts(readjust=part))


class Counting(Part):
    """SGD with a persistent momentum row: every hook around the step."""

    @hookimpl
    def initial_params(self, params):
        return {n: 2 * p for n, p in params.items()}

    @hookimpl
    def effective_params(self, params, mask):
        return {n: p / 2 for n, p in params.items()}

    @hookimpl
    def client_init(self, params, memory):
        return {"momentum": memory.get("momentum") or optim.zeros(params)}

    @hookimpl
    def local_step(self, loss, params, carry, batch, trainable, lr, momentum, key):
        value, grads, carry = loss.value_and_grad(params, carry, batch)
        params, state = optim.sgd(params, grads, carry.state, trainable, lr, momentum)
        return Stepped(params, Carry(carry.buffers, state), {"loss": value, "key": key % 2})

    @hookimpl
    def client_final(self, carry, memory):
        return {"momentum": carry.state["momentum"], "times": memory.get("times", 0) + 1}


def test_rows_persist_and_effective_params_hold_in_training_and_evaluation(make_resolved):
    """Doubled parameters halved before use, with the gradient's factor of a half undone by a rate four
    times as high, train as plain ones do."""
    changed = with_part(make_resolved, Counting(), federation__learning_rate=0.2, federation__rounds=1)
    plain = with_part(make_resolved, None, federation__weight_decay=0.0, federation__rounds=1)
    a, b = play(changed)[0], play(plain)[0]
    for name in a.state.params:
        torch.testing.assert_close(a.state.params[name] / 2, b.state.params[name], atol=1e-6, rtol=1e-5)
    assert a.metrics["test_accuracy"] == b.metrics["test_accuracy"]
    longer = with_part(make_resolved, Counting(), federation__rounds=12)
    reports = play(longer, 12)
    times = {client: row["times"] for client, row in reports[-1].state.rows.items()}
    taken = [client for report in reports for client in report.metrics["clients"]]
    assert times == {client: taken.count(client) for client in set(taken)}


class Pull(Part):
    """FedProx as an extra."""

    @hookimpl
    def penalty(self, params, anchor):
        return 500.0 * sum(((p - anchor[n]) ** 2).sum() for n, p in params.items())


SEEN = []


class Listener(Part):
    @hookimpl
    def on_round_end(self, report):
        SEEN.append(report.metrics["round"])


def test_penalties_are_differentiated_and_round_ends_are_told(make_resolved):
    settings = {"federation__learning_rate": 0.001, "federation__momentum": 0.0}
    pulled = with_part(make_resolved, None, extras=(Pull(), Listener()), **settings)
    free = with_part(make_resolved, None, **settings)
    SEEN.clear()
    ends = [play(engine, 2)[-1].state.params for engine in (pulled, free)]
    start = free.start().params
    moved = [sum(float((end[n] - start[n]).norm()) for n in start) for end in ends]
    assert moved[0] < 0.7 * moved[1]
    assert SEEN == [0, 1]


class Snip(Part):
    """|w·∂L/∂w| on the probe."""

    budget_promise: ClassVar[str] = "exact"

    @hookimpl
    def mask_init(self, params, budget, probe):
        gradient = probe.gradient(params)
        return masks.by_budget(
            {layer.name: (params[layer.name] * gradient[layer.name]).abs() for layer in budget.layers}, budget
        )


class ServerRegrow(Part):
    """Grows by the clients' mean gradient on the server."""

    site: ClassVar[str] = "server:end"
    budget_promise: ClassVar[str] = "exact"

    @hookimpl
    def due(self, clock):
        return clock.round == 1

    @hookimpl
    def readjust(self, params, mask, frozen, score, budget, memory):
        kept = masks.prune_smallest(params, mask, budget.at(0.9), frozen)
        params = masks.apply(params, kept)
        return Readjusted(params, masks.grow_largest(kept, score, budget), {"seen": list(score)})


def test_probe_and_server_scores(make_resolved):
    probed = with_part(make_resolved, Snip())
    assert masks.active(probed.start().mask) == dict(probed.budget(probed.clock(0)).counts)
    engine = with_part(make_resolved, ServerRegrow())
    reports = play(engine, 3)
    assert [bool(report.metrics["mask_changed"]) for report in reports] == [False, True, False]
    assert reports[1].state.memory["readjust"]["seen"] == list(engine.prunable)
    flops = [report.metrics["flops_total"] for report in reports]
    per_sample = flops[0] / reports[0].metrics["samples"]
    assert flops[1] - flops[0] > per_sample * reports[1].metrics["samples"]  # the dense gradient is charged


def test_nobody_pays_for_a_score_that_no_part_takes(make_engine, monkeypatch):
    from fedsparse.core.loss import ClientLoss

    def refuse(*_):
        raise AssertionError("a dense gradient was computed")

    monkeypatch.setattr(ClientLoss, "dense_grad", refuse)
    engine = make_engine("pffdst", federation__rounds=16, method__readjust__period=1)
    assert len(list(engine.rounds(engine.start()))) == 16
    with pytest.raises(AssertionError, match="dense gradient"):
        play(make_engine("feddst", method__readjust__period=1), 2)


def test_readjusting_clients_forget_the_momentum_of_moved_weights(make_engine, monkeypatch):
    engine = make_engine("feddst", method__readjust__ratio=0.3, federation__local_epochs=2)
    executor, found = engine.executor, []
    readjust = executor.readjust

    def watched(plan, client, clock, batches):
        before, values = client.mask, client.params
        readjust(plan, client, clock, batches)
        if client.mask is not before:
            moved = {n: (before[n] != m) | (values[n] != client.params[n]) for n, m in client.mask.items()}
            momentum = client.carry.state["momentum"]
            found.append(all(not momentum[n][moved[n]].any() for n in moved))
            found.append(any(momentum[n][~moved[n]].any() for n in moved))

    executor.readjust = watched
    play(engine, 2)
    assert found == [True] * 6


@pytest.mark.parametrize("prunable", [["all"], ["fc1.weight", "fc2*"], "fc1.weight"])
def test_prunable_sets(make_engine, prunable):
    engine = make_engine("feddst", sparsity__prunable=prunable, federation__rounds=2)
    expected = {"all": 6, "fc1.weight": 3 if isinstance(prunable, list) else 1}
    first = prunable if isinstance(prunable, str) else prunable[0]
    assert len(engine.prunable) == expected[first]
    assert len(play(engine, 2)) == 2


def test_prunable_patterns_must_match(make_engine):
    with pytest.raises(ConfigError, match=r"sparsity.prunable: 'conv\*' matches no parameter"):
        make_engine(sparsity__prunable=["conv*"])


def test_rescaled_initialisation_keeps_each_layers_norm(make_engine):
    engine = make_engine("feddst", sparsity__rescale_init=True, sparsity__target=0.9)
    state, plain = engine.start(), make_engine("feddst", sparsity__target=0.9).start()
    for name, mask in state.mask.items():
        torch.testing.assert_close(state.params[name].norm(), engine.params[name].norm())
        assert plain.params[name].norm() < 0.95 * state.params[name].norm()
        assert not state.params[name][~mask].any()
    assert torch.equal(state.params["fc1.bias"], engine.params["fc1.bias"])


def test_learning_rate_schedules():
    assert learning_rate("constant", 0.1, None, 7, 10) == 0.1
    assert learning_rate("linear", 0.1, 0.0, 5, 10) == pytest.approx(0.05)
    assert learning_rate("cosine", 0.1, 0.0, 5, 10) == pytest.approx(0.05)
    assert learning_rate("exponential", 0.5, 0.01, 10, 10) == pytest.approx(0.01)


def lines(folder):
    return [
        {k: v for k, v in json.loads(line).items() if k != "seconds"}
        for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


@pytest.mark.parametrize("plugin", ["fedavg", "feddst", "pffdst"])
def test_the_same_seed_twice(make_resolved, tmp_path, plugin):
    for name in ("a", "b"):
        run(make_resolved(plugin, federation__rounds=9), tmp_path / name)
    assert lines(tmp_path / "a") == lines(tmp_path / "b")
    run(make_resolved(plugin, federation__rounds=9, seed=1), tmp_path / "c")
    assert lines(tmp_path / "a") != lines(tmp_path / "c")


@pytest.mark.parametrize("plugin", ["fedavg", "feddst", "pffdst"])
def test_going_on_from_a_checkpoint_is_bit_identical(make_engine, tmp_path, plugin):
    changes = {"federation__rounds": 16}
    engine = make_engine(plugin, **changes)
    whole = list(engine.rounds(engine.start()))
    first = make_engine(plugin, **changes)
    reports = first.rounds(first.start())
    half = [next(reports) for _ in range(9)][-1].state
    checkpoint.save(tmp_path / "c", half, first.ledger.state(), {})
    checkpoint.save(tmp_path / "c", half, first.ledger.state(), {})  # replaces
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "c.old"]
    second = make_engine(plugin, **changes)
    state, ledger = checkpoint.load(tmp_path / "c", {})
    second.ledger.load_state(ledger)
    rest = list(second.rounds(state))
    for a, b in zip(whole[9:], rest, strict=True):
        drop = {"seconds"}
        assert {k: v for k, v in a.metrics.items() if k not in drop} == {
            k: v for k, v in b.metrics.items() if k not in drop
        }
    for name, value in whole[-1].state.params.items():
        assert torch.equal(value, rest[-1].state.params[name])


def test_unreadable_checkpoints_are_refused(tmp_path):
    with pytest.raises(RunError, match=r"does not exist.*before its first checkpoint"):
        checkpoint.load(tmp_path / "none", {})
    (tmp_path / "c").mkdir()
    for text in ("{}", "[]", "", '{"format": 3, "round": 4, "state": {"dict": {}}}'):
        (tmp_path / "c" / "state.json").write_text(text)
        with pytest.raises(RunError, match=r"cannot read the checkpoint \S+c, it is damaged"):
            checkpoint.load(tmp_path / "c", {})
        save_file({}, tmp_path / "c" / "tensors.safetensors")


def test_a_damaged_checkpoint_falls_back_to_the_one_before(make_engine, tmp_path):
    engine, folder, said = make_engine("feddst", federation__rounds=4), tmp_path / "c", []
    for report in engine.rounds(engine.start()):
        checkpoint.save(folder, report.state, engine.ledger.state(), {})
    tensors = folder / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-100])
    state, _ = checkpoint.load(folder, {}, say=said.append)
    assert state.round == 3
    assert "damaged" in said[0]
    assert "Going on from the one before" in said[0]
    (tmp_path / "c.old" / "state.json").write_text("{")
    with pytest.raises(RunError, match=r"c.old, it is damaged"):
        checkpoint.load(folder, {})


def test_a_checkpoint_of_another_run_is_refused_with_what_differs(make_engine, make_resolved, tmp_path):
    made = make_resolved("feddst", execution__threads=1)
    engine = make_engine("feddst")
    checkpoint.save(tmp_path / "c", engine.start(), engine.ledger.state(), checkpoint.identity(made))
    same = make_resolved("feddst", output__evaluate_every=3, task__data_root="elsewhere")
    checkpoint.load(tmp_path / "c", checkpoint.identity(same))
    other = make_resolved("feddst", method__readjust__ratio=0.25, seed=5)
    with pytest.raises(RunError) as caught:
        checkpoint.load(tmp_path / "c", checkpoint.identity(other))
    ratio = made.config.method.readjust.ratio
    assert f"settings.seed was 0, is 5; settings.method.readjust.ratio was {ratio}, is 0.25" in str(
        caught.value
    )
    older = checkpoint.identity(made)
    older = {
        **older,
        "versions": {**older["versions"], "fedsparse": "0.0.9"},
        "code": {"Regrow of feddst.py": "ab"},
    }
    with pytest.raises(
        RunError, match=r"code.Regrow of feddst.py was .*versions.fedsparse was '0.1.0', is '0.0.9'"
    ):
        checkpoint.load(tmp_path / "c", older)


def test_comments_and_docstrings_of_parts_may_change_between_run_and_resume(tmp_path, make_resolved):
    path = tmp_path / "mine.py"
    text = '''"""A."""
from fedsparse.core.hookspecs import hookimpl
from fedsparse.core.method import Method
from fedsparse.core.part import Part

class Never(Part):
    """B."""

    @hookimpl
    def target_sparsity(self, base):
        """C."""
        return base

METHOD = Method("mine", readjust=Never())
'''

    def identity(text):
        path.write_text(text)
        return checkpoint.identity(make_resolved(str(path)))["code"]["Never of mine.py"]

    first = identity(text)
    assert (
        identity(
            text.replace("B.", "Other words").replace("C.", "Here, too").replace("base\n\n", "base  # why\n")
        )
        == first
    )
    assert identity(text.replace("return base", "return 0.5")) != first


@pytest.mark.parametrize("plugin", ["fedavg", "feddst", "pffdst"])
def test_every_message_of_a_run_encodes_and_decodes(make_engine, plugin):
    short = {} if plugin == "fedavg" else {"method__readjust__period": 3}
    engine = make_engine(plugin, ledger__encode=True, federation__rounds=16, **short)
    plain = make_engine(plugin, federation__rounds=16, **short)
    sizes = [
        [(r.metrics["upload_bytes"], r.metrics["download_bytes"]) for r in e.rounds(e.start())]
        for e in (engine, plain)
    ]
    assert sizes[0] == sizes[1]


def test_a_written_configuration_repeats_the_run(make_resolved, tmp_path):
    made = make_resolved("pffdst", ["readjust=feddst"], federation__rounds=5, method__readjust__period=3)
    run(made, tmp_path / "a")
    again = resolve(configs=[str(tmp_path / "a" / "config.toml")])
    assert again.config == made.config
    run(again, tmp_path / "b")
    assert lines(tmp_path / "a") == lines(tmp_path / "b")


class InPlace(Part):
    """Writes into what it is given."""

    @hookimpl
    def local_step(self, loss, params, carry, batch, lr):
        value, grads, carry = loss.value_and_grad(params, carry, batch)
        for name, gradient in grads.items():
            params[name] -= lr * gradient
        return Stepped(params, carry, {"loss": value})


class InPlaceOnServer(Part):
    @hookimpl
    def readjust(self, params, mask, memory):
        next(iter(mask.values())).fill_(True)
        return Readjusted(params, mask, memory)


class Forgetful(Part):
    """Changes its memory and says that nothing changes."""

    @hookimpl
    def freeze(self, memory):
        memory["n"] = memory.get("n", 0) + 1
        return


@pytest.mark.parametrize("part", [InPlace(), InPlaceOnServer()])
def test_hooks_may_not_write_into_their_arguments(make_resolved, part):
    engine = with_part(make_resolved, part, sparsity__target=0.0)
    start = engine.start()
    with pytest.raises(ContractError, match=r"wrote into a tensor.*return new ones"):
        next(engine.rounds(start))


def test_memory_changes_only_by_what_is_returned(make_resolved):
    reports = play(with_part(make_resolved, Forgetful()), 3)
    assert not reports[-1].state.memory.get("freeze_policy")


class BadMetric(Part):
    @hookimpl
    def local_step(self, params, carry):
        return Stepped(params, carry, {"loss": 0.5})


class LostBuffers(Part):
    @hookimpl
    def local_step(self, loss, params, carry, batch):
        value, _, carry = loss.value_and_grad(params, carry, batch)
        return Stepped(params, Carry({}, carry.state), {"loss": value})


class FloatSum(Part):
    @hookimpl
    def contribute(self, params):
        return {"weight": 1.0}

    @hookimpl
    def aggregate(self, params, mask):
        return Aggregated(params, mask, {})


class VagueDue(Part):
    @hookimpl
    def due(self, clock):
        return None

    @hookimpl
    def readjust(self, params, mask):
        return Readjusted(params, mask, {})


class Unkeepable(Part):
    @hookimpl
    def readjust(self, params, mask):
        return Readjusted(params, mask, {"a": {"seen": {1, 2}}})


class PartialWeights(Part):
    @hookimpl
    def effective_params(self, params):
        return {name: p for name, p in params.items() if name != "fc1.bias"}

    @hookimpl
    def local_step(self, loss, params, carry, batch):
        value, _, carry = loss.value_and_grad(params, carry, batch)
        return Stepped(params, carry, {"loss": value})


class VectorPenalty(Part):
    @hookimpl
    def penalty(self, params):
        return params["fc1.bias"]


class TextBytes(Part):
    @hookimpl
    def paper_bytes(self, traffic):
        return "many"


@pytest.mark.parametrize(
    ("part", "text"),
    [
        (BadMetric(), "metric 'loss' is float; expected a 0-d tensor"),
        (FloatSum(), "slot aggregate, hook contribute.*'weight' is float; expected a tensor"),
        (VagueDue(), "hook due.*returned NoneType; expected bool"),
        (Unkeepable(), r"memory\['seen'\] is set"),
        (PartialWeights(), "hook effective_params.*left out parameters"),
        (VectorPenalty(), "part VectorPenalty, slot extras, hook penalty.*0-d tensor"),
        (TextBytes(), "hook paper_bytes.*'many'; expected a number"),
    ],
)
def test_wrong_results_are_found_where_they_arise(make_resolved, part, text):
    from fedsparse import RunError

    extras = (part,) if part.slot() == "extras" else ()
    engine = with_part(make_resolved, None if extras else part, extras=extras)
    with pytest.raises(RunError, match=text):
        play(engine)


def test_lost_buffers_are_found(make_engine, make_resolved):
    changes = {
        "task__dataset__channels": 3,
        "task__dataset__height": 8,
        "task__dataset__width": 8,
        "task__model": "resnet18",
        "task__model__use": None,
        "task__model__hidden": None,
    }
    with pytest.raises(ContractError, match=r"carry.buffers: missing \['"):
        play(with_part(make_resolved, LostBuffers(), **changes))


class Noisy(torch.nn.Module):
    """Dropout, and a weight that two layers share."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(36, 36)
        self.second = torch.nn.Linear(36, 36)
        self.second.weight = self.first.weight
        self.last = torch.nn.Linear(36, 4)

    def forward(self, x):
        x = torch.relu(self.first(x.flatten(1)))
        return self.last(torch.dropout(torch.relu(self.second(x)), 0.5, self.training))


def test_dropout_repeats_and_tied_weights_train(make_resolved, monkeypatch):
    from fedsparse.core.models.simple import Mlp

    monkeypatch.setattr(Mlp, "build", lambda *_: Noisy())
    losses = []
    for _ in range(2):
        torch.manual_seed(torch.seed() % 2**31)  # whatever the global generator was left at
        engine = with_part(make_resolved, None, "feddst", federation__rounds=3, ledger__encode=True)
        losses.append([report.metrics["train_loss"] for report in engine.rounds(engine.start())])
    assert losses[0] == losses[1]
    assert engine.prunable == ("first.weight", "last.weight")
    dense = with_part(make_resolved, None, "fedavg", federation__rounds=1, sparsity__target=0.0)
    metrics = play(dense)[0].metrics
    macs = 2 * 36 * 36 + 36 * 4  # the shared weight is used twice
    epochs = dense.config.federation.local_epochs
    assert metrics["flops_total"] == 6 * macs * metrics["samples"] * epochs


def test_the_engine_follows_the_learning_rate_schedule(make_engine):
    engine = make_engine(
        federation__learning_rate_schedule="linear",
        federation__learning_rate_final=0.0,
        federation__learning_rate=0.4,
        federation__rounds=4,
    )
    state, rates, train = engine.start(), [], engine.executor.train

    def watched(plan, clients):
        rates.append(plan.lr)
        return train(plan, clients)

    engine.executor.train = watched
    list(engine.rounds(state))
    assert rates == pytest.approx([0.4, 0.3, 0.2, 0.1])


def test_train_loss_is_the_mean_over_samples(make_engine, monkeypatch):
    """40 samples a client in batches of 16, 16 and 8: the short batch counts half."""
    engine = make_engine(federation__clients_per_round=1, federation__local_epochs=1)
    step, seen = engine.executor.step, []

    def watched(expected, place, /, **offered):
        stepped = step(expected, place, **offered)
        seen.append((len(offered["batch"].targets), float(stepped.metrics["loss"])))
        return stepped

    engine.executor.step = watched
    metrics = play(engine)[0].metrics
    assert [size for size, _ in seen] == [16, 16, 8]
    # sums of float32 in another order
    assert metrics["train_loss"] == pytest.approx(sum(n * loss for n, loss in seen) / 40, rel=1e-6)


def test_client_accuracy_is_the_unweighted_mean_over_clients(make_engine):
    from torch.func import functional_call

    engine = make_engine(
        task__partition="dirichlet",
        task__partition__use=None,
        task__partition__alpha=0.5,
        federation__rounds=8,
        task__dataset__noise=1.0,
    )
    report = list(engine.rounds(engine.start()))[-1]
    data, partition = engine.task.dataset, engine.task.partition
    engine.task.model.eval()
    outputs = functional_call(
        engine.task.model,
        {**report.state.params, **report.state.buffers},
        (data.normalise(data.test_inputs),),
    )
    hits = (outputs.argmax(1) == data.test_targets).double()
    each = [float(hits[partition.test_of(k)].mean()) for k in range(partition.clients)]
    assert report.metrics["client_accuracy"] == pytest.approx(sum(each) / len(each))
    assert report.metrics["test_accuracy"] == pytest.approx(float(hits.mean()))
    assert report.metrics["client_accuracy"] != pytest.approx(report.metrics["test_accuracy"])


def test_server_scores_are_weighted_by_samples_and_charged(make_resolved):
    engine = with_part(
        make_resolved,
        ServerRegrow(),
        task__partition="dirichlet",
        task__partition__use=None,
        task__partition__alpha=0.5,
    )
    given, score = [], engine.executor.score

    def watched(plan, client, clock, batches):
        found = score(plan, client, clock, batches)
        given.append((len(engine.task.partition.train_of(client.number)), found["fc1.weight"]))
        return found

    engine.executor.score = watched
    readjust, seen = engine.readjust, []

    def kept(state, site, budget, clock, uploads=None):
        if uploads is not None and uploads.score:
            seen.append(uploads.mean_score()["fc1.weight"])
        readjust(state, site, budget, clock, uploads)

    engine.readjust = kept
    reports = play(engine, 2)
    assert len({samples for samples, _ in given}) > 1
    total = sum(samples for samples, _ in given)
    torch.testing.assert_close(seen[0], sum(n * s for n, s in given) / total)
    weights = sum(layer.weights for layer in engine.task.layers)
    extra = reports[1].metrics["upload_bytes"] - reports[0].metrics["upload_bytes"]
    assert extra == 3 * (HEADER + 4 * weights)


def test_configurations_with_any_keys_and_values_can_be_read_back():
    import tomllib

    from fedsparse.core.config import to_toml

    tree = {
        "a": {"fc1.weight": 0.5, "two words": {"x": True}, "empty": {}},
        "b": [1, 2.5, 'é"\\'],
        "c": [{"x y": 1}, {"z": [False]}],
        "é": {"d": -1e-9},
    }
    assert tomllib.loads(to_toml(tree)) == tree


@pytest.mark.parametrize("plugin", ["fedavg", "feddst"])
def test_an_emptied_layer_is_not_rescaled_to_nan(make_engine, plugin):
    engine = make_engine(
        plugin,
        sparsity__rescale_init=True,
        sparsity__allocation="global",
        sparsity__target=0.99,
        task__model__hidden=[2000, 400],
    )
    assert all(p.isfinite().all() for p in engine.start().params.values())


def test_sampling_with_replacement_trains_a_client_twice(make_engine):
    """As the FedDST and PFFDST codes do (FedDST document 9.8): it downloads, trains and counts twice."""
    engine = make_engine("pffdst", federation__replacement=True, federation__clients_per_round=6)
    reports = play(engine, 4)
    repeated = [r.metrics for r in reports if len(set(r.metrics["clients"])) < 6]
    assert repeated
    for metrics in repeated:
        sizes = [len(engine.task.partition.train_of(client)) for client in metrics["clients"]]
        assert metrics["samples"] == sum(sizes)
    plain = make_engine("pffdst", federation__clients_per_round=6)
    assert sorted(play(plain)[0].metrics["clients"]) == list(range(6))


def test_parts_that_need_a_partner_are_refused_alone(make_resolved):
    with pytest.raises(ConfigError, match="DynamicSgd works only with DynamicMean in the slot aggregate"):
        make_resolved("fedavg", ["local_step=feddyn"])
    both = make_resolved("fedavg", ["local_step=feddyn", "aggregate=feddyn"])
    assert both.method.aggregate is not None


def test_fields_that_two_slots_share_must_agree(make_resolved):
    with pytest.raises(ConfigError, match="warmup is 3 in AdaptDensities, but 1 in the slot aggregate"):
        make_resolved("flash", method__readjust__warmup=3)
    both = make_resolved("flash", method__readjust__warmup=3, method__aggregate__warmup=3)
    assert both.method.aggregate.warmup == 3
