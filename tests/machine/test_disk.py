"""A disk that is full, read-only or gone: one message, what was recorded stays, and the run goes on later."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from fedsparse.cli.main import main
from fedsparse.core import packing, runner
from fedsparse.core.disk import DiskError, replace
from fedsparse.core.results import Result

SETS = [
    "task.dataset.use=synthetic", "task.dataset.train=60", "task.dataset.test=20", "task.model.use=mlp",
    "task.partition.use=iid", "federation.clients=4", "federation.clients_per_round=2",
    "federation.local_epochs=1", "output.checkpoint_every=1", "output.evaluate_every=2",
]  # fmt: skip


def fedsparse(*words, largest=None):
    """The command in this process, of which no file may be longer than `largest` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if largest is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, before[1]))
    try:
        made = CliRunner().invoke(main, [*map(str, words)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert made.exception is None or isinstance(made.exception, SystemExit), made.exception
    assert "unexpected" not in made.stderr
    return made


def train(out, rounds=6, plugin="pffdst", **options):
    sets = [word for setting in [*SETS, f"federation.rounds={rounds}"] for word in ("--set", setting)]
    return fedsparse("run", "--plugin", plugin, *sets, "--quiet", "--out", out, **options)


def left(folder):
    rounds = [{**line, "seconds": 0} for line in Result.load(folder).rounds]
    return rounds, *((folder / f"{name}.safetensors").read_bytes() for name in ("model", "mask"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing happened to, and the size of the largest file but one that it wrote."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert train(out).exit_code == 0
    return out


def one_error(made, *said):
    assert made.exit_code == 1, made.stderr
    assert made.stderr.startswith("Error: cannot write ")
    for words in said:
        assert words in " ".join(made.stderr.split()), made.stderr


def mount(path, *options):
    """Mounts a tmpfs, or skips; this process may have no right to."""
    path.mkdir(exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", path], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("mounting is not allowed here")


def fill(path, room):
    """Takes all space but so many bytes."""
    with path.open("wb", buffering=0) as file:
        file.write(b"0" * (shutil.disk_usage(path.parent).free - room))


@pytest.fixture
def small_disk(tmp_path):
    """A disk that holds a checkpoint or two, and a file that takes space."""
    if shutil.which("mount") is None or os.geteuid():
        pytest.skip("only root may mount")
    place = tmp_path / "disk"
    mount(place, "size=64m")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_checkpoint_that_may_not_grow_leaves_the_last_one(whole, tmp_path):
    """The portable fault: every file above a length fails as on a full disk."""
    shutil.copytree(whole, tmp_path / "run")
    run = tmp_path / "run"
    (run / "summary.json").unlink()
    state = json.loads((run / "checkpoint.old" / "state.json").read_text())
    shutil.rmtree(run / "checkpoint")
    (run / "checkpoint.old").rename(run / "checkpoint")
    before = {path.name: path.read_bytes() for path in (run / "checkpoint").iterdir()}
    limit = len(before["tensors.safetensors"]) // 2
    made = fedsparse("resume", run, "-q", largest=limit)
    one_error(made, "checkpoint: File too large", "MB are free there", f"fedsparse resume {run} goes on")
    assert {path.name: path.read_bytes() for path in (run / "checkpoint").iterdir()} == before
    assert not (run / "checkpoint.new").exists()
    assert len((run / "metrics.jsonl").read_text().splitlines()) == state["round"] + 1
    assert fedsparse("resume", run, "-q").exit_code == 0
    assert left(run) == left(whole)


def test_metrics_that_may_not_grow(whole, tmp_path):
    run = tmp_path / "run"
    line = len((whole / "metrics.jsonl").read_bytes()) / 6
    config = len((whole / "config.toml").read_bytes())
    rounds = int(config / line) + 5
    made = train(run, rounds, largest=config + 10)  # the checkpoint fails first
    one_error(made, "There is no checkpoint yet: start anew")
    assert not (run / "checkpoint").exists()
    assert not (run / "checkpoint.new").exists()


def test_half_a_line_at_the_end_does_no_harm(whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "summary.json").unlink()
    shutil.rmtree(run / "checkpoint")  # as after a kill between two renames
    with (run / "metrics.jsonl").open("r+b") as file:
        file.truncate(len(file.read()) - 30)
    assert len(Result.load(run).rounds) == 5
    assert fedsparse("resume", run, "-q").exit_code == 0
    assert left(run) == left(whole)


def test_model_that_cannot_be_written_is_written_by_resume(make_resolved, tmp_path, monkeypatch):
    """All rounds are played and saved; only what comes after them is missing."""
    made = make_resolved("scaffold", federation__rounds=3)
    first = runner.run(made, tmp_path / "whole")
    write, calls = packing.save_tensors, []

    def full(path, tensors, metadata=None):
        calls.append(path)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedsparse.core.packing.save_tensors", full)
    with pytest.raises(DiskError, match=r"model\.safetensors: No space left .* MB are free .* goes on"):
        runner.run(made, tmp_path / "run")
    assert not any((tmp_path / "run").glob("*.safetensors*"))
    assert not (tmp_path / "run" / "summary.json").exists()
    assert not (tmp_path / "run" / "error.log").exists()
    monkeypatch.setattr("fedsparse.core.packing.save_tensors", write)
    summary = runner.run(made, tmp_path / "run", resume=True)
    assert left(tmp_path / "run") == left(tmp_path / "whole")
    assert {**summary, "wall_seconds": 0} == {**first, "wall_seconds": 0}
    with pytest.raises(Exception, match="has played all of its 3 rounds"):
        runner.run(made, tmp_path / "run", resume=True)


def test_full_disk(whole, small_disk):
    """A real one: it fills while the run goes on, and the run goes on when there is space."""
    run, filler = small_disk / "run", small_disk / "filler"
    size = sum(path.stat().st_size for path in (whole / "checkpoint").iterdir())
    fill(filler, room=int(2.5 * size))
    made = train(run)
    one_error(made, "No space left on device", "MB are free there", f"fedsparse resume {run} goes on")
    assert not (run / "checkpoint.new").exists()
    assert not (run / "error.log").exists()
    held = json.loads((run / "checkpoint" / "state.json").read_text())
    assert 1 <= held["round"] < 6
    again = fedsparse("resume", run, "-q")
    one_error(again, "No space left on device")
    assert json.loads((run / "checkpoint" / "state.json").read_text())["round"] >= held["round"]
    filler.unlink()
    assert fedsparse("resume", run, "-q").exit_code == 0
    assert left(run) == left(whole)


def test_not_even_the_configuration_fits(small_disk):
    fill(small_disk / "filler", room=0)
    run = small_disk / "run"
    made = train(run)
    one_error(made, "No space left on device")
    (small_disk / "filler").unlink()
    assert train(run, rounds=1).exit_code == 0  # nothing half-written is in the way


def test_read_only_disk(whole, small_disk):
    made = train(small_disk / "run", rounds=1)
    assert made.exit_code == 0
    shutil.copytree(whole, small_disk / "old")
    (small_disk / "old" / "summary.json").unlink()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    one_error(train(small_disk / "other"), "Read-only file system")
    for _ in range(2):  # the first try lets the folder go
        one_error(fedsparse("resume", small_disk / "old", "-q"), "Read-only file system")


@pytest.mark.skipif(os.geteuid() == 0 and shutil.which("setpriv") is None, reason="root writes everywhere")
def test_folder_without_the_right_to_write(make_resolved, tmp_path):
    code = (
        "from fedsparse.core.tracking import RunFolder\nfrom fedsparse.core.resolve import resolve\n"
        "from fedsparse.core.errors import RunError\nfrom pathlib import Path\nimport sys\n"
        "made = resolve('fedavg')\n"
        "try:\n    RunFolder(made, Path(sys.argv[1]) / 'run')\n"
        "except RunError as error:\n    print(error)"
    )
    place = Path(f"/tmp/fedsparse-{os.getpid()}")
    place.mkdir(mode=0o555)
    user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.geteuid() == 0 else []
    try:
        said = subprocess.run(
            [*user, sys.executable, "-c", code, place], capture_output=True, text=True, check=False
        )
    finally:
        shutil.rmtree(place)
    if "No module named" in said.stderr or "rror while finding" in said.stderr:
        pytest.skip("another user cannot import the package here")
    assert said.stdout.startswith(f"cannot write to {place}/run: "), said.stderr
    assert "Permission denied" in said.stdout


def test_folder_that_is_removed_while_the_run_goes_on(make_resolved, tmp_path):
    made, out, rounds = (
        make_resolved("fedavg", federation__rounds=9, output__checkpoint_every=4),
        tmp_path / "r",
        [],
    )

    def watch(report):
        rounds.append(report.metrics["round"])
        if len(rounds) == 2:
            shutil.rmtree(out)

    with pytest.raises(DiskError, match=r"metrics\.jsonl: the folder .*r is gone\. There is no checkpoint"):
        runner.run(made, out, watch=watch)
    assert rounds == [0, 1]
    assert not out.exists()


ABLATE = ["ablate", "--plugin", "pffdst", "--swap", "readjust=feddst", "--seeds", "0", "--quiet"]


def ablate(out, **options):
    sets = [word for setting in [*SETS, "federation.rounds=2"] for word in ("--set", setting)]
    return fedsparse(*ABLATE, *sets, "--out", out, **options)


def test_ablation_goes_on_wherever_the_disk_was_full(tmp_path, monkeypatch):
    out = tmp_path / "a"
    one_error(ablate(out, largest=100), "ablation.json: File too large", "MB are free there")
    write, model = packing.save_tensors, tmp_path / "a" / "base_seed0"
    with monkeypatch.context() as patched:
        patched.setattr("fedsparse.core.packing.save_tensors", lambda *given: os.write(-1, b""))
        made = ablate(out)
    assert made.exit_code == 1
    assert "base_seed0: cannot write" in " ".join(made.stderr.split())
    assert packing.save_tensors is write
    played = (model / "metrics.jsonl").read_text()
    (out / "ablation.csv.new").mkdir()  # in the way, as a disk that is full only at the end
    one_error(ablate(out), "ablation.csv: Is a directory")
    assert (model / "metrics.jsonl").read_text() == played  # its rounds were whole; none was played again
    (out / "ablation.csv.new").rmdir()
    assert ablate(out).exit_code == 0
    assert (out / "ablation.csv").read_text().count("\n") == 3


def test_export_onto_a_full_disk_leaves_nothing(whole, tmp_path):
    words = ["export", whole, "--out", tmp_path / "e", "--format"]
    for name in ("packed", "csr"):
        one_error(fedsparse(*words, name, largest=1000), f"model.{name}.safetensors: ", "File too large")
        assert not any((tmp_path / "e").iterdir())


def test_what_was_there_stays_until_the_new_file_is_whole(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")

    def half(fresh):
        fresh.write_text("ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(DiskError, match=r"cannot write .*a\.json: No space left on device; .* MB are free"):
        replace(path, half)
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert path.read_text() == "old"
    replace(path, lambda fresh: fresh.write_text("new"))
    assert path.read_text() == "new"


def test_seconds_of_a_resumed_run_are_those_of_all_its_sessions(make_resolved, tmp_path, monkeypatch):
    made = make_resolved("fedavg", federation__rounds=4, output__checkpoint_every=2)

    def end(report):
        if report.metrics["round"] == 1:
            raise KeyboardInterrupt

    first = runner.run(made, tmp_path / "r", watch=end)
    assert first["interrupted"]
    assert first["signal"] == "SIGINT"
    path = tmp_path / "r" / "metrics.jsonl"
    lines = [{**json.loads(line), "seconds": 1000.0} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert 2000 < runner.run(made, tmp_path / "r", resume=True)["wall_seconds"] < 2300


def test_a_clock_that_jumps_back_shows_nowhere(make_resolved, tmp_path, monkeypatch):
    now = iter(range(10**9, 0, -(10**5)))
    monkeypatch.setattr("time.time", lambda: float(next(now)))
    summary = runner.run(make_resolved("fedavg", federation__rounds=3), tmp_path / "r")
    assert 0 < summary["wall_seconds"] < 300
    assert all(0 <= line["seconds"] < 300 for line in Result.load(tmp_path / "r").rounds)
