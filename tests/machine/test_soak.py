"""Thousands of rounds: memory, open files and threads stay what they were."""

import json
import os
import subprocess
import sys

import pytest

ROUNDS, SETTLED = 3000, 300

RUN = """
import gc, json, os, sys
from pathlib import Path
from fedsparse.core import runner
from fedsparse.core.resolve import resolve

SETS = [
    "federation.clients_per_round=5", "federation.local_epochs=1", f"federation.rounds={sys.argv[2]}",
    "output.evaluate_every=50", "output.checkpoint_every=100",
]
page, seen = os.sysconf("SC_PAGE_SIZE"), {}


def watch(report):
    number = report.metrics["round"] + 1
    if number in (int(sys.argv[3]), int(sys.argv[2])) or number % 300 == 0:
        gc.collect()
        pages = Path("/proc/self/statm").read_text().split()
        seen[number] = {
            "resident": int(pages[1]) * page,
            "own": (int(pages[1]) - int(pages[2])) * page,
            "files": len(os.listdir("/proc/self/fd")),
            "threads": len(os.listdir("/proc/self/task")),
            "seconds": report.metrics["seconds"],
        }


runner.run(resolve(sys.argv[1], sets=SETS), Path("run"), watch=watch)
print(json.dumps(seen))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads /proc")
@pytest.mark.parametrize("plugin", ["pffdst", "scaffold"])  # the second keeps a row for every client
def test_nothing_grows(plugin, tmp_path):
    words = [sys.executable, "-c", RUN, plugin, str(ROUNDS), str(SETTLED)]
    run = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    seen = {int(number): each for number, each in json.loads(run.stdout.splitlines()[-1]).items()}
    print(plugin, json.dumps(seen, indent=1))
    early, late = seen[SETTLED], seen[ROUNDS]
    # a machine short of memory drops pages of libraries and reads them again: those are not the run's own
    assert abs(late["own"] - early["own"]) <= 0.02 * early["resident"], seen
    assert late["resident"] <= 1.02 * early["resident"], seen
    assert late["files"] == early["files"]
    assert late["threads"] == early["threads"]
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "config.toml", "metrics.jsonl", "summary.json", "checkpoint", "checkpoint.old", "model.safetensors",
        "mask.safetensors", "clients.json", "masks",
    }  # fmt: skip
