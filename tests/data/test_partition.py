"""Partitions: nothing is given twice, shares match, and the published algorithms to the letter."""

from __future__ import annotations

import numpy as np
import pytest

from fedsparse.core.data import PARTITIONS, Partition
from fedsparse.core.data.partition import slice_by_class
from fedsparse.core.errors import ConfigError

CIFAR_TRAIN = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 5000))
CIFAR_TEST = np.random.default_rng(1).permutation(np.repeat(np.arange(10), 1000))
WITHOUT_FILES = [name for name in PARTITIONS if name not in ("by-user", "drawn")]  # drawn gives samples twice


def split(
    name: str,
    clients: int,
    train: np.ndarray = CIFAR_TRAIN,
    test: np.ndarray = CIFAR_TEST,
    seed: int = 0,
    **settings: object,
) -> Partition:
    rule = PARTITIONS[name](**settings)
    partition: Partition = rule.split(train, test, clients, np.random.default_rng(seed))
    return partition


def assert_well_formed(partition: Partition) -> None:
    for indices, offsets, sizes, of in (
        (partition.train_indices, partition.train_offsets, partition.train_sizes, partition.train_of),
        (partition.test_indices, partition.test_offsets, partition.test_sizes, partition.test_of),
    ):
        assert indices.dtype == offsets.dtype == np.int64
        assert offsets[0] == 0
        assert offsets[-1] == len(indices)
        assert len(offsets) == partition.clients + 1
        assert sizes.min() >= 1
        last = partition.clients - 1
        assert len(of(last)) == sizes[last]
        assert np.array_equal(of(last), indices[-sizes[last] :])


def assert_nothing_twice(indices: np.ndarray) -> None:
    assert len(np.unique(indices)) == len(indices)


SETTINGS = [
    ("iid", {}),
    ("dirichlet", {}),
    ("dirichlet", {"alpha": 0.1, "lost_first_share": True}),
    ("shards", {}),
    ("shards", {"samples_per_shard": 20}),
]


@pytest.mark.parametrize(("name", "settings"), SETTINGS)
def test_no_train_sample_is_given_twice(name: str, settings: dict[str, object]) -> None:
    partition = split(name, 100, **settings)
    assert_well_formed(partition)
    assert_nothing_twice(partition.train_indices)
    if name != "shards":  # shards overlap in their test sets by design
        assert_nothing_twice(partition.test_indices)


@pytest.mark.parametrize(("name", "settings"), SETTINGS)
def test_same_seed_same_partition(name: str, settings: dict[str, object]) -> None:
    one, same, other = (split(name, 50, seed=seed, **settings) for seed in (3, 3, 4))
    assert np.array_equal(one.train_indices, same.train_indices)
    assert np.array_equal(one.test_indices, same.test_indices)
    assert np.array_equal(one.train_offsets, same.train_offsets)
    assert not np.array_equal(one.train_indices, other.train_indices)


@pytest.mark.parametrize(("name", "settings"), SETTINGS)
def test_every_setting_is_described(name: str, settings: dict[str, object]) -> None:
    assert PARTITIONS[name].summary()
    assert all(field.description for field in PARTITIONS[name].model_fields.values())


def test_iid_gives_everything_in_equal_parts() -> None:
    partition = split("iid", 7)
    assert partition.clients == 7
    assert np.array_equal(np.sort(partition.train_indices), np.arange(50_000))
    assert np.array_equal(np.sort(partition.test_indices), np.arange(10_000))
    assert np.ptp(partition.train_sizes) <= 1
    assert np.ptp(partition.test_sizes) <= 1
    # 7,143 draws: a class share of 0.1 has a deviation of 0.0035; five of them
    shares = np.bincount(CIFAR_TRAIN[partition.train_of(0)], minlength=10) / partition.train_sizes[0]
    assert np.abs(shares - 0.1).max() < 0.018


def test_iid_wants_a_sample_for_each_client() -> None:
    with pytest.raises(ConfigError, match=r"federation.clients: 10,001 clients .* 10,000 test samples"):
        split("iid", 10_001)


TARGETS = np.array([0, 1, 0, 1, 1, 0, 0, 1, 0, 1, 1, 0])
PROPORTIONS = np.array([[0.25, 0.25, 0.5], [0.5, 0.34, 0.16]])


def test_dirichlet_slices_of_the_worked_example_with_the_lost_share() -> None:
    indices, sizes = slice_by_class(TARGETS, PROPORTIONS, lost_first_share=True)
    assert indices.tolist() == [2, 5, 7, 9, 6, 8, 11, 10]
    assert sizes.tolist() == [4, 4, 0]


def test_dirichlet_slices_of_the_worked_example_with_every_share() -> None:
    # class 0 is cut at 1 and 3 of 6, class 1 at 3 and 5 of 6
    indices, sizes = slice_by_class(TARGETS, PROPORTIONS, lost_first_share=False)
    assert indices.tolist() == [0, 1, 3, 4, 2, 5, 7, 9, 6, 8, 11, 10]
    assert sizes.tolist() == [4, 4, 4]


def test_lost_share_is_exactly_the_first_cut_of_every_class() -> None:
    proportions = np.random.default_rng(5).dirichlet(np.full(40, 0.1), size=10)
    indices, sizes = slice_by_class(CIFAR_TRAIN, proportions, lost_first_share=True)
    assert_nothing_twice(indices)
    assert sizes.sum() == len(indices) == sum(5000 - int(5000 * p) for p in proportions[:, 0])
    indices, sizes = slice_by_class(CIFAR_TRAIN, proportions, lost_first_share=False)
    assert_nothing_twice(indices)
    assert sizes.sum() == len(indices) == 50_000


@pytest.mark.parametrize("excess", [1 - 1e-9, 1 + 1e-9])
def test_proportions_that_do_not_sum_to_1_exactly_lose_and_invent_nothing(excess: float) -> None:
    targets = np.zeros(1000, dtype=np.int64)
    indices, sizes = slice_by_class(targets, np.full((1, 3), excess / 3), lost_first_share=False)
    assert indices.tolist() == list(range(1000))
    assert sizes.tolist() == [333, 333, 334]


def test_classes_without_samples_are_allowed() -> None:
    indices, sizes = slice_by_class(np.array([2, 2, 2]), np.full((4, 3), 1 / 3), lost_first_share=False)
    assert indices.tolist() == [0, 1, 2]
    assert sizes.tolist() == [1, 1, 1]


def test_dirichlet_shares_of_train_and_test_match() -> None:
    partition = split("dirichlet", 20, alpha=0.3)
    assert partition.clients == 20
    for k in range(20):
        train = np.bincount(CIFAR_TRAIN[partition.train_of(k)], minlength=10) / 5000
        test = np.bincount(CIFAR_TEST[partition.test_of(k)], minlength=10) / 1000
        assert np.abs(train - test).max() <= 1 / 5000 + 1 / 1000  # both ends are rounded down


def test_dirichlet_indices_of_a_client_are_permuted() -> None:
    partition = split("dirichlet", 5, alpha=100.0)
    labels = CIFAR_TRAIN[partition.train_of(0)]
    assert len(np.unique(labels[:100])) == 10  # not class after class


@pytest.mark.parametrize(
    ("clients", "least", "most", "train_used", "median"),
    # kept: smallest and largest of 20 published draws; the other two: their means
    [(100, 98, 100, 49_677, 356), (400, 385, 394, 49_857, 90)],
)
def test_dirichlet_with_the_lost_share_has_the_published_statistics(
    clients: int, least: int, most: int, train_used: int, median: int
) -> None:
    draws = [split("dirichlet", clients, seed=seed, alpha=0.1, lost_first_share=True) for seed in range(1, 6)]
    assert all(least <= draw.clients <= most for draw in draws)
    # what is lost is 10 first shares of 5000 p, where p has a deviation of about 3 / clients: 4 deviations
    # of the mean over 5 draws
    used = np.mean([len(draw.train_indices) for draw in draws])
    assert abs(used - train_used) < 4 * 5000 * (3 / clients) * (10 / 5) ** 0.5
    # the median of 100 clients varies by about a tenth between draws
    assert abs(np.mean([np.median(draw.train_sizes) for draw in draws]) / median - 1) < 0.25


def test_dirichlet_drops_clients_without_train_or_test_samples() -> None:
    partition = split("dirichlet", 2000, alpha=0.05)
    assert_well_formed(partition)
    assert partition.clients < 2000


def test_extreme_concentrations_work() -> None:
    for alpha in (1e-3, 1e6):
        partition = split("dirichlet", 5, alpha=alpha)
        assert_well_formed(partition)
        assert len(partition.train_indices) == 50_000 or partition.clients < 5


def test_no_usable_client_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"federation\.clients: no client has both"):
        split("shards", 2, np.array([0, 0]), np.array([1]), classes_per_client=1)


def test_shards_of_the_paper() -> None:
    partition = split("shards", 400, samples_per_shard=20)
    assert partition.clients == 400
    assert set(partition.train_sizes) == {40}
    for k in range(400):
        labels = np.unique(CIFAR_TRAIN[partition.train_of(k)])
        assert len(labels) <= 2  # 5,000 images a class are whole shards of 20
        own = np.sort(partition.test_of(k))
        assert np.array_equal(own, np.flatnonzero(np.isin(CIFAR_TEST, labels)))


def test_shards_that_straddle_two_classes_bring_both_test_sets() -> None:
    train, test = np.array([0, 0, 0, 1, 1, 1]), np.array([1, 0, 1])
    partition = split("shards", 1, train, test, classes_per_client=1, samples_per_shard=6)
    assert np.sort(partition.train_of(0)).tolist() == [0, 1, 2, 3, 4, 5]
    assert np.sort(partition.test_of(0)).tolist() == [0, 1, 2]


def test_shards_of_equal_size_use_every_train_sample() -> None:
    partition = split("shards", 30, classes_per_client=3)
    assert np.array_equal(np.sort(partition.train_indices), np.arange(50_000))
    assert np.ptp(partition.train_sizes) <= 3  # at most one sample a shard


def test_clients_whose_labels_are_not_tested_are_dropped() -> None:
    train, test = np.array([0, 0, 1, 1]), np.array([1, 1])
    partition = split("shards", 2, train, test, classes_per_client=1)
    assert partition.clients == 1
    assert train[partition.train_of(0)].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples_per_shard": 100}, "task.partition.samples_per_shard: .* need 800 shards, .* make 500"),
        ({"classes_per_client": 126}, "task.partition.classes_per_client: .* use at most 125"),
    ],
)
def test_too_many_shards_name_the_setting(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        split("shards", 400, **settings)


@pytest.mark.parametrize("name", WITHOUT_FILES)
def test_more_clients_than_samples_name_the_setting(name: str) -> None:
    with pytest.raises(ConfigError, match=r"federation.clients: 50,001 clients cannot share 50,000 train"):
        split(name, 50_001)


def test_overlapping_test_sets_that_would_fill_memory_are_refused() -> None:
    train, test = np.arange(1_000_000) % 2, np.arange(100_000) % 2
    with pytest.raises(ConfigError, match=r"federation.clients: the overlapping test sets .* indices"):
        split("shards", 10_000, train, test)


@pytest.mark.parametrize("name", WITHOUT_FILES)
def test_a_hundred_thousand_clients_are_only_their_indices(name: str) -> None:
    labels = np.arange(1_000_000) % 10
    partition = split(name, 100_000, labels, labels[: 200_000 if name != "shards" else 100])
    assert_well_formed(partition)
    assert partition.clients > 10_000
    assert_nothing_twice(partition.train_indices)
