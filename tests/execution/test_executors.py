"""Executors are interchangeable: what clients compute does not depend on how they are run."""

import contextlib
import copy
import dataclasses
import inspect
import shutil

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import dropout, dropout2d

from fedsparse.core import functional, optim, rng
from fedsparse.core.dropout import KeyedDropout
from fedsparse.core.errors import ConfigError, RunError
from fedsparse.core.execution.choose import unstackable
from fedsparse.core.execution.graph import WARM_UPS, CaptureError, Lane
from fedsparse.core.execution.step import Given
from fedsparse.core.execution.training import apart
from fedsparse.core.execution.vectorised import _copies
from fedsparse.core.hookspecs import hookimpl
from fedsparse.core.registry import Registry
from fedsparse.core.state import Batch, Carry, Stepped
from fedsparse.plugins.fedavg import MaskedSgd

IMAGES = {
    "task__dataset__channels": 3,
    "task__dataset__height": 32,
    "task__dataset__width": 32,
    "task__dataset__train": 90,
    "task__partition__use": "dirichlet",
    "federation__clients": 4,
    "federation__rounds": 2,
    "task__model__hidden": None,
}


def last(engine):
    return list(engine.rounds(engine.start()))[-1]


def both(make_engine, plugin="pffdst", other="vectorised", **changes):
    """The last reports of the sequential and of another executor."""
    changes = {"execution__chunk": 2, **changes}
    kinds = ("sequential", other)
    return [last(make_engine(plugin, **{**changes, "execution__executor": kind})) for kind in kinds]


def assert_same(one, other, atol=1e-6):
    """Equal but for rounding: batched kernels sum in another order, by 1e-7 a step and few steps here."""
    for name, value in one.state.params.items():
        torch.testing.assert_close(other.state.params[name], value, atol=atol, rtol=1e-5)
    for name, value in one.state.buffers.items():
        torch.testing.assert_close(other.state.buffers[name], value, atol=atol, rtol=1e-5)
    assert all(torch.equal(other.state.mask[name], mask) for name, mask in one.state.mask.items())
    for name in ("upload_bytes_total", "download_bytes_total", "flops_total", "samples"):
        assert one.metrics[name] == other.metrics[name]
    assert other.metrics["train_loss"] == pytest.approx(one.metrics["train_loss"], rel=1e-5)


@pytest.mark.parametrize("other", ["vectorised", "graph"])
@pytest.mark.parametrize("plugin", Registry().names())
def test_every_method_is_the_same_in_both(make_engine, plugin, other):
    """Clients of several sizes, in chunks; masks of clients and server move in every round."""
    changes = {"method__readjust__period": 1} if plugin in ("feddst", "pffdst") else {}
    changes |= {"task__partition__use": "dirichlet", "federation__rounds": 3, "federation__local_epochs": 2}
    assert_same(*both(make_engine, plugin, other, **changes))


@pytest.mark.parametrize("other", ["vectorised", "graph"])
def test_dropout_draws_the_same_in_both(make_engine, other):
    changes = IMAGES | {"task__model__use": "cifar-cnn", "federation__learning_rate": 1e-3}
    assert_same(*both(make_engine, "feddst", other, method__readjust__period=1, **changes))


@pytest.mark.slow
@pytest.mark.parametrize("other", ["vectorised", "graph"])
def test_batch_normalisation_sees_whole_minibatches(make_engine, other):
    """Clients of one step have minibatches of several sizes, none of which may be filled up."""
    changes = IMAGES | {"task__model__use": "resnet18", "federation__rounds": 1, "task__dataset__train": 24}
    changes |= {"federation__batch_size": 4, "task__partition__use": "iid", "federation__clients": 5}
    # small steps: statistics of 1 to 4 samples would amplify rounding from step to step
    changes |= {"federation__learning_rate": 1e-4, "federation__local_epochs": 1}
    reports = both(make_engine, other=other, **changes)
    assert reports[0].state.buffers
    assert_same(*reports)


@pytest.mark.parametrize("other", ["vectorised", "graph"])
def test_a_client_that_is_sampled_twice_trains_twice_in_a_row(make_engine, other):
    changes = {"federation__replacement": True, "federation__clients": 3, "federation__rounds": 4}
    reports = both(make_engine, "scaffold", other, federation__clients_per_round=3, **changes)
    assert len(set(reports[0].metrics["clients"])) < 3 or reports[0].metrics["samples"] > 0
    assert_same(*reports)


@pytest.mark.parametrize("other", ["vectorised", "graph"])
def test_frozen_biases_stay_where_clients_move_their_masks(make_engine, other):
    """What has no mask is frozen for all clients of a chunk, also where it is as long as they are many."""
    changes = {"method__readjust__use": "feddst", "method__readjust__period": 1}
    changes |= {"method__readjust__annealing": "constant", "federation__rounds": 10}
    changes |= {"method__freeze_policy__threshold": 0.5, "method__freeze_policy__period": 2}
    changes |= {"method__freeze_policy__alpha": 0.6, "federation__clients_per_round": 4}
    changes |= {"task__model__use": "mlp", "task__model__hidden": [4], "execution__chunk": 4}
    engines = [make_engine("apf", execution__executor=kind, **changes) for kind in ("sequential", other)]
    one, two = (list(engine.rounds(engine.start())) for engine in engines)
    unmasked = (f for report in one[:-1] for name, f in report.state.frozen.items() if "bias" in name)
    assert any(frozen.any() for frozen in unmasked)
    assert_same(one[-1], two[-1])


@pytest.mark.parametrize("other", ["vectorised", "graph"])
@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
def test_chunks_of_any_size_give_the_same(make_engine, chunk, other):
    assert_same(*both(make_engine, "feddst", other, execution__chunk=chunk, federation__rounds=4))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(24.0).view(2, 3, 2, 2).to(memory_format=torch.channels_last),
        torch.arange(24.0).view(2, 3, 2, 2)[..., 0],
        torch.arange(24.0).view(4, 6)[:, ::2],
        torch.arange(6.0)[:, None].expand(6, 2),
        torch.tensor(3.0),
    ],
)
def test_clients_of_a_stack_have_memory_of_their_own(tensor):
    """Also where what they download lies in memory with gaps, or with entries of one place."""
    stack = _copies(tensor, 3)
    assert stack.shape == (3, *tensor.shape)
    stack[1] += 1
    for at, expected in enumerate((tensor, tensor + 1, tensor)):
        assert torch.equal(stack[at], expected)


def test_client_order_and_chunks_do_not_show_in_the_sums(make_engine):
    """Sums are float64: float32 results agree to the bit when the same values come in another order."""
    results = []
    for backwards in (False, True):
        engine = make_engine("feddst", federation__rounds=1, federation__clients_per_round=6)
        train = engine.executor.train_all

        def reordered(plan, clients, uploads, train=train, backwards=backwards):
            train(plan, clients[::-1] if backwards else clients, uploads)

        engine.executor.train_all = reordered
        results.append(last(engine).state.params)
    assert all(torch.equal(results[0][name], value) for name, value in results[1].items())


NOISY = """
import torch
from torch import nn

class Noisy(nn.Sequential):
    def forward(self, x):
        x = super().forward(x)
        return x + 0.1 * torch.randn_like(x)

def build(input_shape, classes):
    return Noisy(nn.Flatten(), nn.Linear(36, classes))
"""


@pytest.mark.parametrize("kind", ["sequential", "vectorised"])
def test_draws_of_other_layers_repeat(make_engine, tmp_path, monkeypatch, kind):
    (tmp_path / f"noisy_{kind}.py").write_text(NOISY)
    monkeypatch.syspath_prepend(tmp_path)
    changes = {"task__model__use": f"noisy_{kind}:build", "task__model__hidden": None}
    losses = []
    for seed in (0, 1):
        torch.manual_seed(seed)  # the process's own generator has no say
        engine = make_engine(execution__executor=kind, federation__rounds=2, **changes)
        losses.append(last(engine).metrics["train_loss"])
    assert losses[0] == losses[1]


def test_channels_last_changes_nothing_but_the_order_in_memory(make_engine):
    changes = IMAGES | {"task__model__use": "lenet", "sparsity__target": 0.5}
    reports = [
        last(make_engine("scaffold", execution__channels_last=setting, **changes))
        for setting in ("on", "off")
    ]
    assert_same(*reports)
    assert all(p.is_contiguous() for p in reports[0].state.params.values())


def test_bfloat16_computes_roughly_and_keeps_float32_parameters(make_engine):
    reports = [
        last(make_engine(execution__precision=precision, federation__rounds=2))
        for precision in ("float32", "bfloat16")
    ]
    losses = [report.metrics["train_loss"] for report in reports]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)  # 8 bits of mantissa
    assert all(p.dtype == torch.float32 for p in reports[1].state.params.values())


@pytest.mark.parametrize("function", [dropout, dropout2d])
def test_keyed_dropout_is_dropout(function):
    inputs = torch.ones(40, 30, 5, 5)
    with KeyedDropout(rng.key(0)):
        out, again, off = function(inputs, 0.3), function(inputs, 0.3), function(inputs, 0.3, False)
        everything, nothing = function(inputs, 0.0), function(inputs, 1.0)
    values = out.unique()
    torch.testing.assert_close(values, torch.tensor([0.0, 1 / 0.7]))
    # 1,200 channels or 30,000 entries: 5 standard deviations
    kept = (out != 0).float().mean()
    assert abs(kept - 0.7) < 5 * (0.21 / (1200 if function is dropout2d else 30000)) ** 0.5
    if function is dropout2d:
        assert (out == out[:, :, :1, :1]).all()
    assert not torch.equal(out, again)  # another stream each call
    assert torch.equal(off, inputs)
    assert torch.equal(everything, inputs)
    assert not nothing.any()
    with KeyedDropout(rng.key(0)):
        assert torch.equal(out, function(inputs, 0.3))


@pytest.mark.parametrize("p", [0.1, 0.25, 0.4])
def test_keyed_dropout_of_half_types_rounds_once(p):
    """A factor that was rounded to 8 bits itself would scale every entry by up to 0.2 % too much."""
    inputs = torch.randn(2000, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    with KeyedDropout(rng.key(0)):
        out = dropout(inputs, p)
    scaled = (inputs.float() * (1 / (1 - p))).to(torch.bfloat16)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, torch.where(out == 0, 0.0, scaled))


def test_keyed_dropout_under_vmap_equals_the_loop():
    inputs, keys = torch.randn(3, 4, 5), torch.stack([rng.key(k) for k in range(3)])

    def drop(x, key):
        with KeyedDropout(key):
            return dropout(x, 0.5)

    stacked = torch.func.vmap(drop)(inputs, keys)
    assert all(torch.equal(stacked[k], drop(inputs[k], keys[k])) for k in range(3))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)
        self.two.weight = self.one.weight
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x):
        return self.norm(self.two(self.one(x)))


def test_a_call_with_other_tensors_equals_functional_call_and_leaves_the_module_alone():
    model = Tied()
    before = copy.deepcopy(model.state_dict())
    tensors = {name: t + 1 for name, t in [*model.named_parameters(), *model.named_buffers()]}
    x = torch.randn(5, 3)
    expected = functional_call(model, {n: t.clone() for n, t in tensors.items()}, (x,))
    assert torch.equal(functional.call(model, {n: t.clone() for n, t in tensors.items()}, x), expected)
    with pytest.raises(RuntimeError):
        functional.call(model, tensors, torch.randn(5, 4))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.two.weight is model.one.weight


def test_steps_of_large_models_are_not_recorded(make_engine, monkeypatch):
    assert make_engine().executor.replays is not None
    assert make_engine(execution__replay=False).executor.replays is None
    monkeypatch.setattr("fedsparse.core.execution.choose.SMALL", 100)
    assert make_engine().executor.replays is None


def test_auto_goes_by_the_size_of_a_step_and_says_why(make_engine):
    engine = make_engine(task__model__hidden=[400, 400], execution__executor="auto")
    assert type(engine.executor).__name__ == "Sequential"
    assert engine.why == "its steps are large enough for a CPU one after another"
    engine = make_engine(task__model__hidden=[20], execution__chunk=2, execution__executor="auto")
    assert type(engine.executor).__name__ == "Vectorised"
    assert engine.why == "its steps are too small for a CPU one after another; 2 of 3 clients at once"
    engine = make_engine(execution__executor="vectorised", execution__chunk=2)
    assert engine.why == "as set; 2 of 3 clients at once"
    assert make_engine(execution__executor="vectorised").executor.size == 3


MODELS = """
import torch
from torch import nn

class Branching(nn.Module):
    def __init__(self, shape, classes):
        super().__init__()
        self.layer = nn.Linear(shape[0] * shape[1] * shape[2], classes)

    def forward(self, x):
        x = self.layer(x.flatten(1))
        return x if x.sum() > 0 else 2 * x

def branching(input_shape, classes):
    return Branching(input_shape, classes)
"""


def test_auto_leaves_models_that_cannot_be_stacked_to_the_loop(make_engine, tmp_path, monkeypatch):
    (tmp_path / "my_models.py").write_text(MODELS)
    monkeypatch.syspath_prepend(tmp_path)
    changes = {"task__model__use": "my_models:branching", "task__model__hidden": None}
    engine = make_engine(execution__executor="auto", **changes)
    assert type(engine.executor).__name__ == "Sequential"
    assert engine.why.startswith("its model cannot be stacked: ")
    assert "data-dependent" in engine.why
    last(engine)
    with pytest.raises(ConfigError, match=r"'vectorised' cannot stack this model: .*data-dependent"):
        make_engine(execution__executor="vectorised", **changes)


def test_normalised_models_can_be_stacked(make_engine):
    engine = make_engine(execution__executor="sequential", **IMAGES, task__model__use="resnet18")
    assert unstackable(engine.loss, engine.task) == ""


def test_a_graph_says_what_it_is_on_a_cpu(make_engine):
    engine = make_engine(execution__executor="graph", federation__clients=9, federation__clients_per_round=8)
    assert engine.executor.size == 4
    assert engine.why == (
        "as set; a CPU has no graphs and runs the steps as they are; 4 of 8 clients at once"
    )


def test_a_graph_holds_the_rate_that_a_schedule_moves(make_engine):
    """Numbers are constants of a captured step: another rate needs another capture."""
    changes = {"federation__learning_rate_schedule": "exponential", "federation__learning_rate_final": 1e-3}
    assert_same(*both(make_engine, "feddst", "graph", federation__rounds=4, **changes))


def test_a_client_with_one_short_minibatch_needs_no_capture_of_its_own(make_engine, monkeypatch):
    """SparsyFed fills no minibatch up, so that a short one runs as it is, beside the graph."""
    loaded, load = [], Lane.load

    def watched(self, step, plain, given, constants):
        loaded.append(tuple(given.batch.inputs.shape))
        load(self, step, plain, given, constants)

    monkeypatch.setattr(Lane, "load", watched)
    everybody = {"federation__clients": 6, "federation__clients_per_round": 6, "federation__batch_size": 16}
    changes = {"task__partition__use": "dirichlet", "federation__rounds": 2, **everybody}
    engine = make_engine("sparsyfed", execution__executor="graph", **changes)
    sizes = [len(engine.task.partition.train_of(c)) for c in range(engine.task.partition.clients)]
    assert min(sizes) < 16 < max(sizes)
    list(engine.rounds(engine.start()))
    assert len(loaded) == 6 * 2 * engine.task.federation.local_epochs
    assert {shape[0] for shape in loaded} == {16}


class Renaming(MaskedSgd):
    """Forgets the momentum that it was given."""

    @hookimpl
    def local_step(self, loss, params, carry, batch, trainable, lr, momentum, weight_decay):
        value, grads, carry = loss.value_and_grad(params, carry, batch)
        params, _ = optim.sgd(params, grads, {}, trainable, lr)
        return Stepped(params, Carry(carry.buffers, {}), {"loss": value})


def test_a_graph_needs_the_names_that_a_step_was_given(make_engine):
    engine = make_engine("fedavg", execution__executor="graph", federation__momentum=0.9)
    engine.executor.step = dataclasses.replace(
        engine.executor.step, function=Renaming().local_step, takes=tuple(engine.executor.step.takes)
    )
    with pytest.raises(RunError, match=r"the step returned \[\] where it was given \['momentum'\]"):
        last(engine)


class Remembering(MaskedSgd):
    """Heavy ball that keeps the last parameters: it returns what it was given under another name."""

    @hookimpl
    def client_init(self, params):
        return {"previous": dict(params)}

    @hookimpl
    def local_step(self, loss, params, carry, batch, lr):
        value, grads, carry = loss.value_and_grad(params, carry, batch)
        before = carry.state["previous"]
        moved = {n: p - lr * grads[n] + 0.5 * (p - before[n]) for n, p in params.items()}
        return Stepped(moved, Carry(carry.buffers, {"previous": dict(params)}), {"loss": value})


class Overwriting(MaskedSgd):
    """Writes into its parameters."""

    @hookimpl
    def local_step(self, loss, params, carry, batch, lr):
        value, grads, carry = loss.value_and_grad(params, carry, batch)
        for name, p in params.items():
            p.sub_(lr * grads[name])
        return Stepped(params, carry, {"loss": value})


def with_step(engine, part):
    hooks = engine.hooks.found
    for name in ("client_init", "local_step"):
        function = getattr(part, name)
        takes = tuple(inspect.signature(function).parameters)
        hooks[name] = dataclasses.replace(hooks[name], function=function, takes=takes)
    engine.executor.step = hooks["local_step"]
    return engine


def test_a_graph_copies_what_a_step_returns_under_another_name(make_engine):
    kinds = ("sequential", "graph")
    changes = {"execution__chunk": 2, "sparsity__target": 0.0}
    engines = [make_engine("fedavg", execution__executor=kind, **changes) for kind in kinds]
    assert_same(*(last(with_step(engine, Remembering())) for engine in engines))


@pytest.mark.parametrize("kind", ["sequential", "graph"])
def test_a_step_that_writes_into_what_it_was_given_is_named(make_engine, kind):
    changes = {"execution__executor": kind, "sparsity__target": 0.0}
    engine = with_step(make_engine("fedavg", **changes), Overwriting())
    with pytest.raises(RunError, match=r"local_step.*wrote into a tensor it was given"):
        last(engine)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_repeats_of_a_client_are_in_later_groups(size):
    for clients in ([0, 0, 0, 1, 1, 1, 2, 2, 2], [3, 1, 3, 2, 1, 0], [4, 3, 2, 1], []):
        groups = list(apart(clients, size))
        assert sorted(number for group in groups for number in group) == sorted(clients)
        assert all(len(set(group)) == len(group) <= size for group in groups)
        fewest = max([-(-len(clients) // size), *(clients.count(c) for c in clients)], default=0)
        assert len(groups) <= fewest + 1  # the first group that fits, which is not always best
    assert list(apart([3, 1, 2], 1)) == [[3], [1], [2]]  # in their order


@pytest.mark.slow
@pytest.mark.parametrize("plugin", ["pffdst", "scaffold", "feddyn"])
def test_a_compiled_step_is_the_step(make_engine, plugin):
    pytest.importorskip("torch._inductor")
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("torch.compile needs a C++ compiler on CPUs")
    plain = last(make_engine(plugin, execution__executor="sequential"))
    compiled = last(make_engine(plugin, execution__executor="graph", execution__compile=True))
    assert_same(plain, compiled)


@pytest.mark.slow
def test_a_compiled_step_drops_the_same(make_engine):
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("torch.compile needs a C++ compiler on CPUs")
    changes = IMAGES | {"task__model__use": "cifar-cnn", "federation__learning_rate": 1e-3}
    plain = last(make_engine("feddst", execution__executor="sequential", **changes))
    compiled = last(make_engine("feddst", execution__executor="graph", execution__compile=True, **changes))
    assert_same(plain, compiled, atol=1e-5)  # fused kernels round elsewhere


@pytest.mark.slow
def test_a_step_that_cannot_be_compiled_is_named(make_engine):
    engine = make_engine("sparsyfed", execution__executor="graph", execution__compile=True)
    with pytest.raises(RunError, match=r"sparsyfed.*cannot be compiled.*execution.compile = false"):
        last(engine)


def test_compiled_steps_need_the_graph_executor(make_engine):
    with pytest.raises(ConfigError, match=r"set execution.executor = 'graph' \('sequential' now\)"):
        make_engine(execution__compile=True)


def test_unknown_executors_are_refused(make_engine):
    with pytest.raises(ConfigError, match=r"execution.executor"):
        make_engine(execution__executor="fast")


class Capturing:
    """A capture whose end fails, as it does after an operation that no graph can hold."""

    def __init__(self, *args, **options):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        raise RuntimeError("capture was invalidated")


@pytest.mark.parametrize(
    ("raised", "kind", "text"),
    [
        (RuntimeError("a value was read"), CaptureError, "a value was read"),
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError, "out of memory"),
        (RunError("the step cannot be compiled"), RunError, "cannot be compiled"),
        (None, CaptureError, "capture was invalidated"),
    ],
)
def test_a_failed_capture_says_what_failed_first(monkeypatch, raised, kind, text):
    """On a machine without a GPU its functions are played."""
    monkeypatch.setattr(torch.cuda, "graph", Capturing)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    lane, params, runs = Lane(torch.device("cpu")), {"w": torch.zeros(2)}, []

    def step(given):
        runs.append(1)
        if raised and len(runs) > WARM_UPS:
            raise raised
        return Stepped(given.params, given.carry, {"loss": torch.tensor(1.0)})

    batch = Batch(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64))
    lane.step, lane.places = step, Given(params, Carry({}, {}), batch, {}, {}, params, {})
    with pytest.raises(kind, match=text):
        lane.capture(None, WARM_UPS)
    assert lane.graph is None


def test_a_step_is_captured_again_only_for_another_number_or_form(monkeypatch):
    """Each capture runs the step once; before the first one of a form it runs `WARM_UPS` times."""
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **options: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    lane, runs = Lane(torch.device("cpu")), []
    lane.stream, lane.wait, lane.join = object(), lambda: None, lambda: None

    def step(given):
        runs.append(len(given.batch.targets))
        torch.rand(1)  # a layer that draws by itself
        return Stepped(given.params, given.carry, {"loss": torch.tensor(1.0)})

    def loaded(rate, size):
        runs.clear()
        params = {"w": torch.full((2,), rate)}
        batch = Batch(torch.zeros(size, 2), torch.zeros(size, dtype=torch.int64))
        given = Given(params, Carry({}, {}), batch, {}, {}, params, {})
        lane.load(step, step, given, {"lr": rate})
        assert torch.equal(lane.places.params["w"], params["w"])
        return len(runs)

    assert [loaded(0.5, 4), loaded(0.5, 4)] == [WARM_UPS + 1, 0]
    assert [loaded(0.25, 4), loaded(0.25, 4)] == [2, 0]
    assert [loaded(0.25, 3), loaded(0.5, 3)] == [WARM_UPS + 1, 2]
    # what is drawn after a capture does not depend on how often the step ran before it
    before = torch.get_rng_state()
    loaded(0.25, 4)
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    torch.rand(1)
    assert torch.equal(after, torch.get_rng_state())
