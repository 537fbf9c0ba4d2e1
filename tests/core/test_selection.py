"""The k-th largest value on the host equals torch's, whatever the values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fedsparse.core import masks
from fedsparse.core.selection import kth_largest, readable, select


def drawn(kind: str, size: int = 5000) -> torch.Tensor:
    torch.manual_seed(3)
    values = torch.randn(size)
    return {
        "normal": values,
        "magnitudes": values.abs(),
        "many zeros": values.relu(),
        "few values": (values * 2).round(),
        "one value": torch.full((size,), -0.25),
        "signed zeros": torch.where(values > 0, 0.0, -0.0),
        "infinite": torch.where(values > 1, math.inf, torch.where(values < -1, -math.inf, values)),
        "tiny": values * 1e-42,  # denormal
        "double": values.double(),
        "integers": (values * 1e6).long(),
        "bfloat16": values.bfloat16(),
    }[kind]


KINDS = [
    *("normal", "magnitudes", "many zeros", "few values", "one value", "signed zeros", "infinite", "tiny"),
    *("double", "integers", "bfloat16"),
]


@pytest.mark.parametrize("size", [5000, 50_000])  # few and many are ranked in two ways
@pytest.mark.parametrize("kind", KINDS)
def test_equals_sorting(kind: str, size: int) -> None:
    values = drawn(kind, size)
    ordered = values.sort(descending=True).values
    for k in (1, 2, 17, size // 2 - 1, size // 2, size // 2 + 1, size - 1, size):
        found = kth_largest(values, k)
        assert found.dtype == values.dtype
        assert found == ordered[k - 1]
        assert kth_largest(values, torch.tensor(k)) == found


def test_nan_is_the_largest() -> None:
    infinite = torch.tensor(math.inf)
    for nan in (torch.tensor(math.nan), infinite - infinite):  # the second with its sign bit set, on x86
        few = torch.stack([torch.tensor(1.0), nan, infinite, torch.tensor(-2.0)])
        for values in (few, torch.cat([few, torch.zeros(50_000)])):
            assert math.isnan(kth_largest(values, 1))
            assert kth_largest(values, 2) == math.inf


def test_scores_may_require_a_gradient() -> None:
    scores = torch.arange(4.0, requires_grad=True) * 2
    assert masks.largest(scores, 2).tolist() == [False, False, True, True]


@pytest.mark.parametrize("kind", KINDS)
def test_the_mask_of_the_largest_is_that_under_vmap(kind: str) -> None:
    """Ties go by flat index, on the host as in transforms."""
    values = drawn(kind).view(50, 100)
    for count in (0, 1, 2500, 4999, 5000):
        stacked = torch.func.vmap(lambda score, count=count: masks.largest(score, count))(values[None])[0]
        found = masks.largest(values, count)
        assert torch.equal(found, stacked)
        assert int(found.sum()) == count


def test_values_under_a_transform_are_not_readable() -> None:
    seen = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(readable(x))
        return x.sum()

    x = torch.ones(2, 3)
    torch.func.vmap(look)(x)
    torch.func.grad(look)(x)
    look(x)
    assert seen == [False, False, True]


@pytest.mark.parametrize("size", [5000, 50_000])
@pytest.mark.parametrize("own", [True, False], ids=["own k", "one k"])
def test_stacked_clients_are_ranked_each_by_itself(size: int, own: bool) -> None:
    """Under vmap, and under grad within it, as local steps of stacked clients call it."""
    clients = torch.stack([drawn("normal", size), drawn("many zeros", size), drawn("few values", size)])
    counts = torch.tensor([1, size // 3, size]) if own else torch.full((3,), 17)
    ordered = clients.sort(dim=1, descending=True).values
    expected = ordered.gather(1, (counts - 1)[:, None])[:, 0]

    def scaled(values: torch.Tensor, k: torch.Tensor | int) -> torch.Tensor:
        return (values * kth_largest(values, k)).sum()

    if own:
        found = torch.func.vmap(kth_largest)(clients, counts)
        slopes = torch.func.vmap(torch.func.grad(scaled))(clients, counts)
    else:
        found = torch.func.vmap(lambda values: kth_largest(values, 17))(clients)
        slopes = torch.func.vmap(torch.func.grad(lambda values: scaled(values, 17)))(clients)
    assert torch.equal(found, expected)
    assert torch.equal(slopes, expected[:, None].expand_as(clients))  # the rank itself has no gradient


def test_ranks_may_be_stacked_alone() -> None:
    values, ranks = drawn("normal"), torch.tensor([1, 7, 5000])
    found = torch.func.vmap(lambda k: kth_largest(values, k))(ranks)
    assert torch.equal(found, values.sort(descending=True).values[ranks - 1])


@pytest.mark.parametrize("kind", KINDS)
def test_what_keep_largest_keeps_is_the_mask_of_the_largest(kind: str) -> None:
    """Of one client and of stacked ones, with ties at the bound and without, however they lie in memory."""
    values = drawn(kind, 4096).view(4, 16, 8, 8)
    for own in (values, values.to(memory_format=torch.channels_last), values.transpose(0, 1)):
        for count in (0, 1, 17, 2048, 3000, 4095, 4096):
            expected = torch.where(masks.largest(own.abs(), count), own, 0.0)
            kept = masks.keep_largest(own, count)
            assert kept.dtype == own.dtype
            assert torch.equal(kept.nan_to_num(), expected.nan_to_num())
    for count, clients in ((1, 4), (17, 1), (500, 4), (1023, 4)):
        stack = values[:clients]
        stacked = torch.func.vmap(lambda own, count=count: masks.keep_largest(own, count))(stack)
        each = [masks.keep_largest(own, count) for own in stack]
        assert torch.equal(stacked.nan_to_num(), torch.stack(each).nan_to_num())


def test_keep_largest_of_some_clients_with_ties_and_some_without() -> None:
    torch.manual_seed(0)
    values = torch.stack([torch.randn(100), torch.full((100,), -2.0), torch.zeros(100), torch.randn(100)])
    kept = torch.func.vmap(lambda own: masks.keep_largest(own, 20))(values)
    assert kept.count_nonzero(1).tolist() == [20, 20, 0, 20]
    assert kept[1].nonzero().flatten().tolist() == list(range(20))  # the lower index wins


def test_keep_largest_hands_nan_on() -> None:
    for count in (1, 2, 3):
        assert masks.keep_largest(torch.tensor([1.0, math.nan, 2.0, -3.0]), count).isnan().any()


@pytest.mark.parametrize("kind", ["normal", "magnitudes", "many zeros", "few values", "one value", "double"])
def test_select_puts_the_ranked_entry_in_its_place(kind: str) -> None:
    rows = drawn(kind, 6000).abs().view(3, 2000).numpy()
    for place in (0, 1, 999, 1500, 1999):
        selected = rows.copy()
        select(selected, place)
        assert (selected[:, place] == np.sort(rows, axis=1)[:, place]).all()
        assert (selected[:, : place + 1].max(axis=1) == selected[:, place]).all()
        assert (np.sort(selected, axis=1) == np.sort(rows, axis=1)).all()
