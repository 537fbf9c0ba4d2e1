"""MACs measured on the papers' networks, against their tables."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from fedsparse.core.errors import ConfigError
from fedsparse.core.ledger import Count, PassDensity, flops, forward_macs, training_cost
from fedsparse.core.models import MODELS


def lenet(channels: tuple[int, int, int], sizes: tuple[int, ...]) -> nn.Sequential:
    """Two 5×5 convolutions, each with a pooling of stride 1, and linear layers."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(channels):
        layers += [nn.Conv2d(inputs, outputs, 5), nn.MaxPool2d(3, 1), nn.ReLU()]
    layers.append(nn.Flatten())
    for width, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(width, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Block(nn.Module):
    """ResNet's basic block."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.shortcut(x))


def resnet18() -> nn.Sequential:
    """ResNet-18 for 32×32 images, on no device: only shapes matter."""
    with torch.device("meta"):
        layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
        width = 64
        for outputs in (64, 128, 256, 512):
            layers += [Block(width, outputs, 1 if outputs == 64 else 2), Block(outputs, outputs, 1)]
            width = outputs
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


@pytest.mark.parametrize(
    ("model", "shape", "macs"),
    [
        (lenet((1, 10, 20), (5120, 50, 10)), (1, 28, 28), [144_000, 1_620_000, 256_000, 500]),
        (
            lenet((3, 6, 16), (6400, 120, 84, 10)),
            (3, 32, 32),
            [352_800, 1_161_600, 768_000, 10_080, 840],
        ),
    ],
)
def test_lenets(model: nn.Sequential, shape: tuple[int, ...], macs: list[int]) -> None:
    """FedDST document, 7.1: forward MACs of MNISTNet and CIFAR10Net by layer."""
    weights = [name for name, param in model.named_parameters() if param.dim() > 1]
    assert forward_macs(model, shape, weights) == dict(zip(weights, map(float, macs), strict=True))
    # layers that are not prunable are there all the same
    assert forward_macs(model, shape, weights[1:2]).keys() == set(weights)


def test_resnet18() -> None:
    """PFFDST document, 7: 21 layers, 555,422,720 MACs."""
    macs = forward_macs(resnet18(), (3, 32, 32), [])
    assert len(macs) == 21
    assert sum(macs.values()) == 555_422_720
    assert macs["0.weight"] == 1_769_472
    assert macs["3.conv1.weight"] == 37_748_736
    assert macs["5.conv1.weight"] == 18_874_368
    assert macs["5.shortcut.0.weight"] == 2_097_152


def test_model_is_left_alone() -> None:
    """Mode, tensors, running statistics and the random state stay as they were."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(), nn.Flatten(), nn.Linear(72, 3))
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    ids = [id(param) for param in model.parameters()]
    forward_macs(model, (1, 8, 8), [])
    assert model.training
    assert ids == [id(param) for param in model.parameters()]
    assert torch.equal(state, torch.get_rng_state())
    for name, value in model.state_dict().items():
        assert value.device.type == "cpu"
        assert torch.equal(value, before[name])


def test_shared_and_unused_modules() -> None:
    """A module that runs twice counts twice; a prunable weight without a matrix product counts 0."""
    shared = nn.Linear(6, 6)
    model = nn.ModuleDict({"first": shared, "again": shared, "table": nn.Embedding(9, 6)})

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, x: Tensor) -> Tensor:
            return torch.as_tensor(self.parts["again"](self.parts["first"](x)))

    assert forward_macs(Twice(), (6,), ["parts.table.weight"]) == {
        "parts.table.weight": 0.0,
        "parts.first.weight": 72.0,
    }


def test_grouped_convolution() -> None:
    """Groups divide the MACs."""
    assert forward_macs(nn.Sequential(nn.Conv2d(4, 8, 3, groups=2)), (4, 5, 5), []) == {"0.weight": 1296.0}


def test_module_with_several_weights() -> None:
    """They share its MACs by size; its children keep their own."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Parameter(torch.ones(6, 4)), nn.Parameter(torch.ones(2, 6))
            self.last = nn.Linear(2, 5)

        def forward(self, x: Tensor) -> Tensor:
            return torch.as_tensor(self.last(x @ self.inner.T @ self.outer.T))

    assert forward_macs(Pair(), (4,), ["outer"]) == {"outer": 12.0, "inner": 24.0, "last.weight": 10.0}


def test_training_cost() -> None:
    """Two layers, one masked at density 1/2 with half of that frozen, one unmasked, half of it frozen."""
    counts = {"a": Count(25, 25), "b": Count(10, 10), "c": Count(4, 0)}
    sizes = {"a": 100, "b": 20, "c": 4}
    cost = training_cost({"a": 400.0, "b": 20.0}, counts, sizes)
    assert cost.step == 2 * (200 + 200 + 100) + 2 * (20 + 20 + 10)
    assert cost.score == 2 * (200 + 200 + 400) + 2 * (20 + 20 + 20)


@pytest.mark.parametrize("name", list(MODELS))
def test_shapes_and_counter_agree(name: str) -> None:
    """Plain layers are counted by the shapes of their outputs, as torch's counter does it."""
    for shape in ((3, 32, 32), (1, 28, 28), (1, 1, 4000)):
        try:
            model = MODELS[name]().build(shape, 10)
        except ConfigError:
            continue
        by_shapes = flops._by_shapes(model, shape)
        assert sum(by_shapes.values()) > 0
        assert by_shapes == flops._by_counter(model, shape)
        return
    raise AssertionError(f"{name} takes none of these shapes")


@pytest.mark.parametrize(
    ("name", "shape", "classes", "macs"),
    [
        ("resnet18", (3, 32, 32), 10, 555_422_720),
        ("lenet", (3, 32, 32), 10, 2_293_320),
        ("lenet", (3, 32, 32), 100, 2_294_400),
        ("lenet", (1, 28, 28), 10, 2_020_500),
        ("conv2", (1, 28, 28), 62, 17_211_904),
    ],
)
def test_shipped_models_have_the_papers_macs(
    name: str, shape: tuple[int, int, int], classes: int, macs: int
) -> None:
    """PFFDST document, 7, and FedDST document, 7.1: forward MACs of one image."""
    assert sum(forward_macs(MODELS[name]().build(shape, classes), shape, []).values()) == macs


@pytest.mark.parametrize(("name", "shape"), [("lenet", (3, 32, 32)), ("cnn", (1, 8, 8)), ("mlp", (1, 8, 8))])
def test_a_training_step_costs_what_torch_counts(name: str, shape: tuple[int, int, int]) -> None:
    """At density 1: forward, both gradients, the input's in the first layer too, by torch's own counter."""
    from torch.utils.flop_counter import FlopCounterMode

    model, batch = MODELS[name]().build(shape, 10), 3
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    cost = training_cost(
        forward_macs(model, shape, []), {n: Count(size, 0) for n, size in sizes.items()}, sizes
    )
    counter = FlopCounterMode(display=False)
    with counter:
        model(torch.zeros(batch, *shape, requires_grad=True)).sum().backward()
    assert counter.get_total_flops() == batch * cost.step


def test_dense_gradients_are_charged() -> None:
    """FedDST document: a readjustment's minibatch costs 2·MAC·(1 - d) a sample more than a sparse step."""
    counts, sizes = {"a": Count(20, 0)}, {"a": 100}
    cost = training_cost({"a": 400.0}, counts, sizes)
    assert cost.score - cost.step == 2 * 400 * (1 - 0.2)


def test_passes_that_use_less_cost_less() -> None:
    """One layer's passes use a tenth of its weights and half of its inputs; another is as its mask says."""
    seen: list[dict[str, float]] = []

    def passes(density: Mapping[str, float]) -> dict[str, PassDensity]:
        seen.append(dict(density))
        return {"a": PassDensity(0.1, 0.5)}

    counts, sizes = {"a": Count(80, 20), "b": Count(10, 0)}, {"a": 100, "b": 20}
    cost = training_cost({"a": 400.0, "b": 20.0}, counts, sizes, passes)
    assert seen == [{"a": 1.0, "b": 0.5}]
    assert cost.step == 2 * (40 + 40 + 0.5 * 320) + 2 * (10 + 10 + 10)
    assert cost.score == 2 * (40 + 40 + 400) + 2 * (10 + 10 + 20)
