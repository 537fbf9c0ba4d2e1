"""A run whose messages are encoded, decoded and gone on with is the run that only counts them."""

import pytest
import torch

from fedsparse.core import task
from fedsparse.core.engine import Engine
from fedsparse.core.registry import Registry
from fedsparse.core.resolve import resolve

NAMES = Registry().names()
PERIOD = {"feddst", "pffdst", "prunefl", "rigl", "set", "fedtiny"}
PARTS = ("upload_values_bytes", "upload_mask_bytes", "upload_dense_bytes", "upload_other_bytes")


def bits(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def played(engine):
    """Every round's numbers and the bits of its model."""
    rounds = []
    for report in engine.rounds(engine.start()):
        groups = (report.state.params, report.state.buffers, report.state.mask, report.state.frozen)
        model = [(name, bits(tensor)) for group in groups for name, tensor in group.items()]
        metrics = {name: value for name, value in report.metrics.items() if name != "seconds"}
        assert metrics["upload_bytes"] == sum(metrics[name] for name in PARTS)
        rounds.append((metrics, model))
    return rounds


def same_run(make, **changes):
    """The length of every message is held against its charge where it is encoded."""
    counted, encoded = (played(make(ledger__encode=encode, **changes)) for encode in (False, True))
    for (metrics, model), (other_metrics, other_model) in zip(counted, encoded, strict=True):
        assert metrics == other_metrics
        assert model == other_model
    return counted


CASES = [(name, kind, "float32") for name in NAMES for kind in ("sequential", "vectorised")]
CASES += [(name, "sequential", "float16") for name in NAMES[::4]]
CASES += [(name, "vectorised", "bfloat16") for name in NAMES[1::4]]  # some of them, to save time


@pytest.mark.parametrize(("plugin", "executor", "values"), CASES)
def test_encoded_is_counted(make_engine, plugin, executor, values):
    changes = {"method__readjust__period": 2} if plugin in PERIOD else {}
    rounds = same_run(
        lambda **more: make_engine(
            plugin,
            federation__rounds=6,
            federation__local_epochs=1,
            execution__executor=executor,
            execution__chunk=2,
            ledger__values=values,
            **more,
        ),
        **changes,
    )
    assert len(rounds) == 6


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["sequential", "vectorised", "graph"])
@pytest.mark.parametrize("plugin", NAMES)
def test_encoded_is_counted_on_digits(plugin, executor):
    def make(**more):
        sets = ["federation.rounds=4", "federation.local_epochs=1", f"execution.executor={executor}"]
        sets += ["execution.chunk=3", "execution.device=cpu"]
        sets += ["method.readjust.period=2"] if plugin in PERIOD - {"pffdst"} else []
        sets += ["method.readjust.period=1"] if plugin == "pffdst" else []
        sets += [f"{name.replace('__', '.')}={str(value).lower()}" for name, value in more.items()]
        made = resolve(plugin, sets=sets)
        return Engine(made, task.build(made.config))

    assert len(same_run(make)) == 4


def test_two_byte_values_change_the_run_and_halve_its_values(make_engine):
    """Clients train what arrived; the server keeps its own copy."""
    runs = {}
    for values in ("float32", "float16", "bfloat16"):
        engine = make_engine("fedavg", federation__rounds=2, ledger__values=values)
        runs[values] = played(engine)
    whole, half, brain = runs.values()
    assert half[0][0]["upload_values_bytes"] * 2 == whole[0][0]["upload_values_bytes"]
    assert len({str(run[-1][1]) for run in (whole, half, brain)}) == 3
    assert abs(half[-1][0]["train_loss"] - whole[-1][0]["train_loss"]) < 0.01
