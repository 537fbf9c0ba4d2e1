"""Runs on a device that is not the CPU, which the CPU plays: placement of tensors, and waits of the host.

It stands in for a GPU where there is none: it shows tensors that stayed behind, reads of values that stop the
host, and operations whose number grows with the clients. Kernels, streams and captured graphs it does not.
"""

import pytest
import torch
from torch.utils._pytree import tree_leaves

from fedsparse.core import optim, rng, task
from fedsparse.core.engine import Engine
from fedsparse.core.ledger import on_host
from fedsparse.core.registry import Registry
from fedsparse.core.selection import kth_largest
from fedsparse.core.state import moved_to, row_on

from . import simulated

pytestmark = pytest.mark.skipif(
    not simulated.available, reason="this PyTorch has no backends written in Python"
)

NAMES = Registry().names()
KINDS = ("sequential", "vectorised", "graph")
OWN_MASKS = ("fedsparsify", "flash", "sparsyfed", "topk", "zerofl")
"""Methods whose clients send masks of their own in any round."""
IMAGES = {"task__dataset__channels": 3, "task__dataset__height": 16, "task__dataset__width": 16}
IMAGES |= {"task__model__use": "cnn-dropout", "task__model__hidden": None, "task__augment": "crop-flip"}


@pytest.fixture
def device():
    with simulated.simulated() as device:
        yield device


@pytest.fixture
def make_there(make_resolved, monkeypatch, device):
    """Builds an engine of the tiny task on the second device."""

    def make(plugin, **changes):
        changes = {"federation__rounds": 4, "federation__momentum": 0.0} | changes
        made = make_resolved(plugin, **changes)
        monkeypatch.setattr(task, "choose_device", lambda name: device)
        engine = Engine(made, task.build(made.config))
        monkeypatch.undo()
        return engine, Engine(made, task.build(made.config))

    return make


def play(engine):
    return list(engine.rounds(engine.start()))


def watched(engine):
    """Counts what the host waits for within steps."""
    step, found = engine.executor.step, simulated.Counter()

    class Step:
        function, takes = step.function, step.takes

        def __call__(self, *args, **offered):
            before = simulated.waits.copy()
            stepped = step(*args, **offered)
            found.update(simulated.waits - before)
            return stepped

    engine.executor.step = Step()
    return found


def assert_same(there, here, atol):
    for name, value in here.state.params.items():
        assert there.state.params[name].device.type == "simulated"
        torch.testing.assert_close(there.state.params[name].cpu(), value, atol=atol, rtol=0)
    assert all(torch.equal(there.state.mask[name].cpu(), mask) for name, mask in here.state.mask.items())
    for name in ("upload_bytes_total", "download_bytes_total", "flops_total", "mask_changed", "sparsity"):
        assert there.metrics[name] == here.metrics[name]
    assert there.metrics["test_accuracy"] == here.metrics["test_accuracy"]


@pytest.mark.parametrize("kind", ["vectorised", pytest.param("sequential", marks=pytest.mark.slow)])
@pytest.mark.parametrize("plugin", NAMES)
def test_every_method_runs_there_as_on_the_cpu_and_no_step_waits(make_there, plugin, kind):
    """The same kernels compute both; only fourth roots on a CPU take another path (1e-6)."""
    there, here = make_there(plugin, execution__executor=kind)
    waits = watched(there)
    assert_same(play(there)[-1], play(here)[-1], atol=1e-6)
    assert not +waits


@pytest.mark.slow
@pytest.mark.parametrize("plugin", NAMES)
def test_every_method_runs_there_in_lanes_and_with_encoded_messages(make_there, plugin):
    there, here = make_there(plugin, execution__executor="graph", ledger__encode=True)
    waits = watched(there)
    assert_same(play(there)[-1], play(here)[-1], atol=1e-6)
    assert not +waits


@pytest.mark.parametrize("kind", KINDS)
def test_convolutions_dropout_and_augmentation_run_there(make_there, kind):
    """Convolutions take other kernels there: 1e-5 after two rounds."""
    changes = {"execution__executor": kind, "federation__rounds": 2, **IMAGES}
    there, here = make_there("pffdst", **changes)
    waits = watched(there)
    found, expected = play(there)[-1].state.params, play(here)[-1].state.params
    for name, value in expected.items():
        torch.testing.assert_close(found[name].cpu(), value, atol=1e-5, rtol=0)
    assert not +waits


def cost(make_there, plugin, **changes):
    """Waits and launches of a run's fourth round."""
    engine, _ = make_there(plugin, output__evaluate_every=4, federation__rounds=8, **changes)
    rounds = engine.rounds(engine.start())
    for _ in range(4):
        next(rounds)
    simulated.waits.clear()
    simulated.launches.clear()
    next(rounds)
    return simulated.waits.total(), simulated.launches.total()


MORE = {"federation__clients_per_round": 6, "federation__local_epochs": 4, "federation__batch_size": 8}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "plugin", ["fedavg", *(pytest.param(name, marks=pytest.mark.slow) for name in ("pffdst", "fedsparsify"))]
)
def test_the_host_waits_as_often_for_few_clients_and_steps_as_for_many(make_there, plugin, kind):
    few, _ = cost(make_there, plugin, execution__executor=kind)
    many, _ = cost(make_there, plugin, execution__executor=kind, **MORE)
    assert 0 < many <= few


@pytest.mark.parametrize("plugin", ["fedavg", "topk", "sparsyfed"])
def test_stacked_clients_cost_the_host_what_one_does(make_there, plugin):
    """Launches too, whether or not they send masks of their own; the round is of two epochs."""
    changes = {"execution__executor": "vectorised", "task__dataset__train": 240, "federation__clients": 12}
    changes["task__dataset__seed"] = 1  # in both rounds the mask does the same, which shows in the waits
    few = cost(make_there, plugin, federation__clients_per_round=3, **changes)
    many = cost(make_there, plugin, federation__clients_per_round=12, **changes)
    assert many[0] <= few[0]
    # a mask that moved or did not makes another round's bookkeeping: by far less than a client's
    assert many[1] < few[1] * 1.1


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_an_update_of_stacked_clients_launches_what_that_of_one_does(device, momentum):
    drawn = torch.Generator().manual_seed(1)
    shapes = {f"w{i}": (4, 3 + i) for i in range(6)}
    make = lambda: {n: torch.randn(5, *shape, generator=drawn) for n, shape in shapes.items()}  # noqa: E731
    params, grads, velocity = make(), make(), make()
    mask = {"w2": torch.rand(4, 5, generator=drawn) < 0.5}

    def update(params, grads, velocity, mask):
        return optim.sgd(params, grads, {"momentum": velocity}, mask, 0.1, momentum, 0.01, nesterov=True)

    def launched(one, *tensors):
        simulated.launches.clear()
        made = one(*(moved_to(t, device) for t in tensors), moved_to(mask, device))
        return moved_to(made[0], "cpu"), moved_to(made[1], "cpu"), simulated.launches.total()

    every = (params, grads, velocity)
    *stacked, together = launched(torch.func.vmap(update, in_dims=(0, 0, 0, None)), *every)
    for at in range(5):
        *own, alone = launched(update, *({n: t[at] for n, t in group.items()} for group in every))
        assert together == alone
        for found, expected in zip(stacked, own, strict=True):
            leaves = zip(tree_leaves(found), tree_leaves(expected), strict=True)
            assert all(torch.equal(one[at], other) for one, other in leaves)


SMALL_CNN = {"task__model__use": "cnn", "task__model__hidden": None, "task__dataset__train": 1600}
SMALL_CNN |= {"task__dataset__channels": 3, "task__dataset__height": 12, "task__dataset__width": 12}
SMALL_CNN |= {"task__dataset__seed": 1}  # in the round that counts the mask moves, which is one wait more
SMALL_CNN |= {"federation__clients": 40, "federation__local_epochs": 1, "federation__batch_size": 10}


@pytest.mark.slow
def test_the_readmes_counts_of_waits(make_there):
    """In the fourth round of a small CNN; and what each client more costs that is not stacked."""

    def waits(plugin, kind, clients):
        changes = {"execution__executor": kind, "federation__clients_per_round": clients}
        engine, _ = make_there(plugin, output__evaluate_every=50, federation__rounds=6, **SMALL_CNN | changes)
        rounds = engine.rounds(engine.start())
        for _ in range(3):
            next(rounds)
        simulated.waits.clear()
        next(rounds)
        return simulated.waits.total()

    counted = {plugin: waits(plugin, "vectorised", 10) for plugin in ("fedavg", "pffdst", "topk")}
    assert counted == {"fedavg": 13, "pffdst": 26, "topk": 17}
    assert waits("topk", "sequential", 20) - waits("topk", "sequential", 10) == 3 * 10


def test_a_tensor_that_stayed_behind_is_found(device):
    there = torch.ones(3, device=device)
    with pytest.raises(AssertionError, match="tensors of the CPU"):
        there + torch.ones(3)
    assert (there + 1.0).sum().item() == 6.0
    assert simulated.waits["_local_scalar_dense"] == 1


def test_masks_come_to_the_host_together_and_one_that_is_there_stays(device):
    here, there = torch.rand(3, 4) < 0.5, {name: torch.rand(5, 2) < 0.5 for name in "ab"}
    moved = on_host({"here": here} | {name: mask.to(device) for name, mask in there.items()})
    assert list(moved) == ["here", "a", "b"]
    assert moved["here"] is here
    assert all(torch.equal(moved[name], mask) for name, mask in there.items())
    assert simulated.waits["a copy"] == 2 + 1  # there, and back


def test_keys_are_the_cpus_bit_for_bit(device):
    assert (
        rng.bits(rng.key(1, "a", device=device), (50,)).tolist() == rng.bits(rng.key(1, "a"), (50,)).tolist()
    )
    assert simulated.waits.total() == 1  # the reading alone


def test_a_clients_row_crosses_in_one_transfer_a_type(device):
    values = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4), "none": torch.ones(0, 2)}
    row = {"momentum": values, "steps": torch.tensor(3), "seen": torch.tensor([True, False]), "n": 1, "x": {}}
    simulated.waits.clear()
    there = row_on(device, row)
    assert simulated.waits.total() == 3
    assert {t.device for t in tree_leaves(there) if isinstance(t, torch.Tensor)} == {device}
    back = row_on("cpu", there, copy=True)
    assert simulated.waits.total() == 6
    assert back.keys() == row.keys()
    assert (back["n"], back["x"]) == (1, {})
    for name, value in (values | {"steps": row["steps"], "seen": row["seen"]}).items():
        assert torch.equal((back["momentum"] | back)[name], value)
    owned = [
        t.untyped_storage().data_ptr() for t in tree_leaves(back) if isinstance(t, torch.Tensor) and t.numel()
    ]
    assert len(set(owned)) == 4


def test_a_row_keeps_its_order_in_memory(device):
    last = torch.arange(24.0).view(1, 2, 3, 4).to(memory_format=torch.channels_last)
    back = row_on("cpu", row_on(device, {"v": last}), copy=True)["v"]
    assert torch.equal(back, last)
    assert back.stride() == last.stride()


@pytest.mark.parametrize("size", [100, 40_000])
def test_selection_equals_the_cpus(device, size):
    torch.manual_seed(0)
    values = torch.randn(3, size)
    there = moved_to(values, device)
    for k in (1, 7, size):
        assert kth_largest(there[0], k).cpu() == kth_largest(values[0], k)
        stacked = torch.func.vmap(lambda row, k=k: kth_largest(row, k))
        assert torch.equal(stacked(there).cpu(), stacked(values))
