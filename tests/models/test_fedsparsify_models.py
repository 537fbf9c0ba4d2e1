"""FedSparsify's networks (section 7.1 of its method document): counts to the unit, forward pass, vmap."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn.functional import batch_norm, conv2d, cross_entropy, linear, max_pool2d

from fedsparse.core.errors import ConfigError
from fedsparse.core.models import MODELS

CIFAR = (3, 32, 32)


def build(name, shape, classes, **settings):
    torch.manual_seed(0)
    return MODELS[name](**settings).build(shape, classes)


def counts(model):
    """Trainable and non-trainable floats; torch's counters of batches are integers, Keras has none."""
    buffers = [b for b in model.buffers() if b.is_floating_point()]
    return sum(p.numel() for p in model.parameters()), sum(b.numel() for b in buffers)


def test_7_1_fashion_mnist_net_is_an_mlp():
    model = build("mlp", (1, 28, 28), 10, hidden=(128, 128))
    assert [sum(p.numel() for p in layer.parameters()) for layer in model.children()] == [
        100_480,
        16_512,
        1_290,
    ]
    assert counts(model) == (118_282, 0)


def test_7_1_cifar_cnn():
    model = build("cifar-cnn", CIFAR, 10)
    layers = {name: sum(p.numel() for p in layer.parameters()) for name, layer in model.named_children()}
    assert layers == {
        "conv1": 1_792,
        "conv2": 36_928,
        "norm2": 128,
        "conv3": 73_856,
        "conv4": 147_584,
        "norm4": 256,
        "conv5": 147_584,
        "conv6": 147_584,
        "fc1": 1_049_088,
        "fc2": 5_130,
    }
    assert counts(model) == (1_609_930, 384)


@pytest.mark.parametrize(("classes", "trainable"), [(100, 14_774_436), (10, 14_736_714 - 8_448)])
def test_7_1_vgg16(classes, trainable):
    with torch.device("meta"):  # counts need no memory
        model = build("vgg16", CIFAR, classes)
    assert counts(model) == (trainable, 8_448)
    convolutions = [m for m in model.children() if isinstance(m, nn.Conv2d)]
    assert sum(p.numel() for m in convolutions for p in m.parameters()) == 14_714_688
    assert [m.out_channels for m in convolutions] == [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6
    assert model.fc1.weight.shape == (classes, 512)


def normed(p, buffers, name, x):
    """Batch normalisation with running statistics."""
    statistics = buffers[f"{name}.running_mean"], buffers[f"{name}.running_var"]
    return batch_norm(x, *statistics, p[f"{name}.weight"], p[f"{name}.bias"])


def test_cifar_cnn_normalises_behind_its_first_two_poolings():
    model = build("cifar-cnn", (3, 8, 8), 4).eval()
    for b in model.buffers():
        if b.is_floating_point():
            b.uniform_(0.5, 2.0)
    p, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    inputs = torch.randn(2, 3, 8, 8)
    x = inputs
    for i in range(1, 7):
        x = conv2d(x, p[f"conv{i}.weight"], p[f"conv{i}.bias"], padding=1).relu()
        if i % 2 == 0:
            x = max_pool2d(x, 2)
        if i in (2, 4):
            x = normed(p, buffers, f"norm{i}", x)
    x = linear(x.flatten(1), p["fc1.weight"], p["fc1.bias"]).relu()
    torch.testing.assert_close(model(inputs), linear(x, p["fc2.weight"], p["fc2.bias"]))


def test_vgg16_normalises_before_the_relu():
    model = build("vgg16", (1, 32, 32), 4).eval()
    p, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    x = inputs = torch.randn(1, 1, 32, 32)
    for i in range(1, 14):
        x = conv2d(x, p[f"conv{i}.weight"], p[f"conv{i}.bias"], padding=1)
        x = normed(p, buffers, f"norm{i}", x).relu()
        if i in (2, 4, 7, 10, 13):
            x = max_pool2d(x, 2)
    torch.testing.assert_close(model(inputs), linear(x.flatten(1), p["fc1.weight"], p["fc1.bias"]))


def test_dropout_acts_in_training_only():
    model, x = build("cifar-cnn", (1, 8, 8), 4), torch.randn(4, 1, 8, 8)
    model.eval()
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))
    assert torch.equal(*(build("cifar-cnn", (1, 8, 8), 4, dropout=0.0).train()(x) for _ in range(2)))


def test_cifar_cnn_is_a_pure_function_and_agrees_under_vmap():
    """In float64, and without dropout, which draws other numbers for stacked clients."""
    model = build("cifar-cnn", (1, 8, 8), 4, dropout=0.0).double().requires_grad_(False)
    params = {n: torch.stack([p, 1.1 * p]) for n, p in model.named_parameters()}
    buffers = {n: torch.stack([b, b.clone()]) for n, b in model.named_buffers()}
    inputs, targets = torch.randn(2, 3, 1, 8, 8, dtype=torch.float64), torch.randint(0, 4, (2, 3))

    def step(p, b, x, y):
        def loss(p):
            own = {n: t.clone() for n, t in b.items()}
            return cross_entropy(functional_call(model, {**p, **own}, (x,)), y), own

        return grad_and_value(loss, has_aux=True)(p)

    stacked = vmap(step)(params, buffers, inputs, targets)
    for k in range(2):
        one = ({n: t[k] for n, t in params.items()}, {n: t[k] for n, t in buffers.items()})
        alone = step(*one, inputs[k], targets[k])
        of_client = torch.utils._pytree.tree_map(lambda t, k=k: t[k], stacked)
        # batched kernels sum in another order: 1e-16 a sum, raised by the normalisation of 2x2 pixels
        torch.testing.assert_close(of_client, alone, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("name", "size"), [("cifar-cnn", 7), ("vgg16", 28)])
def test_inputs_that_are_too_small_are_one_readable_error(name, size):
    with pytest.raises(ConfigError, match=rf"task.model: {name} needs inputs of .*; use cnn or mlp"):
        build(name, (3, size, 32), 10)
