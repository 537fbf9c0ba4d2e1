"""A run that is killed at any moment and resumed ends as if nothing had happened."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedsparse.core.results import Result

CLI = [sys.executable, "-c", "from fedsparse.cli.main import main; main()"]
SETS = ["federation.rounds=30", "output.checkpoint_every=1", "output.evaluate_every=3"]
KILLS = 20


def command(*arguments):
    return [*CLI, *map(str, arguments)]


def train(plugin, out):
    sets = [argument for setting in SETS for argument in ("--set", setting)]
    return command("run", "--plugin", plugin, *sets, "--quiet", "--out", out)


def started(arguments):
    return subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def left(folder):
    """What a run leaves that does not depend on how long it took."""
    rounds = [{**line, "seconds": 0} for line in Result.load(folder).rounds]
    files = ["model.safetensors", "mask.safetensors", "clients.json", *sorted((folder / "masks").iterdir())]
    return rounds, [(Path(file).name, (folder / file).read_bytes()) for file in files]


@pytest.mark.slow
@pytest.mark.parametrize("plugin", ["pffdst", "scaffold"])  # the second keeps rows of clients
def test_killed_at_random_moments(plugin, tmp_path):
    begun = time.monotonic()
    subprocess.run(train(plugin, tmp_path / "whole"), check=True, capture_output=True)
    lasts, expected = time.monotonic() - begun, left(tmp_path / "whole")
    chance, killed = random.Random(7), 0
    for number in range(KILLS // 2):
        folder = tmp_path / str(number)
        process = started(train(plugin, folder))
        for _ in range(2):  # the second time while it goes on
            time.sleep(chance.uniform(0.3, 1.0) * lasts)
            process.kill()
            process.communicate()
            killed += process.returncode == -signal.SIGKILL
            process = started(command("resume", folder, "--quiet"))
        said = process.communicate()[1].decode()
        if process.returncode and not (folder / "checkpoint").exists():
            assert "before its first checkpoint" in said or "does not exist" in said
            continue
        assert process.returncode == 0 or "has played all" in said, said
        assert left(folder) == expected, f"kill {number} with seed 7"
    assert killed >= KILLS // 4
