"""`fedsparse.run` is the command line's run; `Result` reads back what is in its folder."""

import json
import signal

import numpy as np
import pytest

import fedsparse
from fedsparse.core.errors import ConfigError, RunError
from fedsparse.core.results import Result

SHORT = {"federation__rounds": 4, "federation__local_epochs": 1, "output__evaluate_every": 2}


def test_a_run_from_python_writes_what_the_command_writes(tmp_path, cli):
    result = fedsparse.run("pffdst", swaps={"readjust": "feddst"}, out=tmp_path / "a", seed=3, **SHORT)
    sets = ["federation.rounds=4", "federation.local_epochs=1", "output.evaluate_every=2"]
    arguments = [argument for setting in sets for argument in ("--set", setting)]
    done = cli("run", "--plugin", "pffdst", "--swap", "readjust=feddst", "--seed", "3", "--quiet", *arguments)
    assert done.exit_code == 0, done.output
    other = Result.load(next((tmp_path / "runs").iterdir()))
    assert [{**line, "seconds": 0} for line in result.rounds] == [
        {**line, "seconds": 0} for line in other.rounds
    ]
    assert result.config == other.config
    assert result.finished
    assert result.summary["swaps"] == {"readjust": "feddst:Regrow"}


def test_metrics_are_arrays_with_nan_where_a_round_has_none(tmp_path):
    seen = []
    result = fedsparse.run("fedavg", out=tmp_path / "a", progress=seen.append, **SHORT)
    assert [line["round"] for line in seen] == [0, 1, 2, 3]
    metrics = result.metrics
    assert metrics["upload_bytes"].shape == (4,)
    assert np.isnan(metrics["test_accuracy"]).tolist() == [True, False, True, False]
    assert metrics["test_accuracy"][3] == result.summary["final"]["test_accuracy"]
    assert "clients" not in metrics


def test_settings_may_be_tables_or_paths_and_all_errors_come_at_once():
    with pytest.raises(ConfigError) as caught:
        fedsparse.run("pffdst", federation__roundz=6, sparsity={"target": 3})
    assert len(caught.value.problems) == 2
    with pytest.raises(ConfigError, match=r"federation: given both ways: rounds"):
        fedsparse.run("pffdst", federation__rounds=6, federation={"rounds": 7})
    with pytest.raises(ConfigError, match=r"federation: given both ways"):
        fedsparse.run("pffdst", federation__rounds=6, federation=7)
    with pytest.raises(ConfigError, match=r"seed.x: 'seed' was given a value, too"):
        fedsparse.run("pffdst", seed=6, seed__x=7)


def test_an_empty_table_undoes_no_swap(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("[method.aggregate]\n")
    result = fedsparse.run(
        "pffdst",
        swaps={"readjust": "set"},
        method={"readjust": {}},
        configs=[path],
        out=tmp_path / "a",
        **SHORT,
    )
    assert result.summary["swaps"] == {"readjust": "set:Evolve"}
    assert result.config["method"]["readjust"]["use"] == "set:Evolve"
    assert result.config["method"]["aggregate"]["use"] == "pffdst:MaskedMean"


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(RunError, match="is no run"):
        Result.load(tmp_path)
    result = fedsparse.run("fedavg", out=tmp_path / "a", **SHORT)
    lines = (result.path / "metrics.jsonl").read_text().splitlines()
    (result.path / "metrics.jsonl").write_text("\n".join(lines[1:]))
    with pytest.raises(RunError, match=r"metrics.jsonl is damaged"):
        Result.load(result.path)
    (result.path / "metrics.jsonl").write_text(lines[0][:40] + "\n")  # no half line of a kill: it ended
    with pytest.raises(RunError, match=r"cannot read .*metrics.jsonl"):
        Result.load(result.path)


def test_a_run_that_did_not_end_is_not_finished(tmp_path):
    result = fedsparse.run("fedavg", out=tmp_path / "a", **SHORT)
    summary = json.loads((result.path / "summary.json").read_text())
    (result.path / "summary.json").write_text(json.dumps({**summary, "interrupted": True}))
    assert not Result.load(result.path).finished
    (result.path / "summary.json").unlink()
    assert not Result.load(result.path).finished


def comparable(result):
    return [{**line, "seconds": 0} for line in result.rounds]


def test_workers_trackers_and_progress_from_python(tmp_path):
    alone = fedsparse.run("pffdst", out=tmp_path / "a", **SHORT)
    seen = []
    shared = fedsparse.run(
        "pffdst", out=tmp_path / "b", workers=2, track=["csv"], progress=seen.append, **SHORT
    )
    assert comparable(shared) == comparable(alone)
    assert shared.summary["workers"] == 2
    assert (tmp_path / "b" / "metrics.csv").read_text().startswith("round,name,value\n")
    assert [line["round"] for line in seen] == [0, 1, 2, 3]  # told here, though another process plays


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_the_callers_own_ends_the_run(tmp_path, workers):
    def refuse(metrics):
        raise ValueError(f"enough at {metrics['round']}")

    with pytest.raises(ValueError, match="enough at 0"):
        fedsparse.run(
            "fedavg",
            out=tmp_path / "a",
            workers=workers,
            progress=refuse,
            **{**SHORT, "federation__rounds": 2000},
        )
    assert len((tmp_path / "a" / "metrics.jsonl").read_text().splitlines()) < 2000


def test_an_interrupted_run_goes_on_from_python(tmp_path):
    whole = fedsparse.run("pffdst", out=tmp_path / "a", **SHORT)

    def interrupt(metrics):
        if metrics["round"] == 1:
            signal.raise_signal(signal.SIGINT)

    cut = fedsparse.run("pffdst", out=tmp_path / "b", progress=interrupt, **SHORT)
    assert not cut.finished
    assert len(cut.rounds) < 4
    gone_on = fedsparse.resume(tmp_path / "b")
    assert gone_on.finished
    assert comparable(gone_on) == comparable(whole)
    with pytest.raises(RunError, match="has played all of its 4 rounds"):
        fedsparse.resume(tmp_path / "b")
    with pytest.raises(ConfigError, match="no run's folder"):
        fedsparse.resume(tmp_path)


def test_what_python_cannot_ask_for_is_refused(monkeypatch):
    for workers in (0, True, 1.5, 2000):
        with pytest.raises(ConfigError, match=r"workers: given .*; allowed: 1 to 1024"):
            fedsparse.run("fedavg", workers=workers, **SHORT)
    with pytest.raises(ConfigError, match=r"unknown tracker 'csvv'\. Did you mean 'csv'"):
        fedsparse.run("fedavg", track="csvv", **SHORT)
    with pytest.raises(ConfigError, match=r"swaps: given \['readjust=feddst'\]; expected plugins by slot"):
        fedsparse.run("fedavg", swaps=["readjust=feddst"], **SHORT)
    with pytest.raises(ConfigError, match="swap: no such setting; the argument is called swaps"):
        fedsparse.run("fedavg", swap={"readjust": "feddst"}, **SHORT)
    with pytest.raises(ConfigError, match=r"--config cifar10-lennet: no such preset\. Did you mean"):
        fedsparse.run("fedavg", configs="cifar10-lennet", **SHORT)
    with pytest.raises(ConfigError, match="--extra privcy: unknown plugin"):
        fedsparse.run("fedavg", extras="privcy", **SHORT)
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    with pytest.raises(RunError, match="has used a GPU and so cannot start workers"):
        fedsparse.run("fedavg", workers=2, **SHORT)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(RunError, match="started by torchrun"):
        fedsparse.run("fedavg", **SHORT)
