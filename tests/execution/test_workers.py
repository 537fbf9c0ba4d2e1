"""Several workers: the numbers of one, clients dealt evenly, and ends that say what happened."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fedsparse.core import playing
from fedsparse.core.errors import ConfigError, FedsparseError, RunError
from fedsparse.core.execution.workers import Workers, join, launch, leave, own_device
from fedsparse.core.registry import Registry
from fedsparse.core.task import choose_device
from fedsparse.core.tracking import RunFolder

COMMAND = [sys.executable, "-c", "from fedsparse.cli.main import main; main()"]
TASK = [
    "task.dataset.use=synthetic", "task.dataset.train=120", "task.dataset.test=40", "task.model.use=mlp",
    "task.partition.use=iid", "federation.clients=6", "federation.clients_per_round=3",
    "federation.rounds=6", "output.checkpoint_every=2", "output.evaluate_every=2",
]  # fmt: skip
TINY = [word for setting in TASK for word in ("--set", setting)]


def test_clients_are_dealt_by_work_and_all_of_them_once():
    work = {1: 900, 2: 100, 3: 500, 4: 450, 5: 10, 6: 40}
    clients = [6, 1, 5, 2, 4, 3]
    shares = [Workers(rank, 2).deal(clients, work) for rank in range(2)]
    assert shares == [[1, 2], [6, 5, 4, 3]]  # 900 + 100 against 500 + 450 + 40 + 10
    assert Workers().deal(clients, work) == clients


def test_a_client_sampled_twice_stays_on_one_worker():
    shares = [Workers(rank, 2).deal([4, 1, 4, 2], {1: 5, 2: 5, 4: 5}) for rank in range(2)]
    assert shares == [[4, 4], [1, 2]]


def rounds_of_every_method(make_engine, names):
    """Runs in a worker: final parameters and metrics by method, as plain values."""
    join()
    torch.set_num_threads(1)
    try:
        return {name: rounds(make_engine, name) for name in names}
    finally:
        leave()


def rounds(make_engine, name):
    changes = {"method__readjust__period": 1} if name in ("feddst", "pffdst") else {}
    engine = make_engine(name, federation__rounds=4, task__partition__use="dirichlet", **changes)
    report = list(engine.rounds(engine.start()))[-1]
    metrics = {k: v for k, v in report.metrics.items() if k != "seconds"}
    params = {name: p.numpy() for name, p in report.state.params.items()}
    return params, {name: m.numpy() for name, m in report.state.mask.items()}, metrics


NAMES = Registry().names()


@pytest.fixture(scope="module")
def by_two(make_engine):
    return launch(2, rounds_of_every_method, make_engine, NAMES)


@pytest.mark.parametrize("plugin", NAMES)
def test_two_workers_give_the_results_of_one(make_engine, by_two, plugin):
    """Sums are float64, so even their order does not show; losses are float64 sums themselves."""
    params, mask, metrics = rounds(make_engine, plugin)
    others = by_two[plugin]
    for name, value in params.items():
        torch.testing.assert_close(
            torch.from_numpy(others[0][name]), torch.from_numpy(value), rtol=1e-6, atol=1e-7
        )
    assert all((others[1][name] == m).all() for name, m in mask.items())
    losses = {"train_loss", "test_loss"}
    assert {k: v for k, v in others[2].items() if k not in losses} == {
        k: v for k, v in metrics.items() if k not in losses
    }
    assert others[2]["train_loss"] == pytest.approx(metrics["train_loss"], rel=1e-6)


def agreed():
    """Runs in a worker: what each of them has of masks that differ."""
    me = join()
    try:
        masks = {"a": torch.full((2, 3), me.rank == 0), "b": torch.tensor([[me.rank == 1, True]]).T}
        return me.gathered({name: mask.tolist() for name, mask in me.same(masks).items()})
    finally:
        leave()


def test_masks_that_differ_become_the_first_workers():
    assert launch(2, agreed) == [{"a": [[True] * 3] * 2, "b": [[False], [True]]}] * 2


@pytest.mark.parametrize(("plugin", "agrees"), [("fedavg", 0), ("snip", 1)])
def test_workers_agree_on_masks_by_gradients(monkeypatch, make_engine, plugin, agrees):
    """Two GPUs may sum gradients in another order, and so rank two weights in another."""
    asked = []
    monkeypatch.setattr(Workers, "same", lambda self, masks: asked.append(masks) or masks)
    make_engine(plugin).start()
    assert len(asked) == agrees


def children_of(parent):
    parents = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended since
            parents.append(int(stat.read_text().rpartition(")")[2].split()[1]))
    return parents.count(parent)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="counts processes in /proc")
def test_no_worker_begins_before_all_are_forked():
    """One forked while the launcher looks up another's address finds the resolver locked, for ever."""
    before = children_of(os.getpid())
    assert launch(4, children_of, os.getpid()) == before + 4


def fails(kind):
    rank = join().rank
    if rank == 1 and kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1 and kind == "error":
        raise RunError("client 7 has no data")
    Workers(rank, 2).wait()


def test_a_killed_worker_is_named():
    with pytest.raises(RunError, match=r"worker 1 of \S+ \(pid \d+\) was killed by SIGKILL"):
        launch(2, fails, "killed")


def test_an_error_of_a_worker_is_the_error_of_the_run():
    with pytest.raises(Exception, match=r"^client 7 has no data$"):
        launch(2, fails, "error")


def one_client(make_engine):
    """Two workers, but some rounds sample one client twice."""
    torch.set_num_threads(1)
    join()
    try:
        return rounds_of_one(make_engine)
    finally:
        leave()


def rounds_of_one(make_engine):
    changes = {"federation__clients_per_round": 2, "federation__replacement": True}
    engine = make_engine("scaffold", federation__clients=2, federation__rounds=6, **changes)
    reports = list(engine.rounds(engine.start()))
    assert any(len(set(report.metrics["clients"])) == 1 for report in reports)
    end = reports[-1]
    return {name: p.numpy() for name, p in end.state.params.items()}, end.metrics["upload_bytes_total"]


def test_a_worker_without_a_client_adds_nothing(make_engine):
    params, sent = rounds_of_one(make_engine)
    others = launch(2, one_client, make_engine)
    assert others[1] == sent
    for name, value in params.items():
        torch.testing.assert_close(torch.from_numpy(others[0][name]), torch.from_numpy(value))


def test_launching_leaves_gpus_to_the_workers():
    """A process that asked CUDA for devices leaves children that cannot use them."""
    code = (
        "import torch\nfrom fedsparse.core.execution.workers import launch\n"
        "from fedsparse.core.resolve import resolve\nresolve('pffdst')\n"
        "print(launch(2, torch.cuda._is_in_bad_fork))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def nothing():
    return None


def test_workers_leave_no_folders_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    launch(2, nothing)
    assert list(tmp_path.iterdir()) == []


def fedsparse(*words, cwd):
    """Runs the command; if it hangs, all its processes say where, and the test fails with that."""
    run = subprocess.Popen(
        [*COMMAND, *words],
        cwd=cwd,
        env=os.environ | {"PYTHONFAULTHANDLER": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, error = run.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGABRT)
        pytest.fail(f"hangs:\n{run.communicate()[1]}")
    return subprocess.CompletedProcess(run.args, run.returncode, out, error)


def lines(folder):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in found]


DIES = """
import os, signal
from fedsparse import Method, Part, hookimpl

class Dies(Part):
    @hookimpl
    def penalty(self, params):
        if os.path.exists("die"):
            os.remove("die")
            os.kill(os.getpid(), signal.SIGKILL)
        return sum(p.sum() * 0 for p in params.values())

    @hookimpl
    def on_round_end(self, report):
        if report.metrics["round"] == 3 and os.path.exists("arm"):
            os.rename("arm", "die")

METHOD = Method("dies", extras=(Dies(),))
"""


def test_a_run_whose_worker_died_is_named_and_resumes_bit_identical(tmp_path):
    (tmp_path / "dies.py").write_text(DIES)
    (tmp_path / "arm").touch()
    arguments = ["run", "--plugin", "./dies.py", *TINY, "--workers", "2", "--quiet"]
    died = fedsparse(*arguments, "--out", "a", cwd=tmp_path)
    assert died.returncode == 1
    assert "was killed by SIGKILL" in died.stderr
    assert "Traceback" not in died.stderr
    assert len(lines(tmp_path / "a")) == 4
    resumed = fedsparse("resume", "a", "--workers", "2", "--quiet", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    whole = fedsparse(*arguments[:-3], "--out", "b", "--quiet", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    assert lines(tmp_path / "a") == lines(tmp_path / "b")
    assert json.loads((tmp_path / "a" / "summary.json").read_text())["workers"] == 2


def test_ctrl_c_ends_all_workers_after_the_round(tmp_path):
    sets = [*TINY, "--set", "federation.rounds=100000"]
    command = [*COMMAND, "run", *sets, "--workers", "2", "--out", "c"]
    run = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    metrics, waited = tmp_path / "c" / "metrics.jsonl", time.monotonic() + 60
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < waited:
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGINT)
    out, error = run.communicate(timeout=60)
    assert run.returncode == 130, (out, error)
    summary = json.loads((tmp_path / "c" / "summary.json").read_text())
    assert summary["interrupted"]
    assert summary["rounds"] == len(lines(tmp_path / "c"))
    assert (tmp_path / "c" / "checkpoint" / "state.json").exists()


def test_a_folder_takes_one_run_at_a_time(make_resolved, tmp_path):
    made = make_resolved()
    folder = RunFolder(made, tmp_path / "a")
    (tmp_path / "a" / "metrics.jsonl").write_text("")
    with pytest.raises(RunError, match="a run is going on in"):
        RunFolder(made, tmp_path / "a", resume_at=0)
    folder.close()
    again = RunFolder(made, tmp_path / "a", resume_at=0)
    again.close()
    with pytest.raises(RunError, match="lacks rounds"):
        RunFolder(made, tmp_path / "a", resume_at=2)


def test_more_workers_than_clients_a_round_is_refused(tmp_path):
    refused = fedsparse("run", *TINY, "--workers", "4", "--out", "d", cwd=tmp_path)
    assert refused.returncode == 2
    assert "4 workers for 3 clients a round" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "d").exists()


def test_torchrun_of_more_workers_than_clients_a_round_is_refused():
    with pytest.raises(FedsparseError, match="2 workers for 1 clients a round"):
        launch(2, join, 1)


def test_what_cannot_be_resumed_is_refused(tmp_path):
    (tmp_path / "e").mkdir()
    refused = fedsparse("resume", "e", cwd=tmp_path)
    assert refused.returncode == 2
    assert "config.toml" in refused.stderr
    assert fedsparse("run", *TINY, "--quiet", "--out", "f", cwd=tmp_path).returncode == 0
    done = fedsparse("resume", "f", cwd=tmp_path)
    assert done.returncode == 1
    assert "has played all of its 6 rounds" in done.stderr


def test_two_workers_encode_as_one_counts(tmp_path):
    """What two processes encode and decode sums to the run of one that only counts, part by part."""
    runs = [[], ["--workers", "2", "--set", "ledger.encode=true"]]
    for name, more in zip("ab", runs, strict=True):
        command = [*COMMAND, "run", "--plugin", "scaffold", *TINY, *more, "--out", name]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    one, two = (lines(tmp_path / name) for name in "ab")
    assert one == two
    parts = ("values", "mask", "dense", "other")
    assert all(line["upload_bytes"] == sum(line[f"upload_{part}_bytes"] for part in parts) for line in two)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (
        tmp_path / "b" / "model.safetensors"
    ).read_bytes()


def test_workers_of_a_process_that_looked_for_gpus_say_so(monkeypatch):
    """CUDA cannot start in a copy of a process that has asked it anything."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    with pytest.raises(RunError, match="has used a GPU and so cannot start workers"):
        own_device()


def test_workers_take_nccl_only_for_gpus_of_their_own(monkeypatch):
    backends, gpus = [], 1
    monkeypatch.setattr(dist, "init_process_group", lambda backend, timeout: backends.append(backend))
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    for name, value in {"WORLD_SIZE": 2, "RANK": 1, "LOCAL_WORLD_SIZE": 2, "LOCAL_RANK": 1}.items():
        monkeypatch.setenv(name, str(value))
    join(device="cpu")
    with pytest.raises(ConfigError, match="2 workers on a machine with 1 GPUs"):
        join()
    gpus = 2
    assert join().rank == 1
    assert backends == ["gloo", "cpu:gloo,cuda:nccl"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_workers_do_not_fall_back_to_cpus_where_cuda_is_asked_for(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="'cuda' cannot be used here"):
        choose_device("cuda")


def test_a_worker_with_an_error_waits_for_no_other(monkeypatch, make_resolved):
    """NCCL's end is for all of them together."""
    left = []
    monkeypatch.setattr(playing.workers, "join", lambda **options: Workers(0, 2))
    monkeypatch.setattr(playing.workers, "leave", lambda: left.append(True))
    monkeypatch.setattr(playing.runner, "run", lambda *given, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        playing._played(make_resolved("fedavg"), None, playing.View(), False)
    assert not left
    monkeypatch.setattr(playing.runner, "run", lambda *given, **options: None)
    monkeypatch.setattr(playing.workers, "join", lambda **options: Workers(1, 2))
    assert playing._played(make_resolved("fedavg"), None, playing.View(), False) is None
    assert left
