"""The command line in a folder of its own."""

import pytest
from click.testing import CliRunner

from fedsparse.cli.main import main


@pytest.fixture
def cli(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(main, [*map(str, arguments)])
