"""Functions of tensors run again from what they did, and are refused where that would not be the same."""

import re
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import batch_norm, conv2d, cross_entropy, linear, max_pool2d

from fedsparse.core import recording, rng
from fedsparse.core.recording import operation, record
from fedsparse.core.selection import kth_largest


class Made(NamedTuple):
    params: dict
    loss: torch.Tensor


def batch(seed, size=6):
    made = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(size, 3, 8, 8, generator=made),
        "y": torch.randint(0, 5, (size,), generator=made),
        "conv": torch.randn(4, 3, 3, 3, generator=made),
        "fc": torch.randn(5, 36, generator=made),
    }


def trained(given):
    """A step of SGD of a convolution and a linear layer, by autograd."""
    leaves = {name: given[name].detach().requires_grad_() for name in ("conv", "fc")}
    hidden = max_pool2d(conv2d(given["x"], leaves["conv"]).relu(), 2).flatten(1)
    loss = cross_entropy(linear(hidden, leaves["fc"]), given["y"])
    grads = torch.autograd.grad(loss, list(leaves.values()))
    moved = torch._foreach_add([given[name] for name in leaves], grads, alpha=-0.1)
    return Made(dict(zip(leaves, moved, strict=True)), loss.detach())


def assert_equal(one, other):
    assert one.params.keys() == other.params.keys()
    assert all(torch.equal(one.params[name], other.params[name]) for name in one.params)
    assert torch.equal(one.loss, other.loss)


def test_a_training_step_is_the_same_to_the_bit_of_other_values():
    calls = []

    def step(given):
        calls.append(1)
        return trained(given)

    made, again, refused = record(step, batch(0))
    assert not refused
    assert_equal(made, trained(batch(0)))
    for seed in (0, 1, 2):
        assert_equal(again(batch(seed)), trained(batch(seed)))
    assert calls == [1]
    assert type(again(batch(0))) is Made


def test_the_order_in_which_tensors_are_given_does_not_count():
    _, again, _ = record(trained, batch(0))
    assert_equal(again(dict(reversed(batch(1).items()))), trained(batch(1)))


def test_what_writes_in_place_is_kept():
    """Running statistics of a batch normalisation, and the result of `out=`."""

    def moved(given):
        mean, var = given["mean"].clone(), torch.ones(3)
        outputs = batch_norm(given["x"], mean, var, training=True)
        total = torch.zeros(())
        torch.add(outputs.sum(), 1.0, out=total)
        return {"mean": mean.mul_(2), "var": var, "total": total}

    def inputs(seed):
        return {"x": batch(seed)["x"], "mean": torch.full((3,), float(seed))}

    _, again, refused = record(moved, inputs(0))
    assert not refused
    found, expected = again(inputs(1)), moved(inputs(1))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not torch.equal(expected["mean"], moved(inputs(0))["mean"])


def test_an_operation_is_called_whole_each_time():
    calls = []

    @operation
    def larger(values, *, bound=0.0):
        calls.append(bound)
        return values if values.max().item() > bound else torch.from_numpy(values.numpy() * 2)

    def function(given):
        return {"sum": larger(given["x"], bound=3.0).sum() + kth_largest(given["x"], 2)}

    made, again, refused = record(function, {"x": torch.tensor([1.0, 2.0])})
    assert not refused
    assert made["sum"] == 6 + 1
    assert again({"x": torch.tensor([1.0, 4.0])})["sum"] == 5 + 1
    assert again({"x": torch.tensor([0.0, 1.0])})["sum"] == 2 + 0
    assert calls == [3.0] * 3


def test_an_operation_may_return_what_it_was_given():
    """As a threshold that is held once it is set; the recording must ask again."""

    @operation
    def held(threshold, fresh):
        return threshold if threshold.item() >= 0 else fresh

    def function(given):
        return {"t": held(given["t"], given["fresh"]) * 2 + given["t"]}

    one, other = torch.tensor(3.0), torch.tensor(5.0)
    made, again, _ = record(function, {"t": one, "fresh": other})
    assert made["t"] == 9
    assert again({"t": -one, "fresh": other})["t"] == 10 - 3


def test_keyed_streams_draw_as_they_do():
    def function(given):
        return {"u": rng.uniform(rng.fold(given["key"], 1), (3, 2))}

    _, again, refused = record(function, {"key": rng.key(0)})
    assert not refused
    assert torch.equal(again({"key": rng.key(7)})["u"], function({"key": rng.key(7)})["u"])


OUTSIDE = torch.ones(6)


class LooksBehind(torch.autograd.Function):
    """Looks at values in its backward pass, and where it is stacked."""

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def vmap(info, in_dims, x):
        return x * float(x.numpy().max()), 0

    @staticmethod
    def backward(ctx, grad):
        return grad * grad.tolist()[0]


def gradient(x):
    leaf = x.detach().requires_grad_()
    return torch.autograd.grad((LooksBehind.apply(leaf) * x).sum(), leaf)[0]


@operation
def first(values, count):
    return values[: int(count)]


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda x: x * x.sum().item(), "looks at values"),
        (lambda x: x if x.sum() > 0 else -x, "looks at values"),
        (lambda x: x * float(x.numpy().sum()), "by numpy"),
        (lambda x: x * float(np.asarray(x).sum()), "by __array__"),
        (lambda x: x * x.tolist()[1], "by tolist"),
        (lambda x: x + torch.from_numpy(x.detach().numpy()), "by numpy"),
        (gradient, "by tolist"),
        (lambda x: torch.func.vmap(LooksBehind.apply)(x.detach()), "by numpy"),
        (lambda x: x[x > 0].sum(), "shapes from values"),
        (lambda x: x * torch.rand(6), "draws without a key"),
        (lambda x: nn.functional.dropout(x), "draws without a key"),
        (lambda x: x + OUTSIDE, "a tensor .6,. that it was not given"),
        (lambda x: x.detach().unsqueeze_(0), "a shape in place"),
        (lambda x: first(x, np.int64(2)), "gives first a int64"),
        (lambda x: x.sum().item(), "."),
        (lambda x: [x], "returns a list"),
    ],
)
def test_what_depends_on_more_than_shapes_is_refused(function, why):
    """The function goes on as ever."""
    given = {"x": torch.arange(6.0)}
    torch.manual_seed(0)
    made, again, refused = record(lambda g: {"y": function(g["x"])}, given)
    assert again is None
    assert re.search(why, refused), refused
    torch.manual_seed(0)
    torch.testing.assert_close(made["y"], function(torch.arange(6.0)), rtol=0, atol=0)


def test_what_a_function_raises_comes_through_and_ends_the_recording():
    def broken(given):
        raise ValueError("no")

    numpy = torch.Tensor.numpy
    with pytest.raises(ValueError, match="no"):
        record(broken, batch(0))
    assert recording._here.recorder is None
    assert torch.Tensor.numpy is numpy


def test_a_function_that_records_another_is_recorded():
    def outer(given):
        inner, *_ = record(lambda g: {"y": g["x"] * 2}, given)
        return {"y": inner["y"] + kth_largest(given["x"], 1)}

    _, again, refused = record(outer, {"x": torch.tensor([1.0, 2.0])})
    assert not refused
    assert again({"x": torch.tensor([1.0, 4.0])})["y"].tolist() == [6.0, 12.0]


def test_numbers_are_read_anew():
    """Those made from others, too; the values and their order in memory do not count."""

    def function(rate):
        def step(given):
            moved = given["x"] - rate * given["x"].relu()
            return {"x": moved.clamp(-10 * rate, 10 * rate), "y": torch.full((2,), rate * rate)}

        return step

    given = {"x": torch.tensor([-9.0, 0.5, 7.0])}
    _, again, _ = record(function(0.5), given)
    other = {"x": torch.tensor([3.0, 30.0, -5.0])}
    made, numbers = again.read(function(0.25), other)
    for found in (made, again(other, numbers)):
        assert found["x"].tolist() == [2.25, 2.5, -2.5]
        assert found["y"].tolist() == [0.0625] * 2
    assert again(given)["x"].tolist() == [-5.0, 0.25, 3.5]  # with the numbers that it was recorded with


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y, other: {"z": x - y if other else y - x},
        lambda x, y, other: {"z": (x + y).sum(0) if other else (x + y).sum(1)},
        lambda x, y, other: {"z": x + y, "w": y if other else x},
        lambda x, y, other: {"z": x + (2 if other else 3)},
        lambda x, y, other: {"z": (x + y).double() if other else (x + y).to(torch.float16)},
        lambda x, y, other: {"z": x.add(y).relu() if other else x.add(y)},
        lambda x, y, other: {"z": x.numpy().max() * y if other else 1.0 * y},
    ],
)
def test_numbers_of_other_lines_are_none(function):
    """Of another operation, of another tensor, with another whole number or type, of other results."""
    given = {"x": torch.ones(2, 2), "y": torch.zeros(2, 2)}
    _, again, _ = record(lambda g: function(g["x"], g["y"], False), given)
    assert again.read(lambda g: function(g["x"], g["y"], False), given)[1] is not None
    made, numbers = again.read(lambda g: function(g["x"], g["y"], True), given)
    assert numbers is None
    assert torch.equal(made["z"], function(given["x"], given["y"], True)["z"])
