"""Clients of one sample, of one class, and with a last minibatch of one sample."""

import math

import pytest
import torch
from torch import nn

from fedsparse.core.normalisation import OneSample

NETS = """
from torch import nn


def normalised(input_shape, classes):
    size = input_shape[0] * input_shape[1] * input_shape[2]
    return nn.Sequential(
        nn.Flatten(), nn.Linear(size, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 8), nn.LayerNorm(8),
        nn.Linear(8, classes),
    )
"""
SIZES = (1, 1, 17, 16, 5, 33)  # with minibatches of 16: one sample alone four times


@pytest.fixture
def small(make_engine, tmp_path, monkeypatch):
    """An engine whose clients have these numbers of samples."""
    (tmp_path / "small_client_nets.py").write_text(NETS)
    monkeypatch.syspath_prepend(str(tmp_path))
    owners = [client for client, size in enumerate(SIZES) for _ in range(size)]
    (tmp_path / "ids.txt").write_text("\n".join(map(str, owners)))
    task = {"task__dataset__train": sum(SIZES), "task__partition__use": "by-user"}
    task |= {"task__partition__train_ids": str(tmp_path / "ids.txt"), "task__model__hidden": None}
    task |= {"federation__clients": 6, "federation__clients_per_round": 6, "federation__rounds": 2}
    # statistics of few samples amplify rounding from step to step
    task |= {"federation__learning_rate": 1e-3, "execution__chunk": 3, "sparsity__target": 0.5}
    return lambda plugin="fedavg", **changes: make_engine(plugin, **(task | changes))


def last(engine):
    return list(engine.rounds(engine.start()))[-1]


@pytest.mark.parametrize("plugin", ["fedavg", "feddst", "sparsyfed", "prunefl"])
def test_one_sample_trains_through_batch_normalisation_in_every_executor(small, plugin):
    changes = {"task__model__use": "small_client_nets:normalised"}
    changes |= {"method__readjust__period": 1} if plugin in ("feddst", "prunefl") else {}
    one = last(small(plugin, **changes))
    assert one.metrics["samples"] == sum(SIZES)
    assert all(torch.isfinite(t).all() for t in (*one.state.params.values(), *one.state.buffers.values()))
    for kind in ("vectorised", "graph"):
        other = last(small(plugin, execution__executor=kind, **changes))
        for name, value in {**one.state.params, **one.state.buffers}.items():
            now = {**other.state.params, **other.state.buffers}[name]
            torch.testing.assert_close(now, value, atol=1e-5, rtol=1e-4)
        assert math.isclose(one.metrics["train_loss"], other.metrics["train_loss"], rel_tol=1e-4)


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("resnet18", {"norm": "batch"}),
        pytest.param("resnet18", {"norm": "group"}, marks=pytest.mark.slow),
        pytest.param("vgg16", {}, marks=pytest.mark.slow),
        ("cifar-cnn", {}),
    ],
)
def test_shipped_networks_train_on_one_sample(small, model, settings):
    side = 8 if model == "resnet18" else 32
    shape = {"task__dataset__height": side, "task__dataset__width": side, "task__dataset__channels": 3}
    own = {f"task__model__{name}": value for name, value in settings.items()}
    engine = small(**shape, **own, task__model__use=model, federation__rounds=1, federation__local_epochs=1)
    object.__setattr__(engine.task, "clients", lambda round_: [0, 1])
    report = last(engine)
    assert report.metrics["samples"] == 2
    assert all(
        torch.isfinite(t).all() for t in (*report.state.params.values(), *report.state.buffers.values())
    )


def test_a_value_alone_is_normalised_by_what_was_seen_before():
    layer = nn.BatchNorm1d(3).train()
    layer(torch.randn(20, 3) * 3 + 1)
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    x = torch.randn(1, 3)
    with OneSample():
        shown = layer(x)
    torch.testing.assert_close(shown, (x - mean) / (var + layer.eps).sqrt())
    assert torch.equal(layer.running_mean, mean)
    image = nn.BatchNorm2d(3).train()
    y = torch.randn(1, 3, 2, 2)
    with OneSample():
        shown = image(y)
    expected = nn.BatchNorm2d(3).train()
    assert torch.equal(shown, expected(y))  # more than one value: PyTorch's business
    assert torch.equal(image.running_var, expected.running_var)


@pytest.mark.parametrize("kind", ["sequential", "vectorised", "graph"])
def test_clients_of_one_class_train(make_engine, kind):
    engine = make_engine(
        "feddst", task__partition__use="class-disjoint", federation__clients=4, execution__executor=kind,
        federation__rounds=3, method__readjust__period=1, task__partition__classes_per_client=1,
    )  # fmt: skip
    partition, targets = engine.task.partition, engine.task.dataset.train_targets
    assert any(len(targets[torch.from_numpy(partition.train_of(c))].unique()) == 1 for c in range(4))
    assert math.isfinite(last(engine).metrics["train_loss"])
