"""The command line in a folder of its own, and runs made by hand."""

import json

import pytest
from click.testing import CliRunner

from fedsparse.cli.main import main

MB = 1_000_000


@pytest.fixture
def cli(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(main, [*map(str, arguments)])


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Writes a run: `accuracies` a round (None: not evaluated), a MB up and one down each, a GFLOP."""
    monkeypatch.chdir(tmp_path)

    def make(name, accuracies, *, plugin="alpha", seed=0, settings="", swaps=None, megabytes=1, clients=2):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.toml").write_text(
            f'seed = {seed}\n[method]\nplugin = "{plugin}"\n[output]\nroot = "{name}"\n{settings}'
        )
        lines = []
        for number, accuracy in enumerate(accuracies):
            line = {
                "round": number,
                "sparsity": 0.8,
                "frozen_fraction": 0.0,
                "mask_iou": 1.0,
                "regrown_fraction": 0.0,
                "upload_bytes": megabytes * MB,
                "download_bytes": megabytes * MB,
                "upload_bytes_total": (number + 1) * megabytes * MB,
                "download_bytes_total": (number + 1) * megabytes * MB,
                "flops_total": (number + 1) * 1e9,
                "clients": list(range(clients)),
            }
            if accuracy is not None:
                line |= {"test_accuracy": accuracy, "client_accuracy": accuracy / 2}
            lines.append(json.dumps(line) + "\n")
        (folder / "metrics.jsonl").write_text("".join(lines))
        summary = {"method": plugin, "swaps": swaps or {}, "interrupted": False}
        (folder / "summary.json").write_text(json.dumps(summary))
        return folder

    return make
