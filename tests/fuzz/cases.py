"""Random command lines, from a seed: valid, nearly valid and senseless ones, for every command."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

from fedsparse.core.config import preset_names, toml_value
from fedsparse.core.hookspecs import SLOTS
from fedsparse.core.registry import Registry

NAMES = Registry().names()
PRESETS = list(preset_names())
WORDS = [
    "", " ", "0", "1", "-1", "2", "3.5", "1e999", "-1e308", "nan", "inf", "-inf", "true", "false",
    "none", "null",
    "10**12", "1000000000000", "99999999999999999999999999", "18446744073709551616", "1e-320",
    "0x10", "1_000",
    "[]", "{}", "[1, 2]", "{ use = 'mlp' }", "{use='digits', train=5}", "''", '"""', "'", '"',
    "\\", "a=b", "=", "==",
    "é", "日本語", "🏖️", "\u202e", "a\tb", "a\nb", "\x7f", "\udcff", "..", ".", "/", "/dev/null",
    "/proc/self/mem", "~",
    "a" * 5000, "[" * 400, "-", "--", "--help", "-h", "--plugin", "1979-05-27", "07:32:00", "%s%n",
    "{0}", "$HOME",
    "[bold]", "[/]", "digits", "synthetic", "mlp", "cnn", "lenet", "vgg16", "resnet18",
    "os:system", "torch.nn:Linear",
    "a:b", ":", "torch:nan", "iid", "dirichlet", "shards", "drawn", "auto", "cpu", "cuda",
    "cuda:99", "mps", "meta",
    "constant", "cosine", "exponential", "erk", "er", "uniform", "global", "scaled", "weights",
    "all", "bfloat16",
]  # fmt: skip
SIZES = [
    "1",
    "2",
    "3",
    "5",
    "7",
    "16",
    "100",
    "1000000000",
    "1000000000000",
    "9223372036854775807",
    str(2**64),
    "0",
]
KEYS = [
    "seed", "task", "task.dataset", "task.dataset.use", "task.dataset.train", "task.dataset.test",
    "task.dataset.classes", "task.dataset.channels", "task.dataset.height", "task.dataset.width",
    "task.data_root",
    "task.download", "task.model", "task.model.use", "task.model.hidden", "task.model.width",
    "task.partition",
    "task.partition.use", "task.partition.alpha", "task.partition.shards", "task.augment", "federation",
    "federation.clients", "federation.clients_per_round", "federation.replacement", "federation.rounds",
    "federation.local_epochs", "federation.batch_size", "federation.learning_rate", "federation.shuffle",
    "federation.learning_rate_schedule", "federation.learning_rate_final", "federation.momentum",
    "federation.weight_decay", "sparsity.target", "sparsity.allocation", "sparsity.prunable",
    "sparsity.rescale_init", "method", "method.plugin", "method.extras", "execution.device",
    "execution.threads",
    "execution.contracts", "execution.executor", "execution.chunk", "execution.precision",
    "execution.channels_last", "ledger.encode", "output.root", "output.evaluate_every",
    "output.checkpoint_every",
    "output", "ledger", "nothing", "task.nothing", "federation.clientz", "a.b.c.d.e",
    "method.readjust.period",
    *(f"method.{slot}" for slot in SLOTS), *(f"method.{slot}.use" for slot in SLOTS),
]  # fmt: skip
SMALL = [
    "task.dataset.use=synthetic", "task.dataset.train=40", "task.dataset.test=12", "task.model.use=mlp",
    "task.model.hidden=[4]", "task.partition.use=iid", "federation.clients=3",
    "federation.clients_per_round=2",
    "federation.rounds=1", "federation.local_epochs=1", "execution.device=cpu",
]  # fmt: skip
GUARD = ["federation.rounds", "federation.local_epochs", "task.download", "task.data_root", "output.root"]
"""how long a valid run lasts, and what it touches: a case that trains does not draw these settings"""
COMMANDS = [
    "run", "run", "run", "config show", "config show", "config validate", "config schema",
    "plugins show", "resume",
    "compare", "report", "card", "diff", "export", "ablate", "new-plugin", "plugins",
    "config list", "config", "",
    "bench", "nothing",
]  # fmt: skip


def folders(place: Path, run: Path) -> list[Path]:
    """A good run, and copies that are damaged in ways of their own."""
    found = [run]
    for number, (name, damage) in enumerate(
        [
            ("config.toml", b""),
            ("config.toml", b"\xff\xfe["),
            ("metrics.jsonl", b"{}\n"),
            ("metrics.jsonl", b"[1]\nnull\n"),
            ("metrics.jsonl", b'{"round": 0}\n'),
            ("summary.json", b"{}"),
            ("summary.json", b"[]"),
            ("summary.json", b"null"),
            ("model.safetensors", b"abc"),
            ("mask.safetensors", b"\x08" + b"\0" * 20),
            ("checkpoint/state.json", b"[]"),
            ("checkpoint/state.json", b'{"format": 2}'),
            ("checkpoint/tensors.safetensors", b""),
            ("metrics.jsonl", None),
            ("config.toml", None),
            ("summary.json", None),
            ("model.safetensors", None),
            ("metrics.jsonl", b""),
            ("config.toml", b'[method]\nplugin = "pffdst"\n'),
        ]
    ):
        copy = place / f"damaged{number}"
        shutil.copytree(run, copy)
        if damage is None:
            (copy / name).unlink()
        else:
            (copy / name).write_bytes(damage)
        if name.startswith("checkpoint"):
            (copy / "summary.json").unlink()
            shutil.rmtree(copy / "checkpoint.old", ignore_errors=True)
        found.append(copy)
    (place / "empty").mkdir()
    (place / "file").write_text("x")
    return [*found, place / "empty", place / "file", place / "missing"]


class Cases:
    """Draws command lines; `place` is theirs to write in."""

    def __init__(self, seed: int, place: Path, runs: list[Path]) -> None:
        self.chance, self.place, self.runs, self.number = random.Random(seed), place, runs, 0

    def fresh(self) -> str:
        self.number += 1
        return str(self.place / f"out{self.number}")

    def one(self) -> list[str]:
        """A command line, without the name of the program."""
        chance = self.chance
        command = chance.choice(COMMANDS)
        words = command.split()
        if command == "run" and chance.random() < 0.5:
            words += self.trains()
        elif command in ("run", "config show", "config schema", "ablate"):
            words += self.settings()
            if command in ("run", "ablate"):
                # must not train for long if by chance all is well: this setting is refused
                words += ["--set", "federation.rounds=0", "--out", self.fresh()]
            if command == "ablate":
                words += self.some(
                    ["--seeds", self.word()], ["--slots", self.word()],
                    ["--grid", f"{self.key()}={self.word()}"],
                    ["--metric", self.word()],
                )  # fmt: skip
        elif command == "config validate":
            words += [self.config(), *self.some(["--plugin", self.plugin()], ["--swap", self.swap()])]
        elif command == "plugins show":
            words.append(self.plugin())
        elif command in ("compare", "report", "card", "diff", "export", "resume"):
            words += [
                self.folder() for _ in range(2 if command == "diff" else chance.choice([1, 1, 1, 2, 0]))
            ]
            if command in ("compare", "report"):
                words += self.some(
                    ["--budgets", self.word()], ["--target", self.word()], ["--up", self.word()],
                    ["--down", self.word()], ["--flops", self.word()],
                )  # fmt: skip
                words += ["--json"] if command == "compare" and chance.random() < 0.3 else []
            if command == "report":
                # the figures take seconds: a report that is fit to be drawn is drawn by tests of its own
                words += ["--out", str(self.place / "file")]
            if command == "export":
                words += ["--format", chance.choice(["packed", "csr", self.word()]), "--out", self.fresh()]
        elif command == "new-plugin":
            words += [self.word(), "--in", self.fresh()]
        elif command == "bench":
            words += [self.word(), "--repeats", chance.choice(["0", "-1", "x", "10001"])]
        for _ in range(chance.choice([0, 0, 0, 1, 2])):
            words.insert(chance.randint(0, len(words)), self.word())
        return [word.replace("\0", "") for word in words]

    def trains(self) -> list[str]:
        """A run that may well be valid: small, one round, and a few of its settings drawn."""
        chance = self.chance
        words = [word for setting in SMALL for word in ("--set", setting)]
        words += ["--plugin", chance.choice(NAMES)] if chance.random() < 0.7 else []
        for _ in range(chance.choice([0, 1, 1, 2, 3])):
            key = self.key()
            if not any(guard.startswith(key) for guard in GUARD):
                words += ["--set", f"{key}={chance.choice([self.word(), chance.choice(SIZES)])}"]
        words += ["--swap", self.swap()] if chance.random() < 0.3 else []
        words += ["--seed", chance.choice([*SIZES, self.word()])] if chance.random() < 0.2 else []
        words += ["--quiet"] if chance.random() < 0.3 else []
        out = chance.choice([self.fresh()] * 6 + [str(self.place / "file"), str(self.folder())])
        return [*words, "--out", out]

    def settings(self) -> list[str]:
        """Options of a configuration, of any kind."""
        options = [
            ["--plugin", self.plugin()], ["--config", self.config()], ["--swap", self.swap()],
            ["--seed", self.word()],
            ["--set", f"{self.key()}={self.word()}"], ["--set", f"{self.key()}={self.word()}"],
            ["--set", self.word()],
            [f"--{self.word()}"], ["--set"],
        ]  # fmt: skip
        return self.some(*options)

    def some(self, *options: list[str]) -> list[str]:
        return [word for option in options if self.chance.random() < 0.35 for word in option]

    def word(self) -> str:
        chance = self.chance
        if chance.random() < 0.1:
            return "".join(
                chr(chance.choice([chance.randint(1, 127), chance.randint(160, 0x2FFF)])) for _ in range(9)
            )
        return chance.choice([*WORDS, *SIZES])

    def key(self) -> str:
        return self.chance.choice(KEYS) if self.chance.random() < 0.95 else f"{self.word()}.{self.word()}"

    def plugin(self) -> str:
        return self.chance.choice(
            [*NAMES, self.word(), str(self.place / "broken.py"), str(self.place / "file")]
        )

    def swap(self) -> str:
        slot = self.chance.choice([*SLOTS, *SLOTS, self.word()])
        part = self.chance.choice([*NAMES, *NAMES, self.word(), f"{self.chance.choice(NAMES)}:{self.word()}"])
        return self.chance.choice([f"{slot}={part}"] * 9 + [self.word()])

    def folder(self) -> str:
        return str(self.chance.choice([*self.runs, self.word()]))

    def config(self) -> str:
        """A preset, a word, or a file with random content."""
        kind = self.chance.random()
        if kind < 0.3:
            return self.chance.choice([*PRESETS, self.word()])
        path = self.place / f"{self.chance.randint(0, 50)}.toml"
        lines = [f"{self.key()} = {self.value()}" for _ in range(self.chance.randint(0, 5))]
        path.write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
        return str(path)

    def value(self) -> str:
        """A value in TOML, mostly."""
        word = self.word()
        return self.chance.choice([word, toml_value(word), f"[{word}]", "{a = 1}", "[[1], {b = 2}]"])
