"""The inputs that a layer keeps: the same for one client, stacked ones and other transformations."""

import pytest
import torch

from fedsparse.core.activations import largest_inputs, threshold

UNSET = -1.0


def drawn(clients=3, dtype=torch.float32):
    torch.manual_seed(0)
    inputs = torch.randn(clients, 4, 6, 5, 5).relu().to(dtype)
    weights = torch.randn(clients, 8, 6, 3, 3) * (torch.rand(clients, 8, 6, 3, 3) < 0.3)
    return inputs, weights.to(dtype)


def plainly(inputs, weight, held, density):
    """As the words say it."""
    least, held = threshold(inputs, weight, held, density)
    return torch.where(inputs.abs() >= least, inputs, 0.0), held


@pytest.mark.parametrize("density", [None, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("start", [None, UNSET, 0.5])
def test_one_client_and_stacked_ones(dtype, start, density):
    inputs, weights = drawn(dtype=dtype)
    held = None if start is None else torch.full((3,), start, dtype=dtype)
    in_dims = (0, 0, None if held is None else 0)
    for at in range(3):
        own = None if held is None else held[at]
        kept, moved = largest_inputs(inputs[at], weights[at], own, density)
        expected, threshold_ = plainly(inputs[at], weights[at], own, density)
        assert torch.equal(kept, expected)
        assert (moved is None) == (held is None)
        assert moved is None or moved == threshold_
        assert moved is None or moved.dtype == dtype
    if held is None:
        stacked = torch.func.vmap(lambda x, w: largest_inputs(x, w, None, density)[0])(inputs, weights)
    else:
        stacked, thresholds = torch.func.vmap(
            lambda x, w, t: largest_inputs(x, w, t, density), in_dims=in_dims
        )(inputs, weights, held)
        assert thresholds.tolist() == [
            largest_inputs(inputs[at], weights[at], held[at], density)[1].item() for at in range(3)
        ]
    for at in range(3):
        own = None if held is None else held[at]
        assert torch.equal(stacked[at], plainly(inputs[at], weights[at], own, density)[0])


def test_a_dense_layer_keeps_all_and_leaves_its_threshold_open():
    inputs, weights = drawn()
    weights = torch.ones_like(weights)
    held = torch.full((3,), UNSET)
    kept, moved = largest_inputs(inputs[0], weights[0], held[0], None)
    assert torch.equal(kept, inputs[0])
    assert moved == UNSET
    kept, moved = torch.func.vmap(lambda *given: largest_inputs(*given, None))(inputs, weights, held)
    assert torch.equal(kept, inputs)
    assert moved.tolist() == [UNSET] * 3


@pytest.mark.parametrize("start", [None, UNSET])
def test_within_other_transformations(start):
    """Stacked twice, and stacked within a gradient."""
    inputs, weights = drawn(clients=4)

    def kept(x, w):
        held = None if start is None else x.new_full((), start)
        return largest_inputs(x, w, held, None)[0]

    expected = torch.stack([plainly(x, w, None, None)[0] for x, w in zip(inputs, weights, strict=True)])
    pairs = inputs.unflatten(0, (2, 2)), weights.unflatten(0, (2, 2))
    assert torch.equal(torch.func.vmap(torch.func.vmap(kept))(*pairs).flatten(0, 1), expected)

    def total(scale):
        return (scale * torch.func.vmap(kept)(inputs * scale, weights)).sum()

    slope = torch.func.grad(total)(torch.tensor(1.0))
    assert torch.allclose(slope, expected.sum())  # what is kept has no gradient


def test_a_layer_may_be_of_another_type_than_its_inputs():
    inputs, weights = drawn()
    for of in (torch.bfloat16, torch.float64):
        kept, _ = largest_inputs(inputs[0], weights[0].to(of), None, None)
        assert torch.equal(kept, plainly(inputs[0], weights[0], None, None)[0])
