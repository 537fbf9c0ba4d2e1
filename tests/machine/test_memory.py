"""Clients that do not fit into memory together train in smaller groups; nothing is counted twice."""

import pytest
import torch

from fedsparse.core import runner
from fedsparse.core.errors import RunError
from fedsparse.core.memory import out_of_memory
from fedsparse.core.results import Result

CHUNK = {"execution__executor": "vectorised", "federation__clients": 7, "federation__clients_per_round": 7}


def last(engine):
    report = list(engine.rounds(engine.start()))[-1]
    metrics = {name: value for name, value in report.metrics.items() if name != "seconds"}
    return report.state, metrics


def bounded(monkeypatch, most, kind=torch.OutOfMemoryError):
    """Training of more clients at once than this runs out of memory at its second step."""
    from fedsparse.core.execution.vectorised import Vectorised

    plain, tried = Vectorised.step_clients, []

    def step(self, plan, chunk, step, range_, batch, keys, clock, index, uploads):
        if index == 1:
            tried.append(len(chunk.clients))
            if len(chunk.clients) > most:
                raise kind("CUDA out of memory. Tried to allocate 20 MiB")
        plain(self, plan, chunk, step, range_, batch, keys, clock, index, uploads)

    monkeypatch.setattr(Vectorised, "step_clients", step)
    return tried


@pytest.mark.parametrize("plugin", ["pffdst", "feddst", "scaffold", "rigl", "flash"])
def test_a_chunk_is_halved_and_the_round_is_that_of_smaller_chunks(make_engine, monkeypatch, plugin):
    """Server scores, client rows, client masks: each must be that of clients which trained once."""
    changes = {"federation__rounds": 3, "ledger__encode": True, **CHUNK}
    if plugin in ("pffdst", "feddst", "rigl"):
        changes["method__readjust__period"] = 1
    state, metrics = last(make_engine(plugin, execution__chunk=1, **changes))
    tried = bounded(monkeypatch, 1)
    engine, said = make_engine(plugin, execution__chunk=6, **changes), []
    engine.executor.say = said.append
    again, others = last(engine)
    assert tried[:3] == [6, 3, 1]
    assert set(tried[3:]) == {1}
    assert others == metrics
    for name, value in state.params.items():
        assert torch.equal(again.params[name], value)
    for name, value in state.mask.items():
        assert torch.equal(again.mask[name], value)
    assert again.rows.keys() == state.rows.keys()
    assert [text.partition(" do not fit")[0] for text in said] == ["6 clients at once", "3 clients at once"]
    assert "1 at once from now on" in said[1]


@pytest.mark.parametrize(("plugin", "swaps"), [("scaffold", ()), ("feddst", ("aggregate=median",))])
def test_halving_beside_everything_else(make_engine, monkeypatch, plugin, swaps):
    """Noise, 2-byte values, decoded messages, lost clients, one sampled twice: as in smaller chunks."""
    noise = "method__extras__GaussianMechanism__"
    changes = {
        **CHUNK,
        "federation__rounds": 3,
        "federation__replacement": True,
        "ledger__encode": True,
        "ledger__values": "float16",
        "faults__upload_failure": 0.3,
        "faults__non_finite": "drop",
        f"{noise}accounting": "off",
        f"{noise}noise_multiplier": 0.1,
    }
    state, metrics = last(make_engine(plugin, swaps, ("privacy",), execution__chunk=1, **changes))
    tried = bounded(monkeypatch, 1)
    again, others = last(make_engine(plugin, swaps, ("privacy",), execution__chunk=6, **changes))
    assert max(tried) > 1
    assert metrics["lost"]
    assert others == metrics
    assert all(torch.equal(again.params[name], value) for name, value in state.params.items())
    assert again.rows.keys() == state.rows.keys()


def test_one_client_that_does_not_fit_ends_the_run_with_what_to_change(make_resolved, tmp_path, monkeypatch):
    bounded(monkeypatch, 0)
    made, said = make_resolved("fedavg", **CHUNK), []
    with pytest.raises(
        RunError, match=r"one client alone does not fit .* federation\.batch_size \(now \d+\)"
    ):
        runner.run(made, tmp_path / "r", say=said.append)
    assert len(said) == 2
    assert Result.load(tmp_path / "r").rounds == []


def test_other_errors_are_not_taken_for_memory(make_engine, monkeypatch):
    tried = bounded(monkeypatch, 1, kind=RuntimeError)
    with pytest.raises(RuntimeError, match="Tried to allocate"):
        last(make_engine("fedavg", **CHUNK))
    assert len(tried) == 1


def test_a_hook_that_runs_out_of_memory_counts_too(make_engine, monkeypatch):
    """Hooks' own errors come as a PluginError."""
    engine = make_engine("fedavg", execution__chunk=4, federation__rounds=1, **CHUNK)
    step = engine.executor.step

    def small(expected, place=None, /, **offered):
        if torch._C._functorch.maybe_current_level() is None:
            return step(expected, place, **offered)
        if engine.executor.size > 2:
            raise step.__class__(step.where, broken, ())(expected)
        return step(expected, place, **offered)

    def broken():
        raise torch.OutOfMemoryError("CUDA out of memory")

    engine.executor.step = small
    last(engine)
    assert engine.executor.size == 2


def test_sequential_says_what_to_change(make_engine):
    engine = make_engine("fedavg", execution__executor="sequential")

    def full(*_, **__):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: not enough memory")

    engine.executor.step = full
    with pytest.raises(RunError, match=r"one client alone does not fit into that of cpu"):
        last(engine)


@pytest.mark.parametrize("clients", [[1, 2, 3, 4, 5, 6, 7], [4, 4, 4, 2, 2, 1], [3, 3, 5, 5]])
def test_a_client_that_was_sampled_twice_trains_twice_after_halving(make_engine, monkeypatch, clients):
    from fedsparse.core.execution import vectorised

    engine, got = make_engine("fedavg", execution__chunk=4, federation__clients=8, **{
        "execution__executor": "vectorised", "federation__clients_per_round": 7,
    }), []  # fmt: skip

    def fitting(self, plan, numbers, uploads):
        if len(numbers) > 1:
            self.size = len(numbers) // 2
            return False
        got.extend(numbers)
        return True

    monkeypatch.setattr(vectorised.Vectorised, "fits", fitting)
    plan = engine.plan(engine.start(), engine.budget(engine.clock(0)), engine.clock(0))
    engine.executor.train_all(plan, clients, None)
    assert sorted(got) == sorted(clients)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
    ],
)
def test_ways_in_which_memory_runs_out(error):
    assert out_of_memory(error)
    wrapped = RunError("a hook")
    wrapped.__cause__ = error
    assert out_of_memory(wrapped)
    assert not out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
