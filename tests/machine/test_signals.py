"""SIGTERM as clusters send it, Ctrl-C, and killed launchers: what ends, when, and what is left on disk."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

from fedsparse.cli.main import main
from fedsparse.core import ending, runner
from fedsparse.core.errors import RunError
from fedsparse.core.execution.workers import join, launch, leave

CLI = [sys.executable, "-c", "from fedsparse.cli.main import main; main()"]
SETS = [
    "task.dataset.use=synthetic", "task.dataset.train=120", "task.dataset.test=40", "task.model.use=mlp",
    "task.partition.use=iid", "federation.clients=6", "federation.clients_per_round=3",
    "federation.rounds=100000", "output.checkpoint_every=50000",
]  # fmt: skip
TRAIN = ["run", *(word for setting in SETS for word in ("--set", setting)), "--out", "run"]


def started(folder, *words):
    """A run that has recorded a round."""
    run = subprocess.Popen(
        [*CLI, *TRAIN, *words],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, text=True,
    )  # fmt: skip
    metrics, until = folder / "run" / "metrics.jsonl", time.monotonic() + 60
    while not (metrics.exists() and metrics.stat().st_size):
        assert time.monotonic() < until
        assert run.poll() is None, run.communicate()
        time.sleep(0.05)
    return run


def saved(folder):
    """The rounds of the checkpoint, the summary, and the metrics agree."""
    summary = json.loads((folder / "run" / "summary.json").read_text())
    state = json.loads((folder / "run" / "checkpoint" / "state.json").read_text())
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    assert summary["interrupted"]
    assert summary["rounds"] == state["round"] == len(lines)
    return summary


def alive(pids):
    found = set()
    for pid in pids:
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] != "Z":
                    found.add(pid)
        except FileNotFoundError:
            pass
    return found


def workers_of(run):
    with open(f"/proc/{run.pid}/task/{run.pid}/children") as file:
        return [int(pid) for pid in file.read().split()]


ENDS = """
import os
import signal
from fedsparse import Method, Part, hookimpl

class Ends(Part):
    @hookimpl
    def on_round_end(self, report):
        if report.metrics["round"] == 0:
            os.kill(os.getpid(), signal.SIGNAL)

METHOD = Method("ends", extras=(Ends(),))
"""


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_ends_after_the_round_with_a_checkpoint(tmp_path, monkeypatch, name, status):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ends.py").write_text(ENDS.replace("SIGNAL", name))
    made = CliRunner().invoke(main, [*TRAIN, "--plugin", "./ends.py"])
    assert made.exit_code == status, made.stderr
    assert f"{name}: ending after this round" in made.output
    assert saved(tmp_path)["signal"] == name
    ablation = ["ablate", *TRAIN[1:-1], "a", "--plugin", "./ends.py", "--grid", "sparsity.target=0.5"]
    made = CliRunner().invoke(main, ablation)
    assert made.exit_code == status, made.stderr
    assert "Interrupted; 0 of 3 runs are finished" in made.output


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="reads children from /proc")
@pytest.mark.parametrize("whom", ["launcher", "worker", pytest.param("group", marks=pytest.mark.slow)])
def test_sigterm_ends_all_workers_after_the_round(tmp_path, whom):
    run = started(tmp_path, "--workers", "2")
    pids = workers_of(run)
    if whom == "group":
        os.killpg(run.pid, signal.SIGTERM)  # each worker gets it twice
    else:
        os.kill(run.pid if whom == "launcher" else pids[1], signal.SIGTERM)
    _, error = run.communicate(timeout=60)
    assert run.returncode == 143, error
    assert "Traceback" not in error
    assert saved(tmp_path)["signal"] == "SIGTERM"
    assert not alive(pids)


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="reads children from /proc")
def test_workers_do_not_outlive_their_launcher(tmp_path):
    run = started(tmp_path, "--workers", "2")
    pids = workers_of(run)
    assert len(alive(pids)) >= 2
    run.kill()
    run.communicate()
    until = time.monotonic() + 30
    while alive(pids) and time.monotonic() < until:
        time.sleep(0.1)
    assert not alive(pids)


SLOW = """
import time
from fedsparse import Method, Part, hookimpl

class Slow(Part):
    @hookimpl
    def on_round_end(self, report):
        if report.metrics["round"] == 1:
            time.sleep(300)

METHOD = Method("slow", extras=(Slow(),))
"""


@pytest.mark.parametrize("workers", [pytest.param("1", marks=pytest.mark.slow), "2"])
def test_a_second_ctrl_c_ends_at_once(tmp_path, workers):
    (tmp_path / "slow.py").write_text(SLOW)
    run = started(tmp_path, "--plugin", "./slow.py", "--workers", workers)
    time.sleep(1)
    os.killpg(run.pid, signal.SIGINT)
    time.sleep(0.5)
    assert run.poll() is None
    os.killpg(run.pid, signal.SIGINT)
    begun = time.monotonic()
    _, error = run.communicate(timeout=60)
    assert run.returncode == 130, error
    assert "Traceback" not in error
    assert time.monotonic() - begun < 25
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["interrupted"]
    assert summary["signal"] == "SIGINT"


@pytest.mark.slow  # torchrun imports all of torch before it starts a process
def test_torchrun_ends_after_the_round(tmp_path):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "--no-python", *CLI, *TRAIN,
    ]  # fmt: skip
    run = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    metrics, until = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 60
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < until:
        time.sleep(0.05)
    run.terminate()  # what a cluster does; torchrun passes it on and waits half a minute
    run.communicate(timeout=60)
    assert saved(tmp_path)["signal"] == "SIGTERM"


def test_sigterm_twice_is_one_request(make_resolved, tmp_path):
    def terminate(report):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    before, said = signal.getsignal(signal.SIGTERM), []
    made = make_resolved("fedavg", federation__rounds=9)
    summary = runner.run(made, tmp_path / "r", watch=terminate, say=said.append)
    assert summary["signal"] == "SIGTERM"
    assert summary["rounds"] == 2  # it came after the first
    assert len(said) == 1
    assert signal.getsignal(signal.SIGTERM) is before
    assert ending.asked[0] == signal.SIGTERM
    assert not runner.run(made, tmp_path / "r", resume=True)["interrupted"]


def test_sigint_twice_ends_at_once(make_resolved, tmp_path):
    def twice(report):
        if report.metrics["round"] == 1:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            pytest.fail("the round went on")

    made = make_resolved("fedavg", federation__rounds=9, output__checkpoint_every=1)
    summary = runner.run(made, tmp_path / "r", watch=twice)
    assert (summary["signal"], summary["rounds"]) == ("SIGINT", 2)


def terminated(seconds):
    rank = join().rank
    try:
        if rank == 1:
            os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(seconds)
    finally:
        leave()


def test_sigterm_before_the_first_round_is_named():
    with pytest.raises(RunError, match="SIGTERM ended the run at once") as caught:
        launch(2, terminated, 60)
    assert caught.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


BREAKS = """
from fedsparse import Method, Part, hookimpl
import os

class Breaks(Part):
    @hookimpl
    def penalty(self, params):
        if os.environ.get("RANK") == "1":
            raise ZeroDivisionError("here")
        return sum(p.sum() * 0 for p in params.values())

METHOD = Method("breaks", extras=(Breaks(),))
"""


def test_a_failing_worker_keeps_its_traceback(tmp_path):
    (tmp_path / "breaks.py").write_text(BREAKS)
    words = [*CLI, *TRAIN, "--plugin", "./breaks.py", "--workers", "2"]
    run = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    assert "traceback in run/error-worker1.log" in " ".join(run.stderr.split())
    assert 'raise ZeroDivisionError("here")' in (tmp_path / "run" / "error-worker1.log").read_text()
    assert not (tmp_path / "run" / "error.log").exists()
