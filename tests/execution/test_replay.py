"""A local step that runs from a recording changes no bit; and what cannot be recorded runs as it is."""

import dataclasses
import itertools

import pytest
import torch

from fedsparse.core.compose import PluginError
from fedsparse.core.execution import replay
from fedsparse.core.hookspecs import hookimpl
from fedsparse.core.registry import Registry
from fedsparse.core.state import Stepped
from fedsparse.plugins.fedavg import MaskedSgd

SHORT = {"federation__rounds": 3, "federation__local_epochs": 2}


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    """Steps are recorded when they first come in the second round, and numbers read anew."""
    monkeypatch.setattr(replay, "OFTEN", 0)
    monkeypatch.setattr(replay, "PAYS", 0)


def last(engine):
    return list(engine.rounds(engine.start()))[-1]


def assert_replayed(make_engine, plugin="fedavg", **changes):
    """A run with recordings is that without; its executor."""
    plain, engine = (
        make_engine(plugin, execution__replay=on, **{**SHORT, **changes}) for on in (False, True)
    )
    one, other = last(plain), last(engine)
    assert plain.executor.replays is None
    for group in ("params", "buffers", "mask", "frozen"):
        mine, others = getattr(one.state, group), getattr(other.state, group)
        assert all(torch.equal(mine[name], others[name]) for name in mine)
    assert one.metrics | {"seconds": 0} == other.metrics | {"seconds": 0}
    return engine.executor


def trusted(executor):
    return [recording for recording in executor.replays.recordings.values() if recording.trusted]


FALLING = {
    "federation__learning_rate": 0.05,
    "federation__learning_rate_schedule": "exponential",
    "federation__learning_rate_final": 0.01,
}


STACKED = ("fedavg", "feddst", "pffdst", "scaffold", "sparsyfed")  # others take as long and show less


@pytest.mark.parametrize(
    ("plugin", "kind"),
    [(name, "sequential") for name in Registry().names()]
    + [
        pytest.param(name, "vectorised", marks=() if name in STACKED else pytest.mark.slow)
        for name in Registry().names()
    ],
)
def test_every_method_is_the_same_to_the_bit(make_engine, plugin, kind):
    """Under a rate that falls, in whose recordings the numbers are read anew."""
    changes = {"method__readjust__period": 1} if plugin in ("feddst", "pffdst") else {}
    changes |= FALLING | {"federation__rounds": 4, "execution__executor": kind, "execution__chunk": 2}
    executor = assert_replayed(make_engine, plugin, **changes)
    assert not executor.replays.refused
    assert any(len(recording.numbers) > 1 for recording in trusted(executor))


IMAGES = {
    "task__dataset__channels": 3,
    "task__dataset__height": 32,
    "task__dataset__width": 32,
    "task__dataset__train": 48,
    "federation__clients": 4,
    "task__model__hidden": None,
}


@pytest.mark.parametrize(
    ("plugin", "model"), [("sparsyfed", "lenet"), ("zerofl", "lenet"), ("fedprox", "cifar-cnn")]
)
def test_convolutions_pooling_and_dropout(make_engine, plugin, model):
    changes = IMAGES | {"task__model__use": model, "federation__learning_rate": 1e-3}
    changes |= {"federation__clients_per_round": 1, "federation__rounds": 4}
    assert trusted(assert_replayed(make_engine, plugin, **changes))


def stepping(engine, part):
    """FedAvg's engine with another local step."""
    engine.executor.step = dataclasses.replace(engine.executor.step, function=part.local_step)
    return engine


def of_both(make_engine, part, **changes):
    """The models that FedAvg with that local step ends with, without recordings and with; and its replays."""
    engines = [
        stepping(make_engine("fedavg", execution__replay=on, **{**SHORT, **changes}), part())
        for on in (False, True)
    ]
    return *(last(engine).state.params for engine in engines), engines[1].executor.replays


def assert_equal(one, other):
    assert all(torch.equal(one[name], value) for name, value in other.items())


class Limited(MaskedSgd):
    """A step that uses another number than the rate, made from it, and only where weights are large."""

    @hookimpl
    def local_step(self, loss, params, carry, batch, trainable, lr, momentum, weight_decay):
        made = super().local_step(loss, params, carry, batch, trainable, lr, momentum, weight_decay)
        return made._replace(params={name: p.clamp(-20 * lr, 20 * lr) for name, p in made.params.items()})


def test_numbers_that_are_made_from_a_rate_change_with_it(make_engine, monkeypatch):
    one, other, replays = of_both(make_engine, Limited, **FALLING)
    assert_equal(one, other)
    assert all(recording.trusted for recording in replays.recordings.values())
    assert replays.recordings
    monkeypatch.setattr(replay, "PAYS", 1000)  # then a round's steps run as they are
    one, other, replays = of_both(make_engine, Limited, **FALLING)
    assert_equal(one, other)
    assert all(len(recording.numbers) == 1 for recording in replays.recordings.values())


class Branching(MaskedSgd):
    """A step that does something else at low rates."""

    @hookimpl
    def local_step(self, loss, params, carry, batch, trainable, lr, momentum, weight_decay):
        made = super().local_step(loss, params, carry, batch, trainable, lr, momentum, weight_decay)
        return made if lr > 0.02 else made._replace(params={n: p.relu() for n, p in made.params.items()})


class Counting(MaskedSgd):
    """A step that counts by its rate."""

    @hookimpl
    def local_step(self, loss, params, carry, batch, trainable, lr, momentum, weight_decay):
        made = super().local_step(loss, params, carry, batch, trainable, lr, momentum, weight_decay)
        return made._replace(metrics={"loss": made.metrics["loss"] + int(1000 * lr)})


class Multiplying(MaskedSgd):
    """A step with an operation whose backward pass is another one while it is recorded, in its last bits."""

    @hookimpl
    def local_step(self, loss, params, carry, batch, trainable, lr, momentum, weight_decay):
        made = super().local_step(loss, params, carry, batch, trainable, lr, momentum, weight_decay)
        leaf = made.params["fc1.weight"].detach().requires_grad_()
        with torch.enable_grad():
            (pull,) = torch.autograd.grad((1 + leaf).prod(), leaf)
        moved = made.params | {"fc1.weight": made.params["fc1.weight"] - 1e-3 * pull}
        return made._replace(params={n: p * trainable.get(n, 1) for n, p in moved.items()})


class Multiplied(MaskedSgd):
    """A step that at low rates does what has other last bits while it is recorded."""

    @hookimpl
    def local_step(self, loss, params, carry, batch, trainable, lr, momentum, weight_decay):
        step = MaskedSgd() if lr > 0.02 else Multiplying()
        return step.local_step(loss, params, carry, batch, trainable, lr, momentum, weight_decay)


@pytest.mark.parametrize("part", [Branching, Counting, Multiplied])
def test_what_else_changes_with_a_rate_is_noticed(make_engine, monkeypatch, part):
    """The recording is another one from then on; a step that often changes has none."""
    one, other, replays = of_both(make_engine, part, **FALLING)
    assert_equal(one, other)
    assert replays.changes >= 1
    monkeypatch.setattr(replay, "CHANGES", 1)
    one, other, replays = of_both(make_engine, part, **FALLING)
    assert_equal(one, other)
    assert replays.refused == "its operations change with its numbers"
    assert not replays.recordings


class Looking(MaskedSgd):
    """A step that looks at its loss."""

    @hookimpl
    def local_step(self, loss, params, carry, batch, trainable, lr, momentum, weight_decay):
        made = super().local_step(loss, params, carry, batch, trainable, lr, momentum, weight_decay)
        return made if made.metrics["loss"].item() > 1 else made._replace(params=params)


class Writing(MaskedSgd):
    """A step that moves its momentum in place."""

    @hookimpl
    def local_step(self, loss, params, carry, batch, trainable, lr, momentum, weight_decay):
        value, grads, carry = loss.value_and_grad(params, carry, batch)
        velocity = {n: v.mul_(momentum).add_(grads[n]) for n, v in carry.state["momentum"].items()}
        moved = {name: p - lr * velocity[name] * trainable.get(name, 1) for name, p in params.items()}
        return Stepped(moved, carry, {"loss": value})


class Drawing(MaskedSgd):
    """A step that draws from PyTorch's generator."""

    @hookimpl
    def local_step(self, loss, params, carry, batch, trainable, lr, momentum, weight_decay):
        lr = lr * torch.rand(())
        return super().local_step(loss, params, carry, batch, trainable, lr, momentum, weight_decay)


@pytest.mark.parametrize(
    ("part", "why"),
    [
        (Looking, "looks at values"),
        (Writing, "writes into a tensor that it was given"),
        (Multiplying, "made something else"),
        (Drawing, "draws without a key"),
    ],
)
def test_other_steps_run_as_they_are(make_engine, part, why):
    one, other, replays = of_both(make_engine, part)
    assert why in replays.refused
    assert_equal(one, other)


def test_a_step_that_is_no_function_of_its_arguments_is_noticed(make_engine):
    calls = itertools.count(1)

    class Counting(MaskedSgd):
        @hookimpl
        def local_step(self, loss, params, carry, batch, trainable, lr, momentum, weight_decay):
            lr = lr / next(calls)
            return super().local_step(loss, params, carry, batch, trainable, lr, momentum, weight_decay)

    *_, replays = of_both(make_engine, Counting)
    assert replays.refused == "its recording made something else"
    assert not replays.recordings


def test_forms_are_recorded_where_they_are_frequent(make_engine, monkeypatch):
    """40 samples a client in minibatches of 16, 16 and 8: of two forms the frequent one."""
    monkeypatch.setattr(replay, "OFTEN", 12)
    monkeypatch.setattr(replay, "MOST", 1)
    executor = assert_replayed(make_engine, federation__clients_per_round=2)
    assert {shape[0] for batch in executor.replays.often for shape, *_ in batch} == {16}


def test_there_are_so_many_recordings_and_no_more(make_engine, monkeypatch):
    """Parameters that freeze and thaw make new forms all the time."""
    monkeypatch.setattr(replay, "RECORDINGS", 1)
    assert len(assert_replayed(make_engine, federation__rounds=4).replays.recordings) == 1


def test_the_first_round_has_none_and_numbers_of_old_rounds_are_forgotten(make_engine):
    replays, step = replay.Replays(), make_engine("fedavg").executor.step
    assert replays.of(step, {"momentum": 0.9}, 0) is step
    assert replays.of(step, {"momentum": 0.9}, 1) is not step
    executor = assert_replayed(make_engine, **FALLING, federation__rounds=6)
    assert {len(recording.numbers) for recording in executor.replays.recordings.values()} == {2}


def test_what_fails_in_a_recording_is_said_by_the_step(make_engine):
    """A target that is no class."""
    engine = make_engine("fedavg", **SHORT)
    report = last(engine)
    assert trusted(engine.executor)
    engine.task.dataset.train_targets.fill_(99)
    with pytest.raises(PluginError, match=r"local_step.*round 3, client .*out of bounds"):
        engine.play(report.state)
