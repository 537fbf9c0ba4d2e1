"""Small runs that tests share."""

from dataclasses import replace

import pytest
import torch

from fedsparse.core import task, testing
from fedsparse.core.engine import Engine
from fedsparse.core.resolve import resolve

collect_ignore = ["third_party"]  # a package whose tests run where it is installed

TINY = testing.TINY | {"federation.rounds": 24, "federation.momentum": 0.9}


def toml(value):
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


def settings(**changes):
    """`--set` texts of the tiny task with changes; `federation__rounds=3` stands for federation.rounds."""
    merged = TINY | {name.replace("__", "."): value for name, value in changes.items()}
    return [f"{path}={toml(value)}" for path, value in merged.items() if value is not None]


def resolved(plugin="fedavg", swaps=(), extras=(), **changes):
    return resolve(plugin, swaps=swaps, extras=extras, sets=settings(**changes))


def engine(plugin="fedavg", swaps=(), extras=(), **changes):
    made = resolved(plugin, swaps, extras, **changes)
    return Engine(made, task.build(made.config))


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def make_engine():
    """Builds an engine on a tiny synthetic task: make_engine("pffdst", federation__rounds=8)."""
    return engine


@pytest.fixture(scope="session")
def make_resolved():
    """Resolves a configuration on the tiny synthetic task."""
    return resolved


class Watch:
    """Records what each client uploads, and every step of its training."""

    def __init__(self, engine):
        self.uploads, self.steps, self.downloads = [], [], []
        executor = engine.executor
        upload, step, download = executor.upload, executor.step, executor.download

        def watched_upload(plan, client, uploads):
            self.uploads.append((plan.clock.round, client))
            upload(plan, client, uploads)

        def watched_download(plan, *given):
            client = download(plan, *given)
            self.downloads.append((plan.state.params, plan.state.mask, replace(client)))
            return client

        def watched_step(expected, place=None, /, **offered):
            stepped = step(expected, place, **offered)
            self.steps.append((offered["clock"].round, stepped.params, offered["loss"].mask))
            return stepped

        executor.upload, executor.step, executor.download = watched_upload, watched_step, watched_download
        executor.replays = None  # a recording would not call the step


@pytest.fixture(scope="session")
def watch():
    """Watches an engine's clients: watch(engine).uploads, .steps, .downloads."""
    return Watch
