"""Powered weights and their derivatives: the way that the host takes and torch's agree."""

import pytest
import torch

from fedsparse.core.powers import chained, with_slopes

ULPS = 3 * torch.finfo(torch.float32).eps  # a fourth root may differ in its last bit, and two products round


def both(theta, exponent):
    weights, slopes = with_slopes({"w": theta}, {"w": torch.tensor(exponent)})
    return weights["w"], slopes["w"]


@pytest.mark.parametrize("exponent", [1.25, 1.5, 1.1, 1.0])
def test_powers_are_those_of_exact_arithmetic(exponent):
    size = torch.cat([torch.rand(500), 1e-20 * torch.rand(50), 1e10 * torch.rand(50)])
    theta = torch.cat([torch.zeros(3), size, -size])
    before = theta.clone()
    weights, slopes = both(theta, exponent)
    exact = theta.double()
    beta = torch.tensor(exponent).double()
    assert torch.equal(theta, before)
    assert weights.dtype == slopes.dtype == torch.float32
    assert torch.allclose(weights.double(), exact.sign() * exact.abs().pow(beta), rtol=ULPS, atol=0)
    assert torch.allclose(slopes.double(), beta * exact.abs().pow(beta - 1), rtol=ULPS, atol=0)


def test_strides_stay():
    theta = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    for made, flat in zip(both(theta, 1.25), both(theta.contiguous(), 1.25), strict=True):
        assert made.stride() == theta.stride()
        assert torch.equal(made, flat)


def test_under_vmap_they_are_the_same_to_the_last_bits():
    theta = torch.randn(4, 6)
    for stacked, own in zip(torch.vmap(lambda t: both(t, 1.25))(theta), both(theta, 1.25), strict=True):
        assert torch.allclose(stacked, own, rtol=ULPS, atol=0)


def test_nan_stays_nan():
    for made in both(torch.tensor([float("nan"), 1.0]), 1.25):
        assert made.isnan().tolist() == [True, False]


def test_the_chain_rule_is_autograds():
    theta, upstream = torch.randn(7), torch.randn(7)
    leaf = theta.clone().requires_grad_()
    (leaf.sign() * leaf.abs().pow(1.25) * upstream).sum().backward()
    slopes = {"w": both(theta, 1.25)[1]}
    found = chained({"w": upstream.clone(), "b": torch.ones(2)}, slopes)
    assert torch.allclose(found["w"], leaf.grad, rtol=ULPS, atol=0)
    assert torch.equal(found["b"], torch.ones(2))
    stacked = torch.vmap(lambda g: chained({"w": g}, slopes)["w"])(upstream[None])
    assert torch.equal(stacked[0], found["w"])
