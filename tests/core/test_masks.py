"""Mask arithmetic: tie rules, counts, and the worked examples of the method documents."""

import math

import pytest
import torch

from fedsparse.core import masks, rng
from fedsparse.core.budget import Budget, Layer
from fedsparse.core.recording import record


def one_layer(sparsity, shape=(3, 4), name="w"):
    return Budget((Layer(name, shape),), "scaled", sparsity)


def test_largest_takes_the_lower_index_among_equals():
    score = torch.tensor([[1.0, 3.0, 1.0], [1.0, 0.0, 3.0]])
    assert masks.largest(score, 3).flatten().tolist() == [True, True, False, False, False, True]
    assert masks.largest(score, 0).sum() == 0
    assert masks.largest(score, 6).all()
    assert masks.largest(score, 99).all()


@pytest.mark.parametrize("count", [1, 17, 500, 999])
def test_largest_agrees_with_a_stable_sort(count):
    torch.manual_seed(0)
    score = torch.randint(0, 50, (1000,)).float()  # many ties
    order = torch.sort(score, descending=True, stable=True).indices[:count]
    expected = torch.zeros(1000, dtype=torch.bool).index_fill(0, order, True)
    assert torch.equal(masks.largest(score, count), expected)


def test_prune_keeps_active_zeros_before_inactive_ones():
    """PFFDST document 9.5, FedDST document 9.2: an active weight of exactly 0 does not leak."""
    params = {"w": torch.tensor([0.0, 0.0, 0.5, 0.0, 0.2, 0.0])}
    mask = {"w": torch.tensor([False, True, True, True, True, True])}
    budget = Budget((Layer("w", (6,)),), "scaled-uniform", 1 - 4 / 6)
    kept = masks.prune_smallest(params, mask, budget)["w"]
    assert kept.tolist() == [False, True, True, True, True, False]


def test_prune_protects_frozen_weights():
    params = {"w": torch.tensor([[0.1, 5.0, 0.2, 4.0, 3.0, 2.0, 1.0, 6.0, 0.0, 0.0, 0.0, 0.0]]).view(3, 4)}
    mask, frozen = {"w": params["w"] != 0}, {"w": torch.zeros(3, 4, dtype=torch.bool)}
    frozen["w"][0, 0] = True
    kept = masks.prune_smallest(params, mask, one_layer(0.75), frozen)["w"]
    assert kept.sum() == 3
    assert kept[0, 0]
    assert kept.flatten().nonzero().flatten().tolist() == [0, 1, 7]


def test_prune_adds_nothing_to_a_mask_within_its_budget():
    params = {"w": torch.ones(3, 4)}
    mask = {"w": torch.eye(3, 4, dtype=torch.bool)}
    assert masks.prune_smallest(params, mask, one_layer(0.5))["w"] is mask["w"]


def test_grow_largest_fills_up_to_the_budget_among_inactive_positions():
    """FedDST document 10.2 (fix): picks flat positions 2, 4, 11."""
    mask = {"w": torch.tensor([1, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0], dtype=torch.bool).view(3, 4)}
    gradient = torch.tensor([[0.05, 0.6, -0.9, 0.1], [0.8, 0.02, 0.95, -0.3], [0.01, 0.5, -0.2, 0.7]])
    grown = masks.grow_largest(mask, {"w": gradient.abs()}, one_layer(0.5))["w"]
    assert grown.int().tolist() == [[1, 0, 1, 1], [1, 0, 1, 0], [0, 0, 0, 1]]


def test_drop_smallest_spares_frozen_and_stops_at_what_there_is():
    params = {"w": torch.tensor([0.9, -0.1, 0.0, 0.4])}
    mask = {"w": torch.tensor([True, True, False, True])}
    frozen = {"w": torch.tensor([False, True, False, False])}
    assert masks.drop_smallest(params, mask, frozen, {"w": 1})["w"].tolist() == [True, True, False, False]
    assert masks.drop_smallest(params, mask, frozen, {"w": 3})["w"].tolist() == [False, True, False, False]


def test_grow_random_is_uniform_without_replacement():
    mask = {"w": torch.zeros(40, dtype=torch.bool).index_fill(0, torch.arange(10), True)}
    hits = torch.zeros(40)
    for draw in range(600):
        grown = masks.grow_random(mask, {"w": 6}, rng.key(0, "grow", draw))["w"]
        assert grown.sum() == 16
        hits += grown
    assert hits[:10].eq(600).all()
    # each of the 30 free positions is hit with probability 1/5: 120 ± 6 standard deviations (9.8 each)
    assert (hits[10:] - 120).abs().max() < 59


def test_grow_random_takes_what_is_left():
    mask = {"w": torch.tensor([True, False, True])}
    assert masks.grow_random(mask, {"w": 5}, rng.key(1))["w"].all()


def test_global_budget_ranks_over_all_layers():
    budget = Budget((Layer("a", (2, 2)), Layer("b", (1, 4))), "global", 0.5)
    scores = {"a": torch.tensor([[9.0, 8.0], [7.0, 0.1]]), "b": torch.tensor([[0.2, 6.0, 0.3, 0.4]])}
    chosen = masks.by_budget(scores, budget)
    assert chosen["a"].flatten().tolist() == [True, True, True, False]
    assert chosen["b"].flatten().tolist() == [False, True, False, False]


def test_mask_arithmetic_under_vmap_equals_the_loop():
    torch.manual_seed(0)
    budget = one_layer(0.6, (12, 10))
    stacked = {"w": torch.randn(5, 12, 10)}
    kept = {"w": torch.rand(5, 12, 10) < 0.7}
    frozen = {"w": torch.zeros(12, 10, dtype=torch.bool)}
    score = {"w": torch.rand(5, 12, 10)}

    def client(params, mask, score):
        pruned = masks.prune_smallest(params, mask, budget.at(0.8), frozen)
        dropped = masks.drop_smallest(params, mask, frozen, {"w": 7})
        random = masks.grow_random(mask, {"w": 9}, rng.key(0, "a"))
        return pruned["w"], masks.grow_largest(pruned, score, budget)["w"], dropped["w"], random["w"]

    together = torch.func.vmap(client)(stacked, kept, score)
    for index in range(5):
        alone = client({"w": stacked["w"][index]}, {"w": kept["w"][index]}, {"w": score["w"][index]})
        for a, b in zip(alone, together, strict=True):
            assert torch.equal(a, b[index])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("other", [0, -0.0, -1.0, math.inf])
@pytest.mark.parametrize("size", [5, 50])  # few and many are chosen in two ways
def test_where_is_torchs(dtype, other, size):
    """To the sign of zero, whatever the values are and however they lie in memory."""
    torch.manual_seed(0)
    values = torch.randn(6, size, 4, 3).to(dtype)
    if dtype.is_floating_point:
        values[0, 0, 0] = torch.tensor([math.nan, -math.inf, -0.0])
    mask = torch.rand(values.shape) < 0.5
    mask[0, 0, 0] = torch.tensor([True, False, True])
    for flags in (mask, mask.contiguous(memory_format=torch.channels_last)):
        for own in (values, values.contiguous(memory_format=torch.channels_last)):
            expected, found = torch.where(flags, own, other), masks.where(flags, own, other)
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
            assert torch.equal(found.signbit(), expected.signbit())
    for dims in ((0, 0), (None, 0), (0, None)):
        of = [
            tensor if dim is not None else tensor[0] for tensor, dim in zip((mask, values), dims, strict=True)
        ]
        made = torch.func.vmap(lambda flags, own: masks.where(flags, own, other), in_dims=dims)(*of)
        torch.testing.assert_close(made, torch.where(*of, other), rtol=0, atol=0, equal_nan=True)


DIFFERENTIATIONS = {
    "backward": lambda f, x: torch.autograd.grad(f(x.requires_grad_()).sum(), x)[0],
    "backward of a stack": lambda f, x: torch.autograd.grad(
        torch.func.vmap(f)(rows := x[None].requires_grad_()).sum(), rows
    )[0][0],
    "grad": lambda f, x: torch.func.grad(lambda own: f(own).sum())(x),
    "grad of each": lambda f, x: torch.func.vmap(torch.func.grad(lambda own: f(own).sum()))(x[None])[0],
    "grad of a stack": lambda f, x: torch.func.grad(lambda rows: torch.func.vmap(f)(rows).sum())(x[None])[0],
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
    "jvp of each": lambda f, x: torch.func.vmap(
        lambda own: torch.func.jvp(f, (own,), (torch.ones_like(own),))[1]
    )(x[None])[0],
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")  # torch's own, of forward mode
@pytest.mark.parametrize("way", DIFFERENTIATIONS)
def test_where_hands_gradients_on(way):
    mask = torch.rand(3000) < 0.5
    made = DIFFERENTIATIONS[way](lambda own: masks.where(mask, own, 0.0), torch.randn(3000))
    assert torch.equal(made, mask.float())


def test_a_step_that_grows_can_be_recorded():
    mask, score = {"w": torch.rand(60, 50) < 0.2}, {"w": torch.rand(60, 50)}
    budget = one_layer(0.5, (60, 50))
    found = record(lambda given: masks.grow_largest(*given, budget), (mask, score))
    assert not found.refused
    other = {"w": torch.rand(60, 50)}
    assert torch.equal(found.again((mask, other))["w"], masks.grow_largest(mask, other, budget)["w"])
