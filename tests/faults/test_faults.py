"""Clients that are lost: who, at what price, and what the others' round becomes."""

import json
import math
import re

import pytest
import torch
from click.testing import CliRunner

from fedsparse.cli.main import main
from fedsparse.core import checkpoint
from fedsparse.core.config import FaultsConfig
from fedsparse.core.contracts import ContractError
from fedsparse.core.errors import ConfigError, RunError
from fedsparse.core.execution.workers import join, launch, leave
from fedsparse.core.registry import Registry
from fedsparse.core.runner import run

NAMES = Registry().names()
EVERYTHING = {
    "faults__dropout": 0.3,
    "faults__upload_failure": 0.2,
    "faults__deadline": 1.2,
    "faults__speed_spread": 0.5,
}
SEED = 4  # of a first round with every reason, and with survivors
UNEVEN = {"task__partition__use": "dirichlet", "federation__clients": 12, "federation__clients_per_round": 6}


def play(engine):
    return list(engine.rounds(engine.start()))


def poison(engine, *clients):
    """These clients' inputs are NaN, and so is all that they compute."""
    return louder(engine, math.nan, *clients)


def louder(engine, factor, *clients):
    """These clients' inputs are multiplied."""
    samples, sizes = engine.task.samples, engine.task.partition.train_of

    def poisoned(numbers, round_, epoch):
        batch, begin = samples(numbers, round_, epoch), 0
        for number in numbers:
            end = begin + len(sizes(number))
            if number in clients:
                batch.inputs[begin:end] *= factor
            begin = end
        return batch

    object.__setattr__(engine.task, "samples", poisoned)
    return engine


def assert_same(one, other, atol=1e-6):
    for name, value in one.state.params.items():
        torch.testing.assert_close(other.state.params[name], value, atol=atol, rtol=1e-5)
    assert all(torch.equal(other.state.mask[name], mask) for name, mask in one.state.mask.items())
    for name in ("clients", "lost", "samples", "upload_bytes_total", "download_bytes_total", "flops_total"):
        assert other.metrics.get(name) == one.metrics.get(name), name
    assert other.metrics["train_loss"] == pytest.approx(one.metrics["train_loss"], rel=1e-5, nan_ok=True)


def test_methods_of_one_seed_lose_the_same_clients(make_engine):
    lost = [
        [report.metrics.get("lost") for report in play(make_engine(plugin, **UNEVEN, **EVERYTHING))]
        for plugin in ("fedavg", "feddst", "topk")
    ]
    assert lost[0] == lost[1] == lost[2]
    assert {reason for line in lost[0] for reason in line or ()} == {"dropout", "late", "upload_failure"}
    other = [r.metrics.get("lost") for r in play(make_engine("fedavg", seed=1, **UNEVEN, **EVERYTHING))]
    assert other != lost[0]


def test_one_fault_does_not_move_the_draws_of_another(make_engine):
    """Who drops out with uploads failing as well is who drops out without."""

    def dropped(**faults):
        reports = play(make_engine(federation__rounds=12, **UNEVEN, faults__dropout=0.3, **faults))
        return [report.metrics.get("lost", {}).get("dropout") for report in reports]

    assert dropped() == dropped(faults__upload_failure=0.5, faults__deadline=1.0)


def test_rates_are_those_that_were_set(make_engine):
    faults = make_engine(faults__dropout=0.25, faults__upload_failure=0.5, faults__non_finite="drop").faults
    fates = [faults.fate(round_, client) for round_ in range(100) for client in range(50)]
    assert fates.count("dropout") / 5000 == pytest.approx(0.25, abs=0.02)
    assert fates.count("upload_failure") / 5000 == pytest.approx(0.75 * 0.5, abs=0.02)


def test_a_clients_time_is_its_samples_over_its_speed(make_engine):
    engine = make_engine(faults__deadline=1.2, **UNEVEN)
    sizes = {c: len(engine.task.partition.train_of(c)) for c in range(engine.task.partition.clients)}
    mean = sum(sizes.values()) / len(sizes)
    for client, size in sizes.items():
        assert engine.faults.time(client) == pytest.approx(size / mean)
        assert (engine.faults.fate(3, client) == "late") == (size > 1.2 * mean)
    many = {"federation__clients": 200, "task__dataset__train": 800, "task__dataset__test": 200}
    spread = make_engine(faults__deadline=1.2, faults__speed_spread=0.5, **many).faults
    logs = torch.tensor([math.log(spread.time(client)) for client in range(200)])
    assert float(logs.mean()) == pytest.approx(0, abs=0.15)
    assert float(logs.std()) == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("encode", [False, True])
def test_every_loss_is_charged_what_it_cost(make_engine, encode):
    """By hand, against the charges of a run that loses nobody: same clients, a mask that stays."""
    changes = UNEVEN | {"federation__rounds": 1, "ledger__encode": encode, "seed": SEED}
    (whole,) = play(make_engine("fedavg", **changes))
    clients = whole.metrics["clients"]
    up, down = (whole.metrics[f"{way}_bytes"] // len(clients) for way in ("upload", "download"))
    engine = make_engine("fedavg", **changes, **EVERYTHING)
    sizes = {client: len(engine.task.partition.train_of(client)) for client in clients}
    (report,) = play(engine)
    lost = report.metrics["lost"]
    assert len(lost) == 3
    sent = [c for c in clients if c not in lost["dropout"] + lost["late"]]
    reported = [c for c in sent if c not in lost["upload_failure"]]
    assert report.metrics["download_bytes"] == down * len(clients)
    assert report.metrics["upload_bytes"] == up * len(sent)
    assert report.metrics["samples"] == sum(sizes[c] for c in reported)
    done = sum(2 * sizes[c] for c in sent)
    done += sum(math.floor(2 * sizes[c] * 1.2 / engine.faults.time(c)) for c in lost["late"])
    sample = whole.metrics["flops_total"] / whole.metrics["samples"] / 2
    assert report.metrics["flops_total"] == pytest.approx(sample * done, rel=1e-12)


def test_a_client_that_left_holds_the_mask_that_it_downloaded(make_engine):
    """Sampled again, it is charged values only; with nobody reporting, the mask cannot move in between."""
    changes = {"federation__clients": 3, "federation__rounds": 2, "faults__dropout": 1.0}
    first, second = play(make_engine("fedavg", **changes))
    assert first.metrics["upload_bytes"] == second.metrics["upload_bytes"] == 0
    assert 0 < second.metrics["download_bytes"] < first.metrics["download_bytes"]


def test_the_survivors_round_is_that_of_a_run_that_sampled_only_them(make_engine):
    """Weights are the survivors' own; so are loss and rows."""
    engine = make_engine("scaffold", **UNEVEN, **EVERYTHING, federation__rounds=1, seed=SEED)
    start = engine.start()
    report = next(engine.rounds(start))
    lost = [client for some in report.metrics["lost"].values() for client in some]
    survivors = [client for client in report.metrics["clients"] if client not in lost]
    assert sorted(report.state.rows) == sorted(survivors)
    plain = make_engine("scaffold", **UNEVEN, federation__rounds=1, seed=SEED)
    object.__setattr__(plain.task, "clients", lambda round_: survivors)
    (other,) = play(plain)
    assert all(torch.equal(report.state.params[n], p) for n, p in other.state.params.items())
    assert report.metrics["train_loss"] == other.metrics["train_loss"]


def test_a_round_without_reports_leaves_the_model_and_its_memory(make_engine):
    engine = make_engine("fedavgm", faults__upload_failure=1.0, federation__rounds=3)
    start = engine.start()
    reports = list(engine.rounds(start))
    assert [report.metrics["samples"] for report in reports] == [0, 0, 0]
    assert all(math.isnan(report.metrics["train_loss"]) for report in reports)
    assert all(torch.equal(reports[-1].state.params[name], p) for name, p in start.params.items())
    assert reports[-1].metrics["upload_bytes"] > 0
    assert "aggregate" not in reports[-1].state.memory


@pytest.mark.parametrize("plugin", NAMES)
def test_every_method_survives_and_its_executors_agree(make_engine, plugin):
    """Half leave, a fifth of the uploads is lost, some rounds have no report at all."""
    changes = {"federation__rounds": 3, "federation__clients_per_round": 4, "federation__momentum": 0.0}
    changes |= {"faults__dropout": 0.5, "faults__upload_failure": 0.2, "execution__chunk": 2}
    changes |= {"method__readjust__period": 1} if plugin in ("feddst", "pffdst") else {}
    changes |= {"task__partition__use": "dirichlet", "ledger__encode": True}
    one, other = (
        play(make_engine(plugin, **changes, execution__executor=kind))
        for kind in ("sequential", "vectorised")
    )
    assert any(report.metrics.get("lost") for report in one)
    assert_same(one[-1], other[-1], atol=1e-5)
    assert all(torch.isfinite(p).all() for p in one[-1].state.params.values())


KINDS = ("sequential", "vectorised", "graph")


@pytest.mark.parametrize("contracts", [True, False])
@pytest.mark.parametrize("plugin", ["fedavg", "feddst", "scaffold"])
def test_a_client_of_nan_is_dropped_and_spoils_nothing(make_engine, plugin, contracts):
    changes = {"faults__non_finite": "drop", "federation__rounds": 4, "execution__contracts": contracts}
    changes |= {"method__readjust__period": 1} if plugin == "feddst" else {}
    changes |= {"execution__chunk": 3, "federation__clients": 5, "federation__clients_per_round": 4}
    runs = [play(poison(make_engine(plugin, **changes, execution__executor=kind), 1, 3)) for kind in KINDS]
    for reports in runs:
        for report in reports:
            bad = [client for client in report.metrics["clients"] if client in (1, 3)]
            assert report.metrics.get("lost", {}) == ({"non_finite": bad} if bad else {})
            assert math.isfinite(report.metrics["train_loss"])
        assert all(torch.isfinite(p).all() for p in reports[-1].state.params.values())
        assert not {1, 3} & set(reports[-1].state.rows)
    assert_same(runs[0][-1], runs[1][-1])
    assert_same(runs[0][-1], runs[2][-1])


def test_a_dropped_client_is_charged_until_it_gave_up(make_engine):
    """NaN from its first epoch on: one of two epochs, no upload."""
    changes = {"federation__rounds": 1, "federation__clients": 3, "faults__non_finite": "drop"}
    (sound,) = play(make_engine(**changes))
    (report,) = play(poison(make_engine(**changes), 1))
    assert report.metrics["download_bytes"] == sound.metrics["download_bytes"]
    assert report.metrics["upload_bytes"] * 3 == sound.metrics["upload_bytes"] * 2
    assert report.metrics["flops_total"] == pytest.approx(sound.metrics["flops_total"] * 5 / 6)


def test_dropping_nobody_changes_nothing(make_engine):
    changes = {"federation__rounds": 4, "federation__local_epochs": 2, "method__readjust__period": 1}
    for kind in KINDS:
        one, other = (
            play(make_engine("feddst", **changes, execution__executor=kind, faults__non_finite=setting))
            for setting in ("stop", "drop")
        )
        assert all(torch.equal(one[-1].state.params[n], p) for n, p in other[-1].state.params.items())
        assert_same(one[-1], other[-1])


def test_a_client_that_is_sampled_twice_is_lost_twice(make_engine):
    """Its fate is the round's, and every participation is charged."""
    changes = {"federation__replacement": True, "federation__clients": 3, "federation__clients_per_round": 3}
    changes |= {"faults__dropout": 0.3, "faults__upload_failure": 0.3, "faults__non_finite": "drop"}
    runs = [
        play(poison(make_engine("scaffold", **changes, execution__executor=kind), 1))
        for kind in ("sequential", "vectorised")
    ]
    for report in runs[0]:
        lost = [client for some in report.metrics.get("lost", {}).values() for client in some]
        rest = [client for client in report.metrics["clients"] if client not in lost]
        assert sorted(lost + rest) == sorted(report.metrics["clients"])
        assert report.metrics["samples"] == 80 * len(rest)
        assert 1 not in rest
    assert any(len(set(r.metrics["clients"])) < 3 for r in runs[0])
    assert_same(runs[0][-1], runs[1][-1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_client_that_cannot_be_sent_is_dropped_as_well(make_engine, kind):
    """Finite where it trains, but beyond the range of the 2-byte values in which it would be sent."""
    changes = {"federation__rounds": 2, "federation__clients": 3, "ledger__values": "float16"}

    def loud(**more):
        engine = make_engine("scaffold", **changes, **more, execution__executor=kind, execution__chunk=3)
        return louder(engine, 2.5e3, 1)

    reports = play(loud(faults__non_finite="drop"))
    assert [report.metrics["lost"] for report in reports] == [{"non_finite": [1]}] * 2
    assert sorted(reports[-1].state.rows) == [0, 2]
    with pytest.raises(RunError, match=r"round 0, upload of client 1: .* float16 ends at 65504"):
        play(loud())


def test_all_clients_of_nan_leave_the_model(make_engine):
    for kind in KINDS:
        engine = make_engine(faults__non_finite="drop", federation__rounds=2, execution__executor=kind)
        reports = play(poison(engine, *range(6)))
        assert [report.metrics["samples"] for report in reports] == [0, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_client_of_nan_stops_the_run_with_its_name(make_engine, kind):
    engine = poison(make_engine(execution__executor=kind, federation__clients=3), 1)
    with pytest.raises(ContractError, match=r"round 0, client 1: .* NaN or infinity.*non_finite = 'drop'"):
        play(engine)
    engine = poison(make_engine(execution__executor=kind, execution__contracts=False), 1, 2, 3)
    with pytest.raises(RunError, match=r"round 0: the loss is nan.*non_finite = 'drop'"):
        play(engine)


def rounds_of_workers(make_engine, cases):
    """Runs in a worker: what a report says, as plain values."""
    join()
    torch.set_num_threads(1)
    try:
        return {case: told(make_engine, case) for case in cases}
    finally:
        leave()


def told(make_engine, case):
    plugin, bad = case
    changes = {"federation__rounds": 6, "federation__clients_per_round": 3, "faults__non_finite": "drop"}
    engine = poison(make_engine(plugin, **changes, faults__dropout=0.5, faults__upload_failure=0.3), *bad)
    reports = play(engine)
    lines = [{k: v for k, v in r.metrics.items() if k not in ("seconds", "train_loss")} for r in reports]
    rows = sorted(reports[-1].state.rows)
    return {name: p.numpy() for name, p in reports[-1].state.params.items()}, lines, rows


CASES = [("scaffold", (1, 3)), ("prunefl", ()), ("feddst", (0, 1, 2, 3, 4))]


def test_two_workers_lose_the_clients_of_one(make_engine):
    """Workers without a report, and rounds in which none has one, are among these."""
    others = launch(2, rounds_of_workers, make_engine, CASES)
    for case in CASES:
        params, lines, rows = told(make_engine, case)
        assert any(line["samples"] == 0 for line in lines)
        assert (others[case][1], others[case][2]) == (lines, rows)
        for name, value in params.items():
            torch.testing.assert_close(torch.from_numpy(others[case][0][name]), torch.from_numpy(value))


def test_a_resumed_run_equals_the_uninterrupted_one(make_engine, tmp_path):
    whole = play(make_engine("scaffold", **UNEVEN, **EVERYTHING))
    first, second = (make_engine("scaffold", **UNEVEN, **EVERYTHING) for _ in range(2))
    reports = first.rounds(first.start())
    half = [next(reports) for _ in range(9)][-1].state
    checkpoint.save(tmp_path / "checkpoint", half, first.ledger.state(), {})
    state, ledger = checkpoint.load(tmp_path / "checkpoint", {})
    second.ledger.load_state(ledger)
    rest = list(second.rounds(state))
    for one, other in zip(whole[9:], rest, strict=True):
        told = [{k: repr(v) for k, v in r.metrics.items() if k != "seconds"} for r in (one, other)]
        assert told[0] == told[1]
    assert all(torch.equal(rest[-1].state.params[n], p) for n, p in whole[-1].state.params.items())


def test_a_run_counts_whom_it_lost(make_resolved, tmp_path):
    made = make_resolved(federation__rounds=3, faults__dropout=1.0, output__evaluate_every=1)
    summary = run(made, tmp_path / "run")
    assert summary["lost"] == {"dropout": 9}
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["train_loss"] is None and line["lost"] == {"dropout": line["clients"]} for line in lines)
    strict = (tmp_path / "run" / "summary.json").read_text()
    assert "NaN" not in strict
    assert "lost" not in run(make_resolved(federation__rounds=1), tmp_path / "plain")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"faults__dropout": 1.5}, "faults.dropout: .*less than or equal to 1; given 1.5"),
        ({"faults__deadline": 0}, "faults.deadline: .*greater than 0; given 0"),
        ({"faults__speed_spread": 0.5}, "faults: speed_spread = 0.5 changes nothing without a deadline"),
        ({"faults__non_finite": "ignore"}, "faults.non_finite: .*'stop' or 'drop'; given 'ignore'"),
        ({"faults__dropuot": 0.1}, "faults.dropuot: unknown key. Did you mean 'dropout'"),
        ({"faults": 0.1}, "faults: given 0.1; expected a table"),
    ],
)
def test_wrong_settings_are_named(make_resolved, changes, said):
    with pytest.raises(ConfigError, match=said):
        make_resolved(**changes)


def test_the_command_says_how_many_are_lost(make_resolved, tmp_path):
    made = make_resolved(federation__rounds=2, faults__upload_failure=1.0, output__evaluate_every=1)
    (tmp_path / "lossy.toml").write_text(made.toml())
    result = CliRunner().invoke(
        main, ["run", "--config", str(tmp_path / "lossy.toml"), "--out", str(tmp_path / "run")]
    )
    assert result.exit_code == 0, result.output
    assert len(re.findall(r"^round .* lost 3 of 3$", result.output, re.MULTILINE)) == 2
    assert re.search(r"clients lost: upload failure *│ *6 ", result.output)


def test_nothing_happens_by_default(make_engine):
    assert not make_engine().faults.any
    assert FaultsConfig().non_finite == "stop"
