"""Pools whose clients are drawn when asked for: the same each time, skewed as told, at no cost by client."""

import json
import tracemalloc

import numpy as np
import pytest
from click.testing import CliRunner

from fedsparse.cli.main import main
from fedsparse.core import task
from fedsparse.core.data import PARTITIONS
from fedsparse.core.errors import ConfigError

TRAIN = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 500))
TEST = np.random.default_rng(1).permutation(np.repeat(np.arange(10), 100))
MILLION = 1_000_000


def pool(clients=MILLION, train=TRAIN, test=TEST, seed=0, **settings):
    return PARTITIONS["drawn"](**settings).split(train, test, clients, np.random.default_rng(seed))


@pytest.mark.parametrize("alpha", [None, 0.3])
def test_a_client_follows_from_seed_and_number_alone(alpha):
    one, same, other = (pool(alpha=alpha, seed=seed) for seed in (3, 3, 4))
    last = MILLION - 1
    for of, again, changed in (
        (one.train_of, same.train_of, other.train_of),
        (one.test_of, same.test_of, other.test_of),
    ):
        mine = of(last)
        of(7)  # neither what was asked before nor the order matters
        assert np.array_equal(mine, of(last))
        assert np.array_equal(mine, again(last))
        assert not np.array_equal(mine, changed(last))
        assert not np.array_equal(mine, of(7))
    # a client stays who it is when the pool grows
    assert np.array_equal(one.train_of(7), pool(clients=10, alpha=alpha, seed=3).train_of(7))


@pytest.mark.parametrize("alpha", [None, 1e-3, 0.3, 1e6])
def test_sizes_are_as_told_and_no_client_owns_a_sample_twice(alpha):
    made = pool(samples=50, test_samples=20, alpha=alpha)
    assert (made.clients, made.pool_samples, made.train_range) == (MILLION, 50 * MILLION, (50, 50))
    for k in (0, 1, MILLION - 1):
        for indices, count, total in ((made.train_of(k), 50, 5000), (made.test_of(k), 20, 1000)):
            assert indices.dtype == np.int64
            assert len(np.unique(indices)) == len(indices) == count
            assert 0 <= indices.min() <= indices.max() < total


def test_a_client_may_own_everything():
    train, test = np.array([0, 0, 0, 1, 3]), np.array([1, 1])  # no sample of class 2
    for alpha in (None, 1e-3, 1.0):
        made = pool(50, train, test, samples=5, test_samples=2, alpha=alpha)
        for k in range(50):
            assert sorted(made.train_of(k)) == [0, 1, 2, 3, 4]
            assert sorted(made.test_of(k)) == [0, 1]


def shares(made, clients=200):
    rows = [np.bincount(TRAIN[made.train_of(k)], minlength=10) / made.samples for k in range(clients)]
    return np.array(rows)


def test_alpha_skews_labels_by_the_dirichlet_law():
    spread = {}
    for alpha in (None, 1e6, 1.0, 0.1):
        found = shares(pool(samples=50, alpha=alpha))
        assert np.abs(found.mean(axis=0) - 0.1).max() < 0.1  # every class alike over clients
        spread[alpha] = found.var(axis=0).mean()
    # p(1 - p) / n for n draws of a class of share p = 0.1; Dirichlet shares add p(1 - p) / (10 alpha + 1)
    assert spread[None] == pytest.approx(0.09 / 50, rel=0.15)
    assert spread[1e6] == pytest.approx(0.09 / 50, rel=0.15)
    assert spread[1.0] == pytest.approx(0.09 / 50 + 0.09 / 11 * 49 / 50, rel=0.15)
    assert spread[0.1] == pytest.approx(0.09 / 50 + 0.09 / 2 * 49 / 50, rel=0.15)


def test_a_client_is_tested_on_the_labels_that_it_trains_on():
    made = pool(samples=50, test_samples=50, alpha=0.1)
    overlap = []
    for k in range(100):
        train, test = (
            np.bincount(t, minlength=10) / 50 for t in (TRAIN[made.train_of(k)], TEST[made.test_of(k)])
        )
        overlap.append(np.minimum(train, test).sum())
    assert np.mean(overlap) > 0.85  # 0.25 if labels were independent


def test_batches_come_in_mixed_order():
    labels = TRAIN[pool(samples=200, alpha=1e6).train_of(0)]
    assert (np.diff(labels) < 0).sum() > 50  # sorted by class there would be none


@pytest.mark.parametrize("clients", [3, 1000, MILLION])
def test_client_accuracy_is_over_the_first_thousand_clients(clients):
    made = pool(clients, test_samples=4, alpha=0.3)
    tested = min(clients, 1000)
    indices, offsets = made.tested
    assert offsets.tolist() == list(range(0, 4 * tested + 1, 4))
    for k in (0, 1, tested - 1):
        assert np.array_equal(indices[offsets[k] : offsets[k + 1]], made.test_of(k))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"samples": 5001},
            r"task.partition.samples: 5,001 for each client.* has 5,000 train .*at most 5,000",
        ),
        ({"test_samples": 1001}, r"task.partition.test_samples: 1,001 .* has 1,000 test .*at most 1,000"),
    ],
)
def test_more_samples_than_data_name_the_setting(settings, message):
    with pytest.raises(ConfigError, match=message):
        pool(**settings)


@pytest.mark.parametrize(
    ("setting", "value"), [("samples", 0), ("test_samples", 0), ("alpha", 0.0), ("alpha", 1e7), ("sample", 3)]
)
def test_settings_out_of_range_name_the_setting(make_resolved, setting, value):
    with pytest.raises(ConfigError, match=rf"task\.partition\.{setting}\b"):
        make_resolved(**{"task__partition__use": "drawn", f"task__partition__{setting}": value})


def test_every_setting_is_described():
    assert PARTITIONS["drawn"].summary()
    assert all(field.description for field in PARTITIONS["drawn"].model_fields.values())


def drawn(clients, sampled=20, **changes):
    return {
        "task__partition__use": "drawn",
        "task__partition__samples": 12,
        "task__partition__alpha": 0.5,
        "federation__clients": clients,
        "federation__clients_per_round": sampled,
        "federation__rounds": 2,
        "output__evaluate_every": 1,
    } | changes


def peak(make_resolved, clients):
    """Bytes, at most at one time, that Python and NumPy take to build a task and sample a round."""
    config = make_resolved(**drawn(clients, sampled=1000)).config
    task.build(config)  # what is made once in a process (imports, caches) is not the pool's
    tracemalloc.start()
    try:
        built = task.build(config)
        chosen = built.clients(0)
        sizes = {len(built.partition.train_of(client)) for client in chosen}
        assert built.partition.pool_samples == 12 * clients
        taken = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sizes == {12}
    assert len(set(chosen)) == 1000
    assert 0 <= min(chosen) <= max(chosen) < clients
    return taken


def test_nothing_is_allocated_by_the_number_of_clients(make_resolved):
    small, large = peak(make_resolved, 10_000), peak(make_resolved, MILLION)
    assert large < 1_000_000  # one byte a client would be this, one index 8 MB
    # ids of 1,000 sampled clients take 0.1 MB either way; 10,000 clients more would be 8 bytes each
    assert abs(large - small) < 80_000


@pytest.mark.parametrize("plugin", ["pffdst", "feddst"])
def test_two_rounds_of_a_million_clients(make_engine, plugin):
    lines = []
    for _ in range(2):
        engine = make_engine(plugin, **drawn(MILLION))
        reports = list(engine.rounds(engine.start()))
        lines.append([{k: v for k, v in r.metrics.items() if k != "seconds"} for r in reports])
    assert lines[0] == lines[1]
    for line in lines[0]:
        assert len(set(line["clients"])) == 20
        assert line["samples"] == 20 * 12
        assert max(line["clients"]) > 100_000
        assert 0 <= line["client_accuracy"] <= 1


def test_what_the_rounds_leave_behind_is_by_clients_seen(make_engine):
    engine = make_engine("scaffold", **drawn(MILLION))  # keeps a row for each client
    *_, last = engine.rounds(engine.start())
    seen = len(engine.ledger.state()["clients"])
    assert 20 < seen <= 40
    assert len(last.state.rows) == seen


def test_client_accuracy_of_a_run(make_engine):
    import torch
    from torch.func import functional_call

    engine = make_engine("fedavg", **drawn(MILLION, task__dataset__noise=1.0))
    *_, last = engine.rounds(engine.start())
    data, made, state = engine.task.dataset, engine.task.partition, last.state
    engine.task.model.eval()
    weights = engine.loss.weights(state.params, state.mask)
    with torch.no_grad():
        outputs = functional_call(
            engine.task.model, {**weights, **state.buffers}, (data.normalise(data.test_inputs),)
        )
    hits = (outputs.argmax(1) == data.test_targets).double()
    each = [float(hits[made.test_of(k)].mean()) for k in range(1000)]
    assert last.metrics["client_accuracy"] == pytest.approx(sum(each) / 1000)


def test_the_command_line_runs_a_million_clients(tmp_path):
    sets = [
        "task.dataset=synthetic",
        "task.dataset.train=200",
        "task.dataset.test=60",
        "task.model=mlp",
        "task.partition.use=drawn",
        "task.partition.samples=40",
        "federation.clients=1000000",
        "federation.clients_per_round=5",
        "federation.rounds=1",
    ]
    options = [option for text in sets for option in ("--set", text)]
    result = CliRunner().invoke(main, ["run", "--plugin", "fedavg", *options, "--out", str(tmp_path / "r")])
    assert result.exit_code == 0, result.output
    assert "1000000 clients with 40 to 40 samples (drawn), 5 a round" in result.output
    (line,) = (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["samples"] == 200

    more = ["--set", "task.partition.samples=201", "--out", str(tmp_path / "s")]
    result = CliRunner().invoke(main, ["run", "--plugin", "fedavg", *options, *more])
    assert result.exit_code == 2
    assert "task.partition.samples" in result.output
    assert "use at most 200" in " ".join(result.output.split())
