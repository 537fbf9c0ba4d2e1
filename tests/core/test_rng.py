"""Keyed streams."""

import numpy as np
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
