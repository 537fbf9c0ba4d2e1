"""`fedsparse bench`: the plain loop is FedAvg to rounding, works resolve, the command writes its figures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from fedsparse.cli.bench.bare import Bare
from fedsparse.cli.bench.contenders import OnEngine, configured, gather, others
from fedsparse.cli.bench.floor import floor
from fedsparse.cli.bench.measure import single_round
from fedsparse.cli.bench.show import found_works
from fedsparse.cli.main import main
from fedsparse.core import task
from fedsparse.core.engine import Engine
from fedsparse.core.execution.workers import Workers
from fedsparse.core.models import MODELS
from fedsparse.core.resolve import resolve

ROOT = Path(__file__).parents[2]
WORKS = sorted(path.stem for path in (ROOT / "configs" / "bench").glob("*.toml"))
TINY = """
[task]
dataset = { use = "synthetic", train = 120, test = 40, channels = 3, height = 10, width = 10 }
model = { use = "cnn", widths = [4], hidden = 8 }
partition = "dirichlet"

[federation]
clients = 5
clients_per_round = 3
rounds = 1000
batch_size = 16

[execution]
executor = "sequential"
"""


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return str(path)


def bench(*arguments):
    return CliRunner().invoke(main, ["bench", *map(str, arguments)])


MODELS_TO_MATCH = {
    "cnn": [],
    "mlp": ["task.model=mlp", "federation.momentum=0.9", "federation.weight_decay=0.001"],
    "batch norm": ["task.model.use=cifar-cnn", "task.model.dropout=0", "federation.learning_rate=0.01"],
    "fixed batches": ["federation.shuffle=false", "federation.local_epochs=3"],
}


@pytest.mark.parametrize("sets", MODELS_TO_MATCH.values(), ids=MODELS_TO_MATCH.keys())
def test_the_plain_loop_is_the_engines_fedavg(tiny, sets):
    resolved = resolve("fedavg", [tiny], sets=["sparsity.target=0", *sets])
    made = task.build(resolved.config)
    engine, bare = Engine(resolved, made), Bare(resolved.config, made, Workers())
    state = engine.start()
    before = {name: p.clone() for name, p in state.params.items()}
    for number in range(2):
        state = engine.play(state).state
        bare.round(number)
        expected = state.params | {n: b for n, b in state.buffers.items() if b.is_floating_point()}
        torch.testing.assert_close(bare.tensors(), expected, rtol=1e-4, atol=1e-5)
    assert max(float((state.params[name] - before[name]).abs().max()) for name in before) > 1e-3


def test_two_workers_of_the_plain_loop_agree_with_the_engines(tiny):
    code = f"""
from fedsparse.cli.bench.bare import Bare
from fedsparse.core import task
from fedsparse.core.engine import Engine
from fedsparse.core.execution import workers
from fedsparse.core.resolve import resolve

def compare():
    resolved = resolve("fedavg", [{tiny!r}], sets=["sparsity.target=0"])
    made = task.build(resolved.config)
    engine = Engine(resolved, made)
    bare = Bare(resolved.config, made, engine.workers)
    state = engine.play(engine.start()).state
    bare.round(0)
    workers.leave()
    found = bare.tensors()
    return engine.workers.size, max(float((found[n] - p).abs().max()) for n, p in state.params.items())

size, difference = workers.launch(2, compare)
assert size == 2 and difference < 1e-5, (size, difference)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_contenders_play_the_same_clients_and_the_bare_engine_counts_nothing(tiny):
    resolved = resolve("fedavg", [tiny])
    made = task.build(resolved.config)
    contenders, refused = gather(tiny, made, ["feddst"], executors=True)
    assert list(contenders) == [
        "bare",
        "fedavg",
        "fedavg, no contracts",
        "fedavg, no contracts or ledger",
        "fedavg, vectorised",
        "feddst",
    ]
    assert not refused
    for contender in contenders.values():
        contender.round(0)
    dense = {name: c.state.params for name, c in contenders.items() if name.startswith("fedavg")}
    for params in dense.values():
        torch.testing.assert_close(params, dense["fedavg"], rtol=1e-4, atol=1e-5)
    without = contenders["fedavg, no contracts or ledger"].engine
    assert without.contracts is None
    assert without.ledger.total.upload_bytes == 0
    assert contenders["fedavg"].engine.ledger.total.upload_bytes > 0
    assert contenders["feddst"].engine.config.sparsity.target == 0.8


@pytest.mark.parametrize("work", WORKS)
def test_every_work_resolves_for_every_method_that_is_measured(work):
    for method in ("fedavg", "pffdst", "feddst", "sparsyfed", "fedsparsify"):
        federation = resolve(method, [f"bench/{work}"]).config.federation
        assert (federation.momentum == 0) == (work != "pffdst-resnet18")  # that one has the paper's settings
        assert federation.rounds >= 1000


def test_the_benchmarks_networks_have_the_sizes_that_they_say():
    for made, parameters in (
        (MODELS["lenet"](pooling=(2, 2)), 62_006),
        (MODELS["cnn-dropout"](), 1_626_442),
    ):
        model = made.build((3, 32, 32), 10)
        assert sum(p.numel() for p in model.parameters()) == parameters
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_the_command_shows_and_writes_its_figures(tiny, tmp_path):
    out = tmp_path / "bench.json"
    result = bench(tiny, "--quick", "--methods", "feddst", "--out", out)
    assert result.exit_code == 0, result.output
    assert "ratio to bare" in result.output
    written = json.loads(out.read_text())
    assert {"versions", "cores", "repeats", "interleaved", "figures"} <= written.keys()
    (figures,) = written["figures"]
    assert {"work", "workers", "device", "settings", "single_round_run", "refused"} <= figures.keys()
    assert figures["workers"] == 1
    assert figures["settings"]["federation"]["clients_per_round"] == 3
    names = {"bare", "fedavg", "fedavg, no contracts", "fedavg, no contracts or ledger", "feddst"}
    assert figures["contenders"].keys() == names
    for row in figures["contenders"].values():
        assert len(row["seconds"]) == 1
        assert row["min"] <= row["median"] <= row["max"]
        assert row["ratios"].keys() == {"bare", "fedavg"}
    assert figures["contenders"]["bare"]["ratios"]["bare"]["median"] == 1


def test_a_method_that_does_not_suit_a_work_is_left_out_with_the_reason(tiny, tmp_path):
    mine, out = tmp_path / "mine.py", tmp_path / "bench.json"
    mine.write_text(
        "from fedsparse import Method, Part, hookimpl\n"
        "from fedsparse.core.errors import ConfigError\n"
        "class P(Part):\n"
        "    @hookimpl\n"
        "    def mask_init(self, params):\n"
        "        raise ConfigError('not for me')\n"
        "METHOD = Method('mine', mask_init=P())\n"
    )
    result = bench(tiny, "--quick", "--methods", mine, "--out", out)
    assert result.exit_code == 0, result.output
    (figures,) = json.loads(out.read_text())["figures"]
    assert "not for me" in figures["refused"][str(mine)]
    assert "does not suit this work" in result.output


def test_a_method_that_fails_while_it_is_measured_is_left_out_with_the_reason(tiny, tmp_path):
    mine, out = tmp_path / "mine.py", tmp_path / "bench.json"
    mine.write_text(
        "from fedsparse import Method, Part, hookimpl\n"
        "class P(Part):\n"
        "    @hookimpl\n"
        "    def local_step(self, params):\n"
        "        raise ValueError('out of luck')\n"
        "METHOD = Method('mine', local_step=P())\n"
    )
    result = bench(tiny, "--quick", "--methods", f"{mine},feddst", "--out", out)
    assert result.exit_code == 0, result.output
    (figures,) = json.loads(out.read_text())["figures"]
    assert "out of luck" in figures["refused"][str(mine)]
    assert "feddst" in figures["contenders"]


def test_the_floor_counts_the_dense_round(tiny):
    """FLOPs: 6 a MAC and sample; bytes: three times the parameters a step, twice the activations a sample."""
    resolved = resolve("fedavg", [tiny], sets=["task.partition=iid", "federation.local_epochs=2"])
    made = task.build(resolved.config)
    found = floor(made, "float32", [1, 2], workers=2)
    # 10x10 images, 3 channels: 4 filters of 3x3, pooled to 5x5, 8 hidden units, 10 classes
    macs = 100 * 4 * 27 + 100 * 8 + 8 * 10
    samples = sum(len(made.partition.train_of(c)) for r in (1, 2) for c in made.clients(r))
    assert found["flops"] == 6 * macs * samples  # two rounds' mean of two epochs
    parameters = sum(p.numel() for p in made.model.parameters())
    steps = sum(-(-len(made.partition.train_of(c)) // 16) for r in (1, 2) for c in made.clients(r))
    assert found["bytes"] == 4 * (3 * parameters * steps + 2 * made.activations() * samples)
    assert found["seconds"] == pytest.approx(
        max(found["flops"] / found["peak_flops_a_second"], found["bytes"] / found["peak_bytes_a_second"]) / 2
    )


def test_the_floor_counts_activations_in_their_width(tiny):
    resolved = resolve("fedavg", [tiny], sets=["federation.local_epochs=1"])
    made = task.build(resolved.config)
    narrow, wide = (floor(made, precision, [1], workers=1)["bytes"] for precision in ("bfloat16", "float32"))
    samples = sum(len(made.partition.train_of(c)) for c in made.clients(1))
    assert wide - narrow == 2 * 2 * made.activations() * samples  # written and read, 2 bytes less each


def test_a_contender_of_another_layout_has_its_own_images(tiny):
    made = task.build(resolve("fedavg", [tiny], sets=["execution.channels_last=off"]).config)
    other = OnEngine(configured(tiny, execution__channels_last="on"), made).engine.task
    assert (made.layout.channels_last, other.layout.channels_last) == (False, True)
    assert other.dataset.train_inputs.is_contiguous(memory_format=torch.channels_last)
    assert not made.dataset.train_inputs.is_contiguous(memory_format=torch.channels_last)


def test_large_works_for_gpus_are_measured_where_one_is_or_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert found_works([]) == [f"bench/{name}" for name in WORKS if name != "pffdst-resnet18"]
    assert found_works(["pffdst-resnet18"]) == ["bench/pffdst-resnet18"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert found_works([]) == [f"bench/{name}" for name in WORKS]


def test_gpus_are_measured_on_every_executor(tiny):
    resolved = resolve("fedavg", [tiny])
    engine = Engine(resolved, task.build(resolved.config))
    assert others(engine, torch.device("cuda")) == ["vectorised", "graph"]
    assert others(engine, torch.device("cpu")) == ["vectorised"]


def test_a_run_of_one_round_is_timed(tiny):
    found = single_round(tiny, 1)
    assert found["seconds"] > 0
    assert found["peak_resident_bytes"] > 50_000_000  # torch alone is larger


WRONG = {
    "work": (["lenet-cifat"], "Did you mean 'lenet-cifar'?"),
    "file": (["missing.toml"], "cannot read missing.toml"),
    "method": (["--methods", "fedst"], "Did you mean 'feddst'?"),
    "workers": (["--workers", "1,x"], "expected numbers from 1"),
    "too many": (["resnet18", "--workers", "64"], "4 clients a round"),
    "out": (["--out", "nowhere/at/all.json"], "there is no folder"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_input_is_one_message_and_exit_2(arguments, message):
    result = bench(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_help_imports_no_torch():
    code = "import sys\nfrom fedsparse.cli.main import main\ntry:\n    main(['bench', '--help'])\nfinally:\n"
    code += "    assert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    assert "lenet-cifar" in done.stdout
