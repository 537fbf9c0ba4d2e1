"""Keyed streams."""

import numpy as np
import pytest
import torch

from fedsparse.core import rng


def splitmix(value):
    """SplitMix64 in Python integers, as published."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
    return value ^ (value >> 31)


def test_bits_are_splitmix64_of_key_and_position():
    key = rng.key(3, "grow", 7)
    unsigned = int(key) % 2**64
    expected = [splitmix((unsigned + i * 0x9E3779B97F4A7C15) % 2**64) >> 1 for i in range(1, 13)]
    assert rng.bits(key, (3, 4)).flatten().tolist() == expected


def test_streams_differ_by_every_part_of_the_path():
    paths = [(0, "a", 1), (1, "a", 1), (0, "b", 1), (0, "a", 2), (0, "a1"), (0, "a", "1")]
    assert len({int(rng.key(*path)) for path in paths}) == len(paths)
    assert int(rng.fold(rng.key(0), "w")) != int(rng.fold(rng.key(0), "v"))


def test_uniform_mean_and_range():
    draws = rng.uniform(rng.key(0), (100_000,))
    assert draws.min() >= 0
    assert draws.max() < 1
    assert abs(draws.mean() - 0.5) < 5 * (1 / 12 / 100_000) ** 0.5  # five standard errors


def test_loop_and_vmap_draw_the_same_bits():
    keys = torch.stack([rng.key(0, client) for client in range(4)])
    together = torch.func.vmap(lambda key: rng.bits(rng.fold(key, "w"), (5, 3)))(keys)
    for index, key in enumerate(keys):
        assert torch.equal(together[index], rng.bits(rng.fold(key, "w"), (5, 3)))


def test_host_generators_repeat():
    first, again = rng.generator(0, "clients", 4), rng.generator(0, "clients", 4)
    assert np.array_equal(first.permutation(100), again.permutation(100))


@pytest.mark.parametrize("share", [0.0, 0.25, 1 / 3, 0.5, 0.999999999])
def test_above_is_the_comparison_of_uniform_draws(share):
    """The product of a batch's bits and the comparison, without the draws as floating-point numbers."""
    stream, shape = rng.key(3, "dropout"), (7, 500)
    assert torch.equal(rng.above(stream, shape, share), rng.uniform(stream, shape).double() >= share)


def test_host_memory_and_stacked_streams_draw_the_same_bits():
    """The former by numpy, in unsigned numbers; the latter by torch, in signed ones that wrap."""
    streams = torch.stack([rng.key(seed, "draw") for seed in range(50)])
    stacked = torch.func.vmap(lambda stream: rng.bits(stream, (40, 3)))(streams)
    assert torch.equal(stacked, torch.stack([rng.bits(stream, (40, 3)) for stream in streams]))
    at = rng.bits_at(streams[:, None], torch.arange(120))
    assert torch.equal(at, stacked.view(50, 120))
