"""LDA to the letter, FedSparsify's disjoint classes, and clients that are users of a file of ids."""

import numpy as np
import pytest
import torch

from fedsparse.core import task
from fedsparse.core.data import PARTITIONS
from fedsparse.core.data.partitions_by_class import draw_by_proportions, renormalised
from fedsparse.core.errors import ConfigError
from fedsparse.core.resolve import resolve

CIFAR_TRAIN = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 5000))
CIFAR_TEST = np.random.default_rng(1).permutation(np.repeat(np.arange(10), 1000))


def split(name, clients, train=CIFAR_TRAIN, test=CIFAR_TEST, seed=0, **settings):
    return PARTITIONS[name](**settings).split(train, test, clients, np.random.default_rng(seed))


@pytest.fixture
def files(tmp_path):
    """Ids of 12 train and 8 test samples; user 9 has test samples only, users 2 and 30 none."""
    np.save(tmp_path / "train.npy", np.array([5, 2, 5, 7, 30, 7, 2, 2, 30, 5, 7, 7], dtype=np.int32))
    (tmp_path / "test.txt").write_text("7\n5\n9\n7\n\n5\n9\n7\n9\n")
    return {"train_ids": tmp_path / "train.npy", "test_ids": tmp_path / "test.txt"}


TRAIN, TEST = np.arange(12) % 3, np.arange(8) % 3


def settings_of(name, files):
    return files if name == "by-user" else {}


@pytest.mark.parametrize("name", ["lda", "class-disjoint", "by-user"])
def test_the_same_seed_gives_the_same_partition(name, files):
    train, test, clients = (TRAIN, TEST, 3) if name == "by-user" else (CIFAR_TRAIN, CIFAR_TEST, 50)
    one, same, other = (
        split(name, clients, train, test, seed, **settings_of(name, files)) for seed in (3, 3, 4)
    )
    for field in ("train_indices", "train_offsets", "test_indices", "test_offsets"):
        assert np.array_equal(getattr(one, field), getattr(same, field))
        assert getattr(one, field).dtype == np.int64
    assert not np.array_equal(one.train_indices, other.train_indices)


@pytest.mark.parametrize("name", ["lda", "class-disjoint", "by-user"])
def test_every_setting_is_described(name):
    assert PARTITIONS[name].summary()
    assert all(field.description for field in PARTITIONS[name].model_fields.values())


def test_sparsyfed_example_10_11_renormalisation():
    left = np.array([True, True, True])
    p = renormalised(np.array([0.7, 0.2, 0.1]), left)
    assert p == pytest.approx([0.69998900, 0.20000400, 0.10000700], abs=5e-9)  # eight published digits
    p = renormalised(p, np.array([False, True, True]))
    assert p == pytest.approx([0, 0.66664445, 0.33335555], abs=5e-9)
    assert p[0] == 0


def one_by_one(targets, proportions, sizes, rng):
    """Section 7.5 of the SparsyFed document as it is written: a loop over draws, stacks that are popped."""
    uniform = iter(rng.random(len(targets)))
    shuffled = rng.permutation(len(targets))
    classes = proportions.shape[1]
    stacks = [[int(i) for i in shuffled if targets[i] == c][::-1] for c in range(classes)]
    dealt = []
    for q, size in zip(proportions, sizes, strict=True):
        p = renormalised(q, np.array([bool(stack) for stack in stacks]))
        for _ in range(size):
            u, c = next(uniform), 0
            while u >= p[: c + 1].sum() and any(stacks[c + 1 :]):
                c += 1
            dealt.append(stacks[c].pop())
            if not stacks[c]:
                p = renormalised(p, np.array([bool(stack) for stack in stacks]))
    return dealt


@pytest.mark.parametrize("alpha", [0.1, 1.0, 1000.0])
@pytest.mark.parametrize("at_once", [7, 2**14])
def test_sparsyfed_7_5_drawing_many_at_once_equals_one_by_one(monkeypatch, alpha, at_once):
    monkeypatch.setattr("fedsparse.core.data.partitions_by_class._AT_ONCE", at_once)
    draw = np.random.default_rng(1)
    targets = draw.permutation(np.repeat(np.arange(5), [40, 3, 60, 1, 96]))
    proportions, sizes = draw.dirichlet(np.full(5, alpha), size=10), np.full(10, 20)
    many = draw_by_proportions(targets, proportions, sizes, np.random.default_rng(2))
    assert sorted(many) == list(range(200))
    assert many.tolist() == one_by_one(targets, proportions, sizes, np.random.default_rng(2))


def shares(targets, partition, part):
    of = partition.train_of if part == "train" else partition.test_of
    rows = [np.bincount(targets[of(k)], minlength=10) / len(of(k)) for k in range(partition.clients)]
    return np.array(rows)


def test_sparsyfed_7_5_equal_sizes_and_the_same_proportions_in_train_and_test():
    """500 and 100 samples a client on CIFAR-10; every sample is given once."""
    partition = split("lda", 100)
    assert set(partition.train_sizes) == {500}
    assert set(partition.test_sizes) == {100}
    assert np.array_equal(np.sort(partition.train_indices), np.arange(50_000))
    assert np.array_equal(np.sort(partition.test_indices), np.arange(10_000))
    train, test = shares(CIFAR_TRAIN, partition, "train"), shares(CIFAR_TEST, partition, "test")
    # 100 draws of one class deviate by at most 0.05: five of them, while no class has run out
    assert np.abs(train - test)[:30].max() < 0.25


def test_sparsyfed_7_5_concentration():
    """Large: nearly iid; small: few classes a client, and the last clients get what is left."""
    iid, skewed = split("lda", 100, alpha=1000.0), split("lda", 100, alpha=0.1)
    # 500 draws of a class share of 0.1 deviate by 0.013, its Dirichlet by 0.003: six of both
    assert np.abs(shares(CIFAR_TRAIN, iid, "train")[:80] - 0.1).max() < 0.1
    assert np.median(shares(CIFAR_TRAIN, skewed, "train")[:50].max(axis=1)) > 0.5


def test_lda_sizes_differ_by_one_and_classes_may_be_missing():
    train, test = np.repeat([0, 2, 5], [40, 33, 30]), np.repeat([2, 5], [3, 8])
    partition = split("lda", 9, train, test)
    assert set(partition.train_sizes) == {11, 12}
    assert set(partition.test_sizes) == {1, 2}
    assert np.array_equal(np.sort(partition.train_indices), np.arange(103))
    assert np.array_equal(np.sort(partition.test_indices), np.arange(11))


@pytest.mark.parametrize("part", ["train", "test"])
def test_lda_wants_a_sample_for_each_client(part):
    sizes = {"train": 30, "test": 30} | {part: 5}
    with pytest.raises(ConfigError, match=f"federation.clients: 6 clients cannot share 5 {part} samples"):
        split("lda", 6, np.zeros(sizes["train"], np.int64), np.zeros(sizes["test"], np.int64))


def classes_of(partition, targets=CIFAR_TRAIN):
    return [tuple(np.unique(targets[partition.train_of(k)]).tolist()) for k in range(partition.clients)]


@pytest.mark.parametrize(("clients", "size"), [(10, 6000), (100, 600)])
def test_fedsparsify_7_3_two_classes_of_fashion_mnist(clients, size):
    train, test = np.repeat(np.arange(10), 6000), np.repeat(np.arange(10), 1000)
    partition = split("class-disjoint", clients, train, test)
    assert set(partition.train_sizes) == {size}
    owners = classes_of(partition, train)
    pairs = [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
    assert owners == [pair for pair in pairs for _ in range(clients // 5)]


@pytest.mark.parametrize(("clients", "size"), [(10, 5000), (100, 500)])
def test_fedsparsify_7_3_five_classes_of_cifar_10(clients, size):
    partition = split("class-disjoint", clients, classes_per_client=5)
    assert set(partition.train_sizes) == {size}
    owners = classes_of(partition)
    assert owners == [(0, 1, 2, 3, 4)] * (clients // 2) + [(5, 6, 7, 8, 9)] * (clients // 2)
    assert np.array_equal(np.sort(partition.train_indices), np.arange(50_000))


def test_fedsparsify_7_3_fifty_classes_of_cifar_100():
    train, test = np.repeat(np.arange(100), 500), np.repeat(np.arange(100), 100)
    owners = classes_of(split("class-disjoint", 100, train, test, classes_per_client=50), train)
    assert owners == [tuple(range(50))] * 50 + [tuple(range(50, 100))] * 50


def scanned(labels, clients, count):
    """The published scan, chunk by chunk."""
    size = len(labels) // (clients * count)
    chunks = [set(labels[i * size : (i + 1) * size]) for i in range(clients * count)]
    remaining, found = list(range(len(chunks))), []
    for _ in range(clients):
        mine = []
        for chunk in list(remaining):
            if len(mine) < count and not any(chunks[chunk] & chunks[other] for other in mine):
                mine.append(chunk)
                remaining.remove(chunk)
        found.append(mine)
    return found if all(len(mine) == count for mine in found) else None


def test_fedsparsify_7_3_the_scan_over_runs_equals_the_scan_over_chunks():
    """Chunks that straddle classes included, and the failures."""
    draw, worked = np.random.default_rng(0), 0
    for _ in range(300):
        labels = np.sort(draw.integers(0, draw.integers(2, 7), size=60))
        clients, count = int(draw.integers(1, 7)), int(draw.integers(1, 4))
        expected = scanned(labels, clients, count)
        rule = PARTITIONS["class-disjoint"](classes_per_client=count)
        size = 60 // (clients * count)
        rows = labels[: clients * count * size].reshape(clients * count, size)
        if expected is None:
            with pytest.raises(ConfigError, match="chunks that share no class"):
                rule._choose(rows, clients)
        else:
            worked += 1
            assert rule._choose(rows, clients).tolist() == expected
    assert 50 < worked < 250


def test_class_disjoint_tests_clients_evenly_on_their_own_classes():
    partition = split("class-disjoint", 20, classes_per_client=2)
    assert np.array_equal(np.sort(partition.test_indices), np.arange(10_000))
    assert set(partition.test_sizes) == {500}
    for k, classes in enumerate(classes_of(partition)):
        assert set(CIFAR_TEST[partition.test_of(k)]) == set(classes)


def test_class_disjoint_leaves_out_the_remainder_and_clients_without_test_samples():
    train = np.repeat([0, 1], 50)
    partition = split("class-disjoint", 3, train, train, classes_per_client=1)
    assert np.array_equal(np.sort(partition.train_indices), np.arange(99))
    train = np.repeat([0, 1], 48)
    partition = split("class-disjoint", 6, train, np.array([0] * 7 + [1]), classes_per_client=1)
    assert partition.clients == 4  # of three clients with class 1 one gets its test sample
    assert classes_of(partition, train) == [(0,)] * 3 + [(1,)]


@pytest.mark.parametrize(
    ("clients", "count", "message"),
    [
        (
            3,
            3,
            "client 0 of 3 finds only 2 of 3 chunks that share no class; classes should be a whole",
        ),
        (20, 6, "20 clients with 6 chunks each need 120 chunks, but there are 100 .* use at most 5"),
    ],
)
def test_class_disjoint_names_the_setting(clients, count, message):
    train = np.repeat([0, 1], 50)
    with pytest.raises(ConfigError, match=f"task.partition.classes_per_client: {message}"):
        split("class-disjoint", clients, train, train, classes_per_client=count)


def owned(partition, part):
    of = partition.train_of if part == "train" else partition.test_of
    return [sorted(of(k).tolist()) for k in range(partition.clients)]


def test_by_user_a_client_is_an_id(files):
    """Users 5 and 7 keep their own test samples; 2 and 30 get a quarter of the test set each."""
    partition = split("by-user", 4, TRAIN, TEST, **files)
    assert owned(partition, "train") == [[1, 6, 7], [0, 2, 9], [3, 5, 10, 11], [4, 8]]
    tests = owned(partition, "test")
    assert tests[1] == [1, 4]
    assert tests[2] == [0, 3, 6]
    assert len(tests[0]) == len(tests[3]) == 2
    assert not set(tests[0]) & set(tests[3])


def test_by_user_without_test_ids_shares_the_test_set_evenly(files):
    partition = split("by-user", 3, TRAIN, TEST, train_ids=files["train_ids"])
    assert sorted(partition.test_indices.tolist()) == list(range(8))
    assert sorted(partition.test_sizes.tolist()) == [2, 3, 3]


def test_by_user_draws_among_more_users_than_clients(files):
    users = [
        {tuple(train) for train in owned(split("by-user", 2, TRAIN, TEST, seed, **files), "train")}
        for seed in range(20)
    ]
    assert all(len(pair) == 2 for pair in users)
    assert len(set.union(*users)) == 4


def test_by_user_with_ids_that_are_all_new_in_the_test_set(tmp_path):
    """As in MNIST, whose test writers are others: everybody gets an equal share."""
    draw = np.random.default_rng(0)
    np.save(tmp_path / "train.npy", draw.integers(0, 539, 6000))
    np.save(tmp_path / "test.npy", draw.integers(1000, 1297, 1000))
    users = len(np.unique(np.load(tmp_path / "train.npy")))
    targets = np.zeros(6000, np.int64), np.zeros(1000, np.int64)
    ids = {"train_ids": tmp_path / "train.npy", "test_ids": tmp_path / "test.npy"}
    partition = split("by-user", users, *targets, **ids)
    assert partition.clients == users
    assert np.array_equal(np.sort(partition.train_indices), np.arange(6000))
    assert np.array_equal(np.sort(partition.test_indices), np.arange(1000))
    assert np.ptp(partition.test_sizes) <= 1


def test_by_user_wants_as_many_users_as_clients(files):
    with pytest.raises(
        ConfigError, match=r"federation.clients: 5 clients, but .* names 4 users; use at most"
    ):
        split("by-user", 5, TRAIN, TEST, **files)
    with pytest.raises(ConfigError, match="13 clients cannot share 12 train samples"):
        split("by-user", 13, TRAIN, TEST, **files)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.npy", None, "No such file or directory"),
        ("none.txt", None, "No such file or directory"),
        ("short.npy", np.arange(5), "holds 5 ids, but the data set has 12 train samples"),
        ("short.txt", "1\n2\n", "holds 2 ids, but the data set has 12 train samples"),
        ("empty.txt", "", "holds 0 ids"),
        ("empty.npy", b"", "cannot read .*empty.npy"),
        ("float.npy", np.zeros(12), r"holds float64 of shape \(12,\); expected one integer for each sample"),
        ("table.npy", np.zeros((12, 2), int), r"holds int64 of shape \(12, 2\)"),
        ("objects.npy", np.array([{}] * 12), "cannot read .*allow_pickle=False"),
        ("word.txt", "1\ntwo\n", "cannot read .*'two'"),
        ("binary.txt", b"\xff\xfe\x00", "cannot read .*decode"),
        ("huge.txt", "99999999999999999999\n" * 12, "holds .*; expected one integer"),
    ],
)
def test_by_user_files_that_do_not_serve_are_one_line_at_the_setting(tmp_path, name, content, message):
    path = tmp_path / name
    if isinstance(content, np.ndarray):
        np.save(path, content, allow_pickle=True)
    elif content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=f"^task.partition.train_ids: .*{message}") as caught:
        split("by-user", 2, TRAIN, TEST, train_ids=path)
    assert "\n" not in str(caught.value)


def test_by_user_names_the_test_file(files, tmp_path):
    (tmp_path / "bad.txt").write_text("1\n")
    with pytest.raises(ConfigError, match=r"task.partition.test_ids: .* holds 1 ids.* 8 test samples"):
        split("by-user", 2, TRAIN, TEST, train_ids=files["train_ids"], test_ids=tmp_path / "bad.txt")


def test_by_user_needs_its_file_and_is_written_into_the_configuration(tmp_path):
    sets = ["task.partition=by-user", "task.dataset=synthetic", "task.dataset.train=60"]
    sets += ["task.dataset.test=20", "federation.clients=4", "federation.clients_per_round=2"]
    with pytest.raises(ConfigError, match=r"task.partition.train_ids: missing"):
        resolve(sets=sets)
    path = tmp_path / "ids.txt"
    path.write_text("\n".join(str(i % 4) for i in range(60)))
    made = resolve(sets=[*sets, f'task.partition.train_ids="{path}"'])
    assert f'train_ids = "{path}"' in made.toml()
    built = task.build(made.config)
    assert built.partition.clients == 4
    indices = torch.from_numpy(built.partition.train_of(1))
    assert set((indices % 4).tolist()) == {1}
