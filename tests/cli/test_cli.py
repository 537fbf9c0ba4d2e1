"""The command line as a user meets it: results, wrong input, help without torch, Ctrl-C."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from fedsparse.cli.main import main

ROOT = Path(__file__).parents[2]
FAST = [
    "--set",
    "task.dataset=synthetic",
    "--set",
    "task.dataset.train=200",
    "--set",
    "task.dataset.test=60",
    "--set",
    "task.model=mlp",
    "--set",
    "task.partition=iid",
    "--set",
    "federation.clients=6",
    "--set",
    "federation.clients_per_round=2",
    "--set",
    "federation.rounds=4",
]


def fedsparse(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def text(result):
    return " ".join((result.stdout + result.stderr).split())


def test_run_writes_the_folder_and_says_where(tmp_path):
    result = fedsparse("run", "--plugin", "pffdst", *FAST, "--out", tmp_path / "r")
    assert result.exit_code == 0, result.output
    assert "pffdst" in result.output
    assert "test accuracy (pooled)" in result.output
    assert str(tmp_path / "r") in result.output.replace("\n", "")
    names = {path.name for path in (tmp_path / "r").iterdir()}
    assert names == {
        "config.toml",
        "metrics.jsonl",
        "summary.json",
        "checkpoint",
        "model.safetensors",
        "mask.safetensors",
        "masks",
        "clients.json",
    }
    lines = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [0, 1, 2, 3]
    always = {
        "round",
        "seconds",
        "train_loss",
        "sparsity",
        "density",
        "frozen_fraction",
        "regrown_fraction",
        "upload_bytes",
        "download_bytes",
        "upload_bytes_total",
        "download_bytes_total",
        "paper_bytes_total",
        "flops_total",
        "mask_changed",
        "mask_iou",
        "clients",
        "samples",
    }
    assert all(always <= line.keys() for line in lines)
    assert {"test_accuracy", "test_loss", "client_accuracy"} <= lines[-1].keys()
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert summary["method"] == "pffdst"
    assert summary["final"]["test_accuracy"] == lines[-1]["test_accuracy"]
    assert {"best", "seed", "swaps", "versions", "device", "workers", "wall_seconds", "parameters"} <= set(
        summary
    )
    assert summary["nonzero"] <= summary["parameters"]


def test_quiet_prints_the_summary_only(tmp_path):
    result = fedsparse("run", *FAST, "--quiet", "--out", tmp_path / "r")
    assert "round     4" not in result.output
    assert "test accuracy" in result.output


def test_swaps_are_recorded_and_dropped_settings_reported(tmp_path):
    own = tmp_path / "own.toml"
    own.write_text("[method.readjust]\nperiod = 3\n")
    arguments = ("--plugin", "pffdst", "--config", own, "--swap", "readjust=feddst", *FAST)
    result = fedsparse("run", *arguments, "--out", tmp_path / "r")
    assert result.exit_code == 0, result.output
    assert f"method.readjust.period (config {own}) dropped" in text(result)
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert summary["swaps"] == {"readjust": "feddst:Regrow"}
    written = tomllib.loads((tmp_path / "r" / "config.toml").read_text())
    assert written["method"]["readjust"]["use"] == "feddst:Regrow"
    assert written["method"]["readjust"]["period"] == 15
    again = fedsparse("run", "--config", tmp_path / "r" / "config.toml", "--out", tmp_path / "again")
    assert again.exit_code == 0
    assert json.loads((tmp_path / "again" / "summary.json").read_text())["swaps"] == summary["swaps"]
    other = fedsparse(
        "run", "--plugin", "feddst", "--config", tmp_path / "r" / "config.toml", "--out", tmp_path / "o"
    )
    assert "it is pffdst's, and feddst runs" in text(other)
    assert json.loads((tmp_path / "o" / "summary.json").read_text())["swaps"] == {}


BROKEN = {
    "only_extras.py": "from fedsparse import Part, hookimpl\n\nclass P(Part):\n    @hookimpl\n"
    "    def penalty(self, params):\n        return 0 * sum(p.sum() for p in params.values())\n",
    "only_a_slot.py": "from fedsparse import Part, Readjusted, hookimpl\n\nclass P(Part):\n    @hookimpl\n"
    "    def readjust(self, params, mask):\n        return Readjusted(params, mask, {})\n",
    "raises.py": (
        "from fedsparse import Method, Part, hookimpl\n"
        "class P(Part):\n"
        "    @hookimpl\n"
        "    def readjust(self, params):\n"
        "        return params['nothing']\n"
        "METHOD = Method('m', readjust=P())\n"
    ),
    "shape.py": (
        "from fedsparse import Method, Part, Aggregated, hookimpl\n"
        "class P(Part):\n"
        "    @hookimpl\n"
        "    def contribute(self, weight):\n"
        "        return {'weight': weight}\n"
        "    @hookimpl\n"
        "    def aggregate(self, params, mask):\n"
        "        return Aggregated({n: p[:1] for n, p in params.items()}, mask, {})\n"
        "METHOD = Method('m', aggregate=P())\n"
    ),
    "syntax.py": "def (\n",
    "imports.py": "import nothing_of_that_name\n",
    "empty.py": "x = 1\n",
    "exits.py": "import sys\nsys.exit(0)\n",
    "parts.py": "PARTS = 5\n",
    "preset.py": "from fedsparse import Method\nMETHOD = Method('x', preset=3)\n",
    "forgot.py": (
        "from fedsparse import Method, Part, Readjusted, hookimpl\n"
        "class P(Part):\n"
        "    def due(self, clock):\n"
        "        return False\n"
        "    @hookimpl\n"
        "    def readjust(self, params, mask):\n"
        "        return Readjusted(params, mask, {})\n"
        "METHOD = Method('m', readjust=P())\n"
    ),
    "loss.py": (
        "from fedsparse import Method, Part, Stepped, hookimpl\n"
        "class P(Part):\n"
        "    @hookimpl\n"
        "    def local_step(self, params, carry):\n"
        "        return Stepped(params, carry, {})\n"
        "METHOD = Method('m', local_step=P())\n"
    ),
    "hook.py": (
        "from fedsparse import Method, Part, hookimpl\n"
        "class P(Part):\n"
        "    @hookimpl\n"
        "    def readjusst(self, params):\n"
        "        return params\n"
        "METHOD = Method('m', readjust=P())\n"
    ),
    "argument.py": (
        "from fedsparse import Method, Part, hookimpl\n"
        "class P(Part):\n"
        "    @hookimpl\n"
        "    def readjust(self, gradients):\n"
        "        return gradients\n"
        "METHOD = Method('m', readjust=P())\n"
    ),
}


@pytest.mark.parametrize(
    ("arguments", "code", "texts"),
    [
        (["--plugin", "pfdst"], 2, ["unknown plugin 'pfdst'", "Did you mean 'pffdst'?"]),
        (["--swap", "reajust=feddst"], 2, ["unknown slot 'reajust'", "'readjust'"]),
        (["--swap", "readjust=feddst:Regroww"], 2, ["no part 'Regroww'", "'Regrow'"]),
        (["--swap", "readjust=feddst:MaskedMean"], 2, ["fills the slot aggregate, not readjust"]),
        (["--swap", "readjust"], 2, ["expected SLOT=PLUGIN"]),
        (["--set", "sparsity.targt=0.5"], 2, ["sparsity.targt: unknown key", "'target'", "--set"]),
        (["--set", "sparsty.target=0.5"], 2, ["sparsty: unknown key", "'sparsity'"]),
        (["--set", "sparsity.target=1.0"], 2, ["sparsity.target: must be less than 1; given 1.0"]),
        (["--set", "federation.rounds=0"], 2, ["federation.rounds", "greater than or equal to 1; given 0"]),
        (["--set", "federation.rounds=many"], 2, ["federation.rounds", "valid integer", "'many'"]),
        (["--set", "federation.learning_rate=nan"], 2, ["federation.learning_rate", "finite"]),
        (
            ["--set", "federation.clients_per_round=7"],
            2,
            [
                "clients_per_round is 7",
                "clients = 6",
                "--set federation.clients, --set federation.clients_per_round)",
            ],
        ),
        (["--set", "task.model=resnet19"], 2, ["unknown model 'resnet19'", "'resnet18'", "module:callable"]),
        (["--set", "task.model=nothing:here"], 2, ["task.model", "cannot import 'nothing'"]),
        (["--set", "task.model=lenet", "--set", "task.dataset.height=9"], 2, ["task.model", "cnn"]),
        (["--set", "sparsity.prunable=zz*"], 2, ["sparsity.prunable", "matches no parameter"]),
        (["--set", "rounds"], 2, ["expected KEY=VALUE"]),
        (["--set", "execution.device=tpu9"], 2, ["execution.device: 'tpu9' is no device", "cpu, cuda or"]),
        (["--set", "execution.device=meta"], 2, ["'meta' is no device. Allowed: auto, cpu, cuda or cuda:N"]),
        (["--seed", "5", "--set", "seed=6"], 2, ["seed: given by --set seed and, otherwise, by --seed"]),
        (["--plugin", "feddst", "--set", "method.plugin=pffdst"], 2, ["method.plugin: given by --set"]),
        (["--config", "{tmp}/full"], 2, ["is a folder; of a run, give", "full/config.toml"]),
        (["--plugin", "{tmp}/full/"], 2, ["full: is a folder"]),
        (["--set", "execution.threads=100000000000"], 2, ["execution.threads", "1024"]),
        (["--set", "task=3"], 2, ["task: given 3; expected a table"]),
        (["--set", "task.dataset.use=[1]"], 2, ["task.dataset.use: given [1]"]),
        (["--set", "method.plugin=3"], 2, ["method.plugin: given 3; expected a name or a path"]),
        (["--set", "method.readjust.use=3"], 2, ["method.readjust.use: given 3"]),
        (["--plugin", "pffdst", "--set", "method.extras.CodeCost=3"], 2, ["method.extras.CodeCost: given 3"]),
        (["--plugin", "pffdst", "--set", "method.extras.Cost.x=3"], 2, ["unknown extra", "'CodeCost'"]),
        (["--swap", "readjust=feddst", "--swap", "readjust=pffdst"], 2, ["--swap is given twice"]),
        (["--swap", "readjust=feddst:"], 2, ["expected SLOT=PLUGIN"]),
        (["--config", ""], 2, ["--config is empty"]),
        (["--out", "x" * 300], 1, ["cannot write", "too long"]),
        (["--set", "federation.learning_rate=1e30"], 1, ["NaN or infinity", "lower learning rate"]),
        (["--config", "cifar10-lennet"], 2, ["no such preset", "'cifar10-lenet'"]),
        (["--config", "{tmp}/none.toml"], 2, ["cannot read", "No such file"]),
        (["--config", "{tmp}/broken.toml"], 2, ["is not valid TOML"]),
        (
            ["--set", "task.dataset=mnist", "--set", "task.data_root={tmp}"],
            1,
            ["mnist", "task.download=true"],
        ),
        (["--out", "{tmp}/full"], 1, ["exists and is not an empty folder", "--out"]),
        (["--plugin", "{tmp}/none.py"], 2, ["there is no such file"]),
        (["--plugin", "{tmp}/syntax.py"], 2, ["fails to import", "SyntaxError"]),
        (["--plugin", "{tmp}/imports.py"], 2, ["fails to import", "nothing_of_that_name", "imports.py:1"]),
        (["--plugin", "{tmp}/empty.py"], 2, ["neither METHOD nor a Part"]),
        (["--plugin", "{tmp}/hook.py"], 2, ["unknown hook 'readjusst'", "Did you mean 'readjust'?"]),
        (
            ["--plugin", "{tmp}/argument.py"],
            2,
            ["part P: hook readjust has no argument 'gradients'. Allowed: budget"],
        ),
        (["--plugin", "{tmp}/raises.py"], 1, ["part P, slot readjust", "round 0", "KeyError", "raises.py:5"]),
        (["--plugin", "{tmp}/raises.py"], 1, ["traceback in", "error.log"]),
        (["--plugin", "{tmp}/exits.py"], 2, ["fails to import", "SystemExit"]),
        (["--plugin", "{tmp}/forgot.py"], 2, ["due has the name of a hook", "@hookimpl"]),
        (["--plugin", "{tmp}/parts.py"], 2, ["PARTS is 5"]),
        (
            ["--plugin", "{tmp}/only_extras.py"],
            2,
            ["but no METHOD", "run it by --extra ", "only_extras.py on another"],
        ),
        (
            ["--plugin", "{tmp}/only_a_slot.py"],
            2,
            ["but no METHOD", "run it by --swap SLOT=", "only_a_slot.py:Part on"],
        ),
        (["--plugin", "{tmp}/preset.py"], 2, ["preset holds 3"]),
        (
            ["--plugin", "{tmp}/loss.py"],
            1,
            ["part P, slot local_step", "client", 'metrics must be a dict that holds "loss"'],
        ),
        (
            ["--plugin", "{tmp}/shape.py"],
            1,
            ["slot aggregate", "'fc1.weight' has shape (1, ", "expected (200"],
        ),
    ],
)
def test_wrong_input_ends_with_one_message(tmp_path, monkeypatch, arguments, code, texts):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "results.txt").write_text("precious")
    (tmp_path / "broken.toml").write_text("a = [1,\n")
    for name, source in BROKEN.items():
        (tmp_path / name).write_text(source)
    result = fedsparse("run", *FAST, *(a.format(tmp=tmp_path) for a in arguments))
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit)
    said = text(result)
    assert "Error: " in said
    assert "Traceback" not in said
    for expected in texts:
        assert expected in said, said
    assert (tmp_path / "full" / "results.txt").read_text() == "precious"
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["results.txt"]


def test_a_failed_run_keeps_the_traceback_for_the_plugins_author(tmp_path):
    (tmp_path / "raises.py").write_text(BROKEN["raises.py"])
    fedsparse("run", "--plugin", tmp_path / "raises.py", *FAST, "--out", tmp_path / "r")
    assert "KeyError: 'nothing'" in (tmp_path / "r" / "error.log").read_text()


def test_all_problems_at_once():
    result = fedsparse(
        "run",
        "--set",
        "sparsity.target=2",
        "--set",
        "seed=-1",
        "--set",
        "task.partition.alfa=1",
        "--swap",
        "x=y",
    )
    assert result.exit_code == 2
    assert "4 problems" in text(result)
    for path in ("sparsity.target", "seed", "task.partition.alfa", "unknown slot 'x'"):
        assert path in text(result)


def test_default_folders_do_not_collide(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert fedsparse("run", *FAST, "--quiet").exit_code == 0
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == [
        "fedavg-synthetic-seed0",
        "fedavg-synthetic-seed0-2",
    ]


def test_plugins_table_shows_failures_and_harms_no_other(monkeypatch, tmp_path):
    from importlib.metadata import EntryPoint

    from fedsparse.core import registry

    real = registry.entry_points
    broken = EntryPoint("zzz", "no_such_module_anywhere", "fedsparse")
    monkeypatch.setattr(registry, "entry_points", lambda group: [*real(group=group), broken])
    result = fedsparse("plugins")
    assert result.exit_code == 0
    for expected in ("fedavg", "feddst", "pffdst", "zzz", "fails to import", "no_such_module_anywhere"):
        assert expected in text(result)
    assert fedsparse("run", *FAST, "--quiet", "--out", tmp_path / "r").exit_code == 0


def test_a_name_claimed_twice_is_refused(monkeypatch):
    from importlib.metadata import EntryPoint

    from fedsparse.core import registry

    real = registry.entry_points
    other = EntryPoint("feddst", "somebody.elses:module", "fedsparse")
    monkeypatch.setattr(registry, "entry_points", lambda group: [*real(group=group), other])
    for result in (fedsparse("run", "--plugin", "feddst", *FAST), fedsparse("plugins")):
        assert "'feddst' is claimed by fedsparse" in text(result)
        assert "somebody.elses:module; uninstall one" in text(result)
    assert fedsparse("config", "show", "--plugin", "pffdst").exit_code == 0


def test_plugins_show_lists_fields_with_defaults_and_ranges():
    said = text(fedsparse("plugins", "show", "pffdst"))
    for expected in (
        "freeze_policy",
        "FreezeHalf",
        "ServerReadjust",
        "period",
        "int in [1, ∞)",
        "float in (0, 1)",
    ):
        assert expected in said
    assert fedsparse("plugins", "show", "nope").exit_code == 2


def test_plugins_can_be_restricted(monkeypatch):
    monkeypatch.setenv("FEDSPARSE_PLUGINS", "feddst")
    said = text(fedsparse("plugins"))
    assert "feddst" in said
    assert "pffdst" not in said
    result = fedsparse("run", "--plugin", "pffdst", *FAST)
    assert result.exit_code == 2
    assert "FEDSPARSE_PLUGINS restricts" in text(result)


def test_config_show_is_toml_with_sources():
    result = fedsparse("config", "show", "--plugin", "pffdst", "--set", "federation.rounds=7", "--seed", "5")
    tree = tomllib.loads(result.stdout)
    assert tree["seed"] == 5
    assert tree["federation"]["rounds"] == 7
    assert tree["method"]["readjust"] == {
        "use": "pffdst:ServerReadjust",
        "ratio": 0.5,
        "period": 10,
        "starts": [0.0, 0.5],
        "window": 0.125,
        "variant": "paper",
    }
    sources = dict(re.findall(r"^(\w+) = .*# (.*)$", result.stdout, re.MULTILINE))
    assert sources["rounds"] == "--set federation.rounds"
    assert sources["seed"] == "--seed"
    assert sources["target"] == "preset pffdst"
    assert sources["clients"] == "default"


def test_config_schema_describes_the_composition():
    tree = json.loads(fedsparse("config", "schema", "--plugin", "pffdst", "--swap", "readjust=feddst").stdout)
    slots = tree["$defs"]["MethodConfig"]["properties"]
    fields = {
        slot: slots[slot]["anyOf"][1]["properties"] for slot in ("aggregate", "readjust", "freeze_policy")
    }
    assert "min_votes" in fields["aggregate"]
    assert "annealing" in fields["readjust"]
    assert fields["readjust"]["use"] == {"enum": ["feddst:Regrow", "feddst"]}
    assert "freeze_scales" in fields["freeze_policy"]
    assert "digits" in json.dumps(tree["$defs"]["TaskConfig"]["properties"]["dataset"])


def test_config_validate_and_list(tmp_path):
    good, bad = tmp_path / "good.toml", tmp_path / "bad.toml"
    good.write_text("[federation]\nrounds = 3\n")
    bad.write_text("[federation]\nround = 3\nclients = 0\n")
    assert fedsparse("config", "validate", good, "--plugin", "pffdst").exit_code == 0
    result = fedsparse("config", "validate", bad)
    assert result.exit_code == 2
    assert "federation.round: unknown key" in text(result)
    assert "federation.clients" in text(result)
    listed = text(fedsparse("config", "list"))
    for path in (ROOT / "configs").glob("*.toml"):
        assert path.stem in listed


def presets():
    """(preset, method): that of a method, or one that names its method, is for that; others are for all."""
    from fedsparse.core.registry import Registry

    methods = Registry().names()
    for path in sorted(set((ROOT / "configs").rglob("*.toml")) - set((ROOT / "configs").rglob("table.toml"))):
        name = str(path.relative_to(ROOT / "configs").with_suffix(""))
        plugin = tomllib.loads(path.read_text()).get("method", {}).get("plugin")
        for method in [name] if name in methods else [plugin] if plugin else ["fedavg", "feddst", "pffdst"]:
            yield name, method


@pytest.mark.parametrize(("preset", "plugin"), list(presets()))
def test_every_preset_is_valid_and_says_what_it_is(plugin, preset):
    result = fedsparse("config", "validate", preset, "--plugin", plugin)
    assert result.exit_code == 0, result.output
    assert (ROOT / "configs" / f"{preset}.toml").read_text().startswith("# ")


def without_torch(code, **environment):
    """Runs code in a new interpreter and returns its output; fails if torch was imported."""
    probe = f"{code}\nimport sys\nassert 'torch' not in sys.modules, 'torch was imported'"
    done = subprocess.run(
        [sys.executable, "-c", probe],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


COMMANDS = [
    [],
    ["run"],
    ["resume"],
    ["compare"],
    ["report"],
    ["card"],
    ["diff"],
    ["export"],
    ["ablate"],
    ["reproduce"],
    ["bench"],
    ["new-plugin"],
    ["plugins"],
    ["plugins", "show"],
    ["plugins", "check"],
    ["config"],
    ["config", "show"],
    ["config", "schema"],
    ["config", "validate"],
    ["config", "list"],
]


def test_help_of_every_command_imports_no_torch():
    from fedsparse.cli.main import main

    names = [[]] + [[name] for name in main.commands]
    names += [[n, s] for n, g in main.commands.items() for s in getattr(g, "commands", {})]
    assert sorted(names) == sorted(COMMANDS)
    code = "from fedsparse.cli.main import main\n" + "".join(
        f"main({[*command, '--help']}, standalone_mode=False)\n" for command in COMMANDS
    )
    said = without_torch(code)
    assert said.count("Usage:") == len(COMMANDS)
    assert "cifar10-lenet" in without_torch(
        "from fedsparse.cli.main import main\nmain(['config', 'list'], standalone_mode=False)"
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("fedsparse run --plugin ", "pffdst"),
        ("fedsparse run --plugin fedd", "feddst"),
        ("fedsparse run --config cif", "cifar10-lenet"),
        ("fedsparse run --swap read", "readjust="),
        ("fedsparse run --swap readjust=", "readjust=feddst"),
        ("fedsparse run --swap readjust =", "feddst"),
        ("fedsparse run --swap readjust = fedd", "feddst"),
        ("fedsparse plugins show ", "fedavg"),
        ("fedsparse reproduce len", "lenet-cifar10"),
        ("fedsparse reproduce lenet-cifar10 --rows pffdst-350,fedd", "pffdst-350,feddst-200"),
    ],
)
def test_shell_completion_knows_names_and_imports_no_torch(words, expected):
    code = (
        "from fedsparse.cli.main import main\n"
        "try:\n    main(prog_name='fedsparse')\nexcept SystemExit:\n    pass"
    )
    said = without_torch(
        code,
        _FEDSPARSE_COMPLETE="bash_complete",
        COMP_WORDS=words.replace(" ", "\n"),  # as bash joins them in click's function
        COMP_CWORD=str(len(words.split(" ")) - 1),
    )
    assert f"plain,{expected}" in said.splitlines()


def test_ctrl_c_ends_with_what_was_recorded(tmp_path):
    out = tmp_path / "r"
    command = [sys.executable, "-c", "from fedsparse.cli.main import main; main()", "run", *FAST]
    process = subprocess.Popen(
        [
            *command,
            "--set",
            "federation.rounds=100000",
            "--set",
            "output.evaluate_every=5",
            "--out",
            str(out),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    metrics, deadline = out / "metrics.jsonl", time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text().count("\n") >= 12):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert "interrupted" in said
    summary = json.loads((out / "summary.json").read_text())
    recorded = metrics.read_text().splitlines()
    assert summary["interrupted"]
    assert summary["rounds"] == len(recorded) >= 12
    assert json.loads(recorded[-1])["round"] == len(recorded) - 1
    assert (out / "model.safetensors").exists()


def test_an_extra_is_added_recorded_and_resumed(tmp_path):
    """By name, with its settings and their sources; the folder's configuration makes the same run."""
    short = ["--set", "federation.rounds=2", "--set", "federation.local_epochs=1", "--quiet"]
    clip = ["--set", "method.extras.GaussianMechanism.clip=0.5"]
    first, second = tmp_path / "a", tmp_path / "b"
    run = ["run", "--plugin", "pffdst", "--extra", "privacy", *clip, *short, "--out", str(first)]
    result = CliRunner().invoke(main, run)
    assert result.exit_code == 0, result.output
    assert "privacy ε of clients" in result.output
    written = (first / "config.toml").read_text()
    assert re.search(r'^use = "privacy:GaussianMechanism" +# --extra privacy$', written, re.MULTILINE)
    assert re.search(r"^clip = 0.5 +# --set method.extras.GaussianMechanism.clip$", written, re.MULTILINE)
    again = ["run", "--config", str(first / "config.toml"), "--quiet", "--out", str(second)]
    assert CliRunner().invoke(main, again).exit_code == 0
    assert "no difference" in CliRunner().invoke(main, ["diff", str(first), str(second)]).output
    shown = CliRunner().invoke(main, ["card", str(first), "--markdown"]).output
    assert "| extras | privacy:GaussianMechanism | clip=0.5" in shown
    assert "| ε | " in shown
    longer = (first / "config.toml").read_text().replace("rounds = 2 ", "rounds = 4 ")
    (first / "config.toml").write_text(longer)
    resumed = CliRunner().invoke(main, ["resume", str(first), "--quiet"])
    assert "federation.rounds was 2, is 4" in resumed.output  # and nothing about the extra


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--extra", "privcy"], "--extra privcy: unknown plugin 'privcy'. Did you mean 'privacy'?"),
        (["--extra", "median"], "--extra median: plugin 'median' has no extra. Plugins that have: "),
        (["--extra", "privacy:Gauss"], "plugin 'privacy' has no extra 'Gauss'. Allowed: GaussianMechanism"),
        (["--extra", ":"], "--extra :: expected PLUGIN or PLUGIN:Part"),
        (["--set", "method.extras.Gauss.clip=1"], "added by --extra PLUGIN"),
        (
            ["--extra", "privacy", "--set", "method.extras.GaussianMechanism.clip=0"],
            "method.extras.GaussianMechanism.clip: must be greater than 0; given 0",
        ),
        (["--set", "method.extras.Gauss.use=privacy"], "plugin 'privacy' has no extra 'Gauss'"),
        (["--set", "method.extras.Gauss.use=1"], "given 1; expected PLUGIN or PLUGIN:Part"),
        (["--set", "method.extras.Gauss=1"], "given 1; expected a table of its settings"),
        (["--extra", "privacy", "--swap", "readjust=feddst"], "Regrow"),
    ],
)
def test_a_wrong_extra_is_named(arguments, said):
    result = CliRunner().invoke(main, ["config", "show", "--plugin", "fedavg", *arguments])
    assert result.exit_code == 2
    assert said in result.output


def test_an_extra_as_a_table_in_a_file_and_from_python(tmp_path):
    import fedsparse
    from fedsparse.core.resolve import resolve

    file = tmp_path / "mine.toml"
    file.write_text('[method.extras.GaussianMechanism]\nuse = "privacy"\nclip = 2.0\n')
    made = resolve("fedavg", [str(file)])
    assert made.extras == {"GaussianMechanism": "privacy:GaussianMechanism"}
    assert made.config.method.extras[0].clip == 2.0
    result = fedsparse.run(
        "fedavg",
        extras=["privacy"],
        method__extras__GaussianMechanism__noise_multiplier=0.0,
        federation__rounds=1,
        federation__local_epochs=1,
        out=tmp_path / "run",
    )
    assert "epsilon" not in result.metrics
    assert result.summary["extras"] == made.extras
