"""Trackers hold the numbers of `metrics.jsonl`, whatever the tool."""

import csv
import importlib.util

import pytest

import fedsparse
from fedsparse.core.results import Result
from fedsparse.core.trackers import TRACKERS, numbers, tracked

SHORT = ["federation.rounds=3", "federation.local_epochs=1", "output.evaluate_every=2"]
SETS = [argument for setting in SHORT for argument in ("--set", setting)]


def train(cli, tmp_path, *trackers):
    chosen = [argument for tracker in trackers for argument in ("--track", tracker)]
    done = cli("run", "--plugin", "fedavg", *SETS, *chosen, "--quiet", "--out", tmp_path / "a")
    assert done.exit_code == 0, done.output
    result = Result.load(tmp_path / "a")
    return result, {(line["round"], name): value for line in result.rounds for name, value in numbers(line)}


def test_csv_has_every_number(cli, tmp_path):
    _, expected = train(cli, tmp_path, "csv")
    with (tmp_path / "a" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(int(row["round"]), row["name"]): float(row["value"]) for row in rows} == expected
    assert (2, "test_accuracy") in expected


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_reads_back_every_number(cli, tmp_path):
    pytest.importorskip("tensorboard")
    _, expected = train(cli, tmp_path, "tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "a" / "tensorboard")).Reload()
    found = {(e.step, name): e.value for name in events.Tags()["scalars"] for e in events.Scalars(name)}
    assert found.keys() == expected.keys()
    for place, value in found.items():
        assert value == pytest.approx(expected[place], rel=1e-6)  # float32


@pytest.mark.filterwarnings("ignore")
def test_mlflow_keeps_numbers_and_settings_in_a_file_store(cli, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    result, expected = train(cli, tmp_path, "mlflow")
    client = mlflow.MlflowClient((tmp_path / "store").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("fedsparse").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "a"
    assert run.data.params["federation.rounds"] == "3"
    for (round_, name), value in expected.items():
        history = {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, name)}
        assert history[round_] == pytest.approx(value)
    assert result.finished


@pytest.mark.filterwarnings("ignore")
def test_wandb_works_offline(cli, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(cli, tmp_path, "wandb")
    (kept,) = (tmp_path / "a" / "wandb").glob("offline-run-*/*.wandb")
    assert kept.stat().st_size > 0


def test_resumed_runs_track_on(cli, tmp_path):
    train(cli, tmp_path, "csv")
    before = (tmp_path / "a" / "metrics.csv").read_text()
    refused = cli("resume", tmp_path / "a", "--track", "csv")
    assert refused.exit_code == 1
    assert "has played all of its 3 rounds" in refused.output
    assert (tmp_path / "a" / "metrics.csv").read_text() == before


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_rounds_that_a_resumed_run_plays_again_are_tracked_once(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    def interrupt(line):
        if line["round"] == 3:
            raise KeyboardInterrupt

    chosen = ["csv", "tensorboard"]
    short = {"federation__rounds": 6, "federation__local_epochs": 1, "output__checkpoint_every": 2}
    fedsparse.run("fedavg", out=tmp_path / "a", progress=interrupt, track=chosen, **short)
    with (tmp_path / "a" / "metrics.csv").open("a") as file:  # as SIGKILL after the checkpoint leaves it
        file.write("4,train_loss,9\r\n5,train_lo")
    with SummaryWriter(str(tmp_path / "a" / "tensorboard")) as writer:
        writer.add_scalar("train_loss", 9.0, 4)
    result = fedsparse.resume(tmp_path / "a", track=chosen)
    expected = [(str(line["round"]), name) for line in result.rounds for name, _ in numbers(line)]
    with (tmp_path / "a" / "metrics.csv").open(newline="") as file:
        assert [(row["round"], row["name"]) for row in csv.DictReader(file)] == expected
    events = EventAccumulator(str(tmp_path / "a" / "tensorboard")).Reload()
    losses = {event.step: event.value for event in events.Scalars("train_loss")}
    assert [*losses] == [event.step for event in events.Scalars("train_loss")] == [*range(6)]
    assert losses[4] == pytest.approx(result.rounds[4]["train_loss"], rel=1e-6)


def test_a_missing_package_is_named(make_resolved, monkeypatch):
    from fedsparse.core.errors import ConfigError, RunError

    monkeypatch.setattr(
        "fedsparse.core.trackers.import_module", lambda name: importlib.import_module("no-" + name)
    )
    for name in set(TRACKERS) - {"csv"}:
        with pytest.raises(RunError, match=r"pip install 'fedsparse\[trackers\]'"):
            tracked(make_resolved("fedavg"), [name])
    with pytest.raises(ConfigError, match=r"unknown tracker 'tensorbord'. Did you mean 'tensorboard'"):
        tracked(make_resolved("fedavg"), ["tensorbord"])
