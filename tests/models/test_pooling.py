"""Max-pooling with filled channels is PyTorch's, to the bit."""

import pytest
import torch
from torch.nn.functional import max_pool2d

from fedsparse.core.models import pooling

SIZE = (5, 6, 13, 12)


def images(order, channels=6):
    torch.manual_seed(0)
    batch, _, *size = SIZE
    # after ReLU, so that many windows have several maxima
    return torch.randn(batch, channels, *size).relu().contiguous(memory_format=order)


@pytest.mark.parametrize("order", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("channels", [1, 6, 16, 20])
@pytest.mark.parametrize(("window", "stride"), [(3, 1), (3, 2), (2, 2)])
def test_values_and_gradients_are_those_of_pytorch(order, channels, window, stride):
    own, theirs = (images(order, channels).requires_grad_() for _ in range(2))
    pooled, expected = pooling.max_pool(own, window, stride), max_pool2d(theirs, window, stride)
    assert torch.equal(pooled, expected)
    assert pooled.stride() == expected.stride()
    slope = torch.randn_like(expected)
    pooled.backward(slope)
    expected.backward(slope)
    assert torch.equal(own.grad, theirs.grad)


def test_not_a_number_stays_one():
    own = images(torch.channels_last)
    own[0, 0, 5, 5] = torch.nan
    pooled = pooling.max_pool(own, 3, 1)
    assert torch.equal(pooled.isnan(), max_pool2d(own, 3, 1).isnan())


def test_clients_can_be_stacked():
    """Under vmap and grad PyTorch's pooling is used, with the same results."""
    stacked = torch.stack([images(torch.channels_last), images(torch.channels_last).flip(0)])

    def loss(x):
        return pooling.max_pool(x, 3, 1).square().sum()

    found = torch.func.vmap(torch.func.grad(loss))(stacked)
    for one, expected in zip(found, stacked, strict=True):
        leaf = expected.clone().requires_grad_()
        loss(leaf).backward()
        assert torch.allclose(one, leaf.grad)


def test_the_fast_way_is_taken(monkeypatch):
    """Where few channels lie last, and only there."""
    taken = []
    filled = pooling._Filled.apply
    monkeypatch.setattr(pooling._Filled, "apply", lambda *given: taken.append(given) or filled(*given))
    pooling.max_pool(images(torch.channels_last), 3, 1)
    assert len(taken) == 1
    pooling.max_pool(images(torch.channels_last, 16), 3, 1)
    pooling.max_pool(images(torch.contiguous_format), 3, 1)
    pooling.max_pool(images(torch.channels_last), 2, 2)
    assert len(taken) == 1


@pytest.mark.parametrize("dim", [0, 1])
def test_stacked_clients_pool_as_each_alone_does(dim):
    """Values and gradients."""
    clients = torch.stack([images(torch.channels_last), images(torch.contiguous_format).flip(0)], dim)
    slope = torch.randn(2, 5, 6, 6, 6)

    def scaled(x, slope):
        return (pooling.max_pool(x, 2, 2) * slope).sum()

    pooled = torch.func.vmap(lambda x: pooling.max_pool(x, 2, 2), in_dims=dim)(clients)
    slopes = torch.func.vmap(torch.func.grad(scaled), in_dims=(dim, 0))(clients, slope)
    for at in range(2):
        own = clients.select(dim, at).clone().requires_grad_()
        expected = max_pool2d(own, 2, 2)
        assert torch.equal(pooled[at], expected)
        (expected * slope[at]).sum().backward()
        assert torch.equal(slopes[at], own.grad)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")  # torch's own, of forward mode
def test_derivatives_of_higher_order_and_forward_mode():
    x, tangent = images(torch.channels_last), images(torch.channels_last, 6).flip(0)

    def loss(pool):
        return lambda x: pool(x, 2, 2).pow(3).sum()

    own, theirs = (torch.func.grad(loss(pool)) for pool in (pooling.max_pool, max_pool2d))
    for found, expected in zip(*(torch.func.jvp(g, (x,), (tangent,)) for g in (own, theirs)), strict=True):
        assert torch.allclose(found, expected)
    curvature = [torch.func.vmap(torch.func.grad(lambda x, g=g: g(x).sum())) for g in (own, theirs)]
    assert torch.allclose(*(each(torch.stack([x, tangent])) for each in curvature))
