"""The configuration of a run: its schema, and layers of settings merged with their provenance.

A setting is found by its dotted path. Tables that hold a `use` key (dataset, model, partition and the five
slots) choose a component: a layer that sets `use` replaces the whole table of the layers below.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, field_validator, model_validator

from .budget import Allocation
from .component import Component
from .errors import ConfigError, Problem, nearest
from .hookspecs import SLOTS
from .part import Part
from .schedule import LearningRateSchedule

Tree = dict[str, Any]

CHOICES: tuple[tuple[str, str], ...] = (
    ("task", "dataset"),
    ("task", "model"),
    ("task", "partition"),
    *(("method", slot) for slot in SLOTS),
)
"""Tables that choose a component by `use`."""

TABLES = ("task", "federation", "sparsity", "method", "faults", "execution", "ledger", "output")
"""Sections of a configuration; `seed` alone is a plain value."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class TaskConfig(Section):
    """What is learned."""

    dataset: SerializeAsAny[Component] = Field(description="data set and its settings")
    data_root: Path = Field(Path("data"), description="folder of torchvision data sets")
    download: bool = Field(False, description="download a data set that is missing")
    model: SerializeAsAny[Component] = Field(description="network and its settings, or module:callable")
    partition: SerializeAsAny[Component] = Field(description="how samples are dealt to clients")
    augment: Literal["none", "crop-flip"] = Field(
        "none",
        description="'crop-flip' shifts training images by up to 4 pixels, zeros moving in, and mirrors half "
        "of them, anew each local epoch",
    )


class FederationConfig(Section):
    """Who trains, how long and how fast."""

    clients: int = Field(50, ge=1, le=10**15, description="clients in the pool")
    clients_per_round: int = Field(10, ge=1, le=10**7, description="clients sampled a round")
    replacement: bool = Field(
        False,
        description="sample with replacement, as the FedDST and PFFDST codes do: a client can train twice",
    )
    rounds: int = Field(300, ge=1, description="communication rounds")
    local_epochs: int = Field(2, ge=1, description="passes over a client's data a round")
    batch_size: int = Field(16, ge=1, le=2**31 - 1, description="samples a local step")
    shuffle: bool = Field(
        True, description="draw the batches anew each local epoch; false repeats fixed ones"
    )
    learning_rate: float = Field(0.1, gt=0, description="of the local steps, in round 0")
    learning_rate_schedule: LearningRateSchedule = Field("constant", description="over rounds")
    learning_rate_final: float | None = Field(
        None, ge=0, description="rate that the schedule ends at; needed unless it is constant"
    )
    momentum: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="local; the buffer starts at zero every round, unless the method keeps it",
    )
    weight_decay: float = Field(0.0, ge=0, description="L2 coefficient, on every parameter")

    @model_validator(mode="after")
    def _consistent(self) -> FederationConfig:
        if self.clients_per_round > self.clients:
            raise ValueError(
                f"clients_per_round is {self.clients_per_round}, but the pool has clients = {self.clients}; "
                "sample fewer or enlarge the pool"
            )
        if (self.learning_rate_schedule == "constant") != (self.learning_rate_final is None):
            raise ValueError("learning_rate_final goes with a learning_rate_schedule that is not constant")
        if self.learning_rate_schedule == "exponential" and not self.learning_rate_final:
            raise ValueError("an exponential learning_rate_schedule needs learning_rate_final > 0")
        return self


class SparsityConfig(Section):
    """How sparse, and where."""

    target: float = Field(0.0, ge=0, lt=1, description="final fraction of prunable weights that are zero")
    allocation: Allocation = Field(
        "erk", description="how active weights are dealt to layers; 'scaled' is the FedDST code's rule"
    )
    prunable: tuple[str, ...] = Field(
        ("weights",),
        min_length=1,
        description="'weights' (of every convolution and linear layer), 'all' parameters, or name patterns",
    )
    rescale_init: bool = Field(
        False,
        description="scale each masked layer's initial weights so that the layer keeps the norm it had when "
        "dense; the papers do not, and deep or narrow networks then start slowly at high sparsity",
    )

    @field_validator("prunable", mode="before")
    @classmethod
    def _one_name(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value


class FaultsConfig(Section):
    """What happens to sampled clients. Draws are keyed by seed, round and client, so every method meets the
    same."""

    dropout: float = Field(
        0.0, ge=0, le=1, description="probability that a sampled client leaves after its download"
    )
    deadline: float | None = Field(
        None,
        gt=0,
        description="time that clients have to train, in times of a client of mean data at median speed; who "
        "needs more is left out; unset: the server waits for everybody",
    )
    speed_spread: float = Field(
        0.0,
        ge=0,
        le=10,
        description="standard deviation of the logarithm of clients' speeds, each the same in all rounds; 0: "
        "who has more data needs longer and nothing else counts. With a deadline",
    )
    upload_failure: float = Field(0.0, ge=0, le=1, description="probability that a sent upload is lost")
    non_finite: Literal["stop", "drop"] = Field(
        "stop",
        description="a client whose loss or model becomes NaN or infinite: 'stop' the run, or 'drop' the "
        "client for this round, which costs a check of each client after each local epoch",
    )

    @model_validator(mode="after")
    def _consistent(self) -> FaultsConfig:
        if self.speed_spread and self.deadline is None:
            raise ValueError(
                f"speed_spread = {self.speed_spread:g} changes nothing without a deadline; set "
                "faults.deadline, for example to 2"
            )
        return self


class ExecutionConfig(Section):
    """Where it runs."""

    device: str = Field("auto", description="auto (a GPU if there is one), cpu, cuda or cuda:N")
    threads: int = Field(1, ge=1, le=1024, description="CPU threads; more than one rarely pays")
    contracts: bool = Field(True, description="check what hooks return")
    executor: Literal["auto", "sequential", "vectorised", "graph"] = Field(
        "auto",
        description="'sequential': clients one after another; 'vectorised': stacked, stepped together; "
        "'graph': steps replayed as CUDA graphs, several clients side by side; 'auto': sequential or "
        "vectorised by the size of a step and the device; the run's header says why",
    )
    chunk: int | None = Field(
        None,
        ge=1,
        description="clients that train at once; unset: as many as fit into free memory, under 'graph' at "
        "most 4",
    )
    compile: bool = Field(
        False,
        description="compile the whole step with torch.compile first, which takes a minute; for 'graph'",
    )
    replay: bool = Field(
        True,
        description="on CPUs, for models of at most 2 million parameters, from the second round on, run "
        "local steps from a recording of their operations; the results are the same to the bit. Off to look "
        "into a step",
    )
    precision: Literal["auto", "float32", "tf32", "bfloat16"] = Field(
        "auto",
        description="of products and convolutions; 'auto': tf32 on GPUs, float32 elsewhere; parameters stay "
        "float32",
    )
    channels_last: Literal["auto", "on", "off"] = Field(
        "auto", description="memory order of images and convolutions; 'auto': on for CPUs"
    )

    @field_validator("device")
    @classmethod
    def _known_device(cls, device: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
            raise ValueError(f"{device!r} is no device. Allowed: auto, cpu, cuda or cuda:N")
        return device


class LedgerConfig(Section):
    """How bytes are counted."""

    encode: bool = Field(
        False,
        description="encode and decode every message of the run and go on with what was decoded; the result "
        "is the same (slow)",
    )
    values: Literal["float32", "float16", "bfloat16"] = Field(
        "float32",
        description="type in which weights, buffers and what travels beside them are sent; the 2-byte ones "
        "round them",
    )


class OutputConfig(Section):
    """What is written."""

    root: Path = Field(
        Path("runs"), description="folder that gets a new folder a run, unless --out names one"
    )
    evaluate_every: int = Field(10, ge=1, description="rounds between evaluations; the last is always one")
    checkpoint_every: int = Field(50, ge=1, description="rounds between checkpoints")
    masks: int = Field(
        20, ge=0, description="rounds, evenly spread, whose mask is kept for the report; 0: of none"
    )


class MethodConfig(Section):
    """The method: a plugin's five parts, some of them perhaps swapped."""

    plugin: str = Field(description="name of the plugin, or path of its file")
    mask_init: SerializeAsAny[Part]
    local_step: SerializeAsAny[Part]
    freeze_policy: SerializeAsAny[Part]
    readjust: SerializeAsAny[Part]
    aggregate: SerializeAsAny[Part]
    extras: tuple[SerializeAsAny[Part], ...] = ()


class RunConfig(Section):
    """Everything that decides what a run computes."""

    seed: int = Field(0, ge=0, description="of every random draw")
    task: TaskConfig
    federation: FederationConfig = FederationConfig()
    sparsity: SparsityConfig = SparsityConfig()
    method: MethodConfig
    faults: FaultsConfig = FaultsConfig()
    execution: ExecutionConfig = ExecutionConfig()
    ledger: LedgerConfig = LedgerConfig()
    output: OutputConfig = OutputConfig()


@dataclass(frozen=True)
class Layer:
    """Settings from one source; `source` is what provenance shows."""

    source: str
    values: Tree


@dataclass
class Merged:
    """Layers on top of each other: the later wins."""

    values: Tree = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def source(self, path: str, message: str = "") -> str | None:
        """Where a value, or those inside a table that a message names (else any), came from."""
        inside = {p: s for p, s in self.sources.items() if p == path or p.startswith(f"{path}.")}
        words = set(re.findall(r"\w+", message))
        named = [s for p, s in inside.items() if p.rpartition(".")[2] in words]
        return ", ".join(dict.fromkeys(named)) or next(iter(inside.values()), None)


def merge(layers: Iterable[Layer]) -> Merged:
    """Merges layers, remembering each value's source and what a new `use` dropped."""
    merged = Merged()
    for layer in layers:
        for path in CHOICES:
            table = _get(layer.values, path)
            if isinstance(table, Mapping) and "use" in table:
                _drop(merged, path, f"{layer.source} chose {table['use']!r}")
        for leaf, value in _leaves(layer.values):
            if len(leaf) == 1 and leaf[0] in TABLES:
                message = f"given {value!r}; expected a table of settings (from {layer.source})"
                merged.problems += [Problem(leaf[0], message)] if value != {} else []
                continue
            if value == {} and isinstance(_get(merged.values, leaf), Mapping):
                continue  # an empty table changes nothing in the table below it
            _set(merged.values, leaf, value)
            merged.sources[".".join(leaf)] = layer.source
    return merged


def expand(values: Tree) -> Tree:
    """`dataset = "digits"` is short for `dataset = {use = "digits"}`."""
    expanded = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    for section, name in CHOICES:
        table = expanded.get(section)
        if isinstance(table, dict) and isinstance(table.get(name), str):
            table[name] = {"use": table[name]}
    return expanded


def read_toml(path: Path, source: str) -> Layer:
    """A layer from a TOML file. Raises ConfigError if it cannot be read."""
    try:
        return Layer(source, expand(tomllib.loads(path.read_text(encoding="utf-8"))))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None


def parse_set(text: str) -> Layer:
    """A layer from `a.b=value`; the value is TOML, or a string if it is not."""
    path, equals, raw = text.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set {text}: expected KEY=VALUE, such as --set federation.rounds=100")
    try:
        value: Any = tomllib.loads(f"value = {raw.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw.strip()
    tree: Tree = {}
    _set(tree, tuple(keys), value)
    return Layer(f"--set {path.strip()}", expand(tree))


def preset_names() -> dict[str, str]:
    """Shipped presets and the first comment line of each."""
    return {name: text.partition("\n")[0].lstrip("# ") for name, text in _presets()}


def load_config(reference: str) -> Layer:
    """The layer of `--config`: a shipped preset's name or the path of a TOML file."""
    if not reference:
        raise ConfigError("--config is empty; give a preset's name or a TOML file")
    path = Path(reference)
    if path.suffix == ".toml" or ("/" in reference and path.is_file()):
        return read_toml(path, f"config {reference}")
    shipped = dict(_presets())
    if reference not in shipped and path.is_dir():
        raise ConfigError(f"--config {reference}: is a folder; of a run, give {path / 'config.toml'}")
    if reference not in shipped:
        near = {name for name in shipped if ("/" in name) == ("/" in reference)}
        raise ConfigError(
            f"--config {reference}: no such preset. {nearest(reference, near)}; `fedsparse config list` "
            "shows all. A file of your own must end in .toml"
        )
    return Layer(f"config {reference}", expand(tomllib.loads(shipped[reference])))


def method_preset(name: str) -> Layer | None:
    """The shipped preset of a shipped method, if there is one."""
    shipped = dict(_presets())
    return Layer(f"preset {name}", expand(tomllib.loads(shipped[name]))) if name in shipped else None


def _presets() -> Iterator[tuple[str, str]]:
    root = resources.files(__package__.rpartition(".")[0]) / "configs"
    yield from sorted(_walk(root, ""))


def _walk(folder: Any, prefix: str) -> Iterator[tuple[str, str]]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _walk(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith(".toml") and entry.name != "table.toml":  # which describes a paper's table
            yield prefix + entry.name.removesuffix(".toml"), entry.read_text(encoding="utf-8")


def to_toml(
    tree: Mapping[str, Any],
    comments: Mapping[str, str] | None = None,
    prefix: str = "",
    table: tuple[str, ...] = (),
) -> str:
    """TOML text of nested tables; `comments` by dotted path follow their values. None is left out."""
    lines, tables = [], []
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            body = to_toml(value, comments, f"{path}.", (*table, key))
            has_own = any(not isinstance(v, Mapping) and v is not None for v in value.values())
            heading = ".".join(map(_toml_key, (*table, key)))
            tables.append((f"\n[{heading}]\n" if has_own or not value else "") + body)
        elif value is not None:
            note = (comments or {}).get(path)
            text = f"{_toml_key(key)} = {toml_value(value)}"
            lines.append(f"{text:<40} # {_one_line(note)}" if note else text)
    return "".join(f"{line}\n" for line in lines) + "".join(tables)


def _one_line(note: str) -> str:
    """As a comment can hold it: a source may name a file, and a file's name may have a line feed."""
    return "".join(c if c.isprintable() else " " for c in note)


def toml_value(value: Any) -> str:
    """A plain value as TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_toml_key(k)} = {toml_value(v)}" for k, v in value.items()) + "}"
    return json.dumps(str(value), ensure_ascii=False)


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key, ensure_ascii=False)


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by dotted path; an empty table counts as none."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _get(tree: Tree, path: tuple[str, ...]) -> Any:
    found: Any = tree
    for key in path:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def _set(tree: Tree, path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        if not isinstance(tree.get(key), dict):
            tree[key] = {}
        tree = tree[key]
    tree[path[-1]] = value


def _drop(merged: Merged, path: tuple[str, ...], reason: str) -> None:
    table = _get(merged.values, path)
    if not isinstance(table, dict):
        return
    dotted = ".".join(path)
    for key in table:
        source = merged.sources.pop(f"{dotted}.{key}", "")
        if key != "use":
            merged.dropped.append(f"{dotted}.{key} ({source}) dropped: {reason}")
    table.clear()


def _leaves(tree: Tree, prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*prefix, key))
        else:
            yield (*prefix, key), value


def problems_of(error: Any, prefix: str, given: Mapping[str, Any], schema: type[BaseModel]) -> list[Problem]:
    """Readable problems from a pydantic ValidationError of `schema`."""
    found = []
    for item in error.errors(include_url=False):
        # union members add their own name to the location: keep what is a key or an index
        place = [str(part) for part in item["loc"]]
        path = ".".join([prefix, *place] if prefix else place)
        if item["type"] == "extra_forbidden":
            fields = _fields_at(schema, place[:-1])
            found.append(Problem(path, f"unknown key. {nearest(place[-1], fields)}"))
        elif item["type"] == "missing":
            found.append(Problem(path, "missing; it has no default"))
        elif item["type"] == "value_error":
            found.append(Problem(path, str(item["ctx"]["error"])))
        else:
            what = item["msg"].replace("Input should be", "must be")
            what = re.sub("a valid dictionary or instance of .*", "a table of settings", what)
            found.append(Problem(path, f"{what}; given {item['input']!r}"))
    return found


def _fields_at(schema: type[BaseModel], place: list[str]) -> list[str]:
    for key in place:
        if key.isdecimal():
            continue  # a place in a list of tables
        annotation = schema.model_fields[key].annotation if key in schema.model_fields else None
        if get_origin(annotation) in (list, tuple):
            annotation = get_args(annotation)[0]
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        schema = annotation
    return list(schema.model_fields)
