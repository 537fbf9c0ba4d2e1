"""A local step that runs from a recording changes no bit; and what cannot be recorded runs as it is."""

import dataclasses
import itertools

import pytest
import torch

from fedsparse.core.execution import replay
from fedsparse.core.hookspecs import hookimpl
from fedsparse.core.registry import Registry
from fedsparse.plugins.fedavg import MaskedSgd

SHORT = {"federation__rounds": 3, "federation__local_epochs": 2}


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    """Steps are recorded when they first come in the second round."""
    monkeypatch.setattr(replay, "OFTEN", 0)


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
    return [recording.rate for recording in executor.replays.recordings.values() if recording.rate]


@pytest.mark.parametrize("kind", ["sequential", "vectorised"])
@pytest.mark.parametrize("plugin", Registry().names())
def test_every_method_is_the_same_to_the_bit(make_engine, plugin, kind):
    changes = {"method__readjust__period": 1} if plugin in ("feddst", "pffdst") else {}
    executor = assert_replayed(make_engine, plugin, execution__executor=kind, execution__chunk=2, **changes)
    assert not executor.replays.refused
    assert trusted(executor) or plugin in NEVER


NEVER = {"fedmef": "its step looks at the clock, which is another one in each epoch"}

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
    assert trusted(assert_replayed(make_engine, plugin, **changes))


@pytest.mark.parametrize("schedule", ["constant", "exponential"])
def test_a_rate_that_changes_every_round_is_taken_from_outside(make_engine, schedule):
    changes = {"federation__learning_rate_schedule": schedule, "federation__learning_rate_final": 0.01}
    executor = assert_replayed(make_engine, **(changes if schedule != "constant" else {}))
    assert executor.replays.since == 0  # the recordings of the second round are in use to the end
    assert len(set(trusted(executor))) == 1


def stepping(engine, part):
    """FedAvg's engine with another local step."""
    engine.executor.step = dataclasses.replace(engine.executor.step, function=part.local_step)
    return engine


class Counting(MaskedSgd):
    """A step that is no function of its arguments: every call moves less."""

    @hookimpl
    def local_step(self, loss, params, carry, batch, trainable, lr, momentum, weight_decay):
        lr = lr / next(COUNT)
        return super().local_step(loss, params, carry, batch, trainable, lr, momentum, weight_decay)


class Looking(MaskedSgd):
    """A step that looks at its loss."""

    @hookimpl
    def local_step(self, loss, params, carry, batch, trainable, lr, momentum, weight_decay):
        made = super().local_step(loss, params, carry, batch, trainable, lr, momentum, weight_decay)
        return made if made.metrics["loss"].item() > 1 else made._replace(params=params)


class Squared(MaskedSgd):
    """A step that uses the square of the rate, which a recording takes for a number of its own."""

    @hookimpl
    def local_step(self, loss, params, carry, batch, trainable, lr, momentum, weight_decay):
        return super().local_step(loss, params, carry, batch, trainable, lr**2, momentum, weight_decay)


COUNT = itertools.count(1)


@pytest.mark.parametrize(
    ("part", "changes", "why"),
    [
        (Counting, {}, "made something else"),
        (Looking, {}, "looks at values"),
        (
            Squared,
            {"federation__learning_rate_schedule": "exponential", "federation__learning_rate_final": 0.01},
            "made something else",
        ),
    ],
)
def test_other_steps_run_as_they_are(make_engine, monkeypatch, part, changes, why):
    found = []
    for on in (False, True):
        monkeypatch.setitem(globals(), "COUNT", itertools.count(1))
        engine = stepping(make_engine("fedavg", execution__replay=on, **{**SHORT, **changes}), part())
        found.append(last(engine).state.params)
    assert why in engine.executor.replays.refused
    assert all(torch.equal(found[0][name], value) for name, value in found[1].items())


def test_forms_are_recorded_where_they_are_frequent(make_engine, monkeypatch):
    """40 samples a client in minibatches of 16, 16 and 8: of two forms the frequent one."""
    monkeypatch.setattr(replay, "OFTEN", 12)
    monkeypatch.setattr(replay, "MOST", 1)
    executor = assert_replayed(make_engine, federation__clients_per_round=2)
    assert {shape[0] for batch in executor.replays.often for shape, *_ in batch} == {16}


def test_the_first_round_has_none_and_other_numbers_begin_anew(make_engine):
    engine = make_engine("fedavg", **SHORT)
    replays, step = replay.Replays(), engine.executor.step
    assert replays.of(step, 0.1, {"momentum": 0.9}, 0) is step
    again = replays.of(step, 0.1, {"momentum": 0.9}, 1)
    assert again is not step
    assert replays.of(step, 0.1, {"momentum": 0.8}, 2) is step
    assert not replays.recordings


def test_a_step_that_raises_while_it_is_recorded_raises_as_it_does(make_engine):
    class Raising(MaskedSgd):
        @hookimpl
        def local_step(self, loss, params, carry, batch, trainable, lr, momentum, weight_decay):
            if next(calls) > 20:
                raise ValueError("after twenty")
            return super().local_step(loss, params, carry, batch, trainable, lr, momentum, weight_decay)

    calls = itertools.count()
    engine = stepping(make_engine("fedavg", **SHORT), Raising())
    with pytest.raises(Exception, match="after twenty"):
        last(engine)
