"""From names and settings to a validated run: presets, files, swaps and `--set`, all errors at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import BaseModel, ValidationError

from .component import Component
from .compose import compose
from .config import (
    CHOICES,
    Layer,
    Merged,
    MethodConfig,
    RunConfig,
    Tree,
    expand,
    leaves,
    load_config,
    merge,
    method_preset,
    parse_set,
    problems_of,
    to_toml,
)
from .data import DATASETS, PARTITIONS
from .errors import ConfigError, Problem, nearest
from .hookspecs import SLOTS
from .method import Method
from .models import MODELS, CustomModel
from .part import Part
from .registry import Plugin, Registry, absolute

DEFAULT_PLUGIN = "fedavg"
"""Fills the slots that a method leaves out, and runs when no plugin is named."""
OPTIONS = "--plugin", "--seed"
"""Of one setting each, which `--set` may not give otherwise."""

_TASK_CHOICES: dict[str, dict[str, type[Component]]] = {
    "dataset": DATASETS,
    "model": MODELS,
    "partition": PARTITIONS,
}
_TASK_DEFAULTS = {"dataset": "digits", "model": "cnn", "partition": "dirichlet"}


@dataclass(frozen=True)
class Resolved:
    """A run's configuration with where everything came from."""

    config: RunConfig
    method: Method
    uses: Mapping[str, str]
    swaps: Mapping[str, str]
    sources: Mapping[str, str]
    dropped: tuple[str, ...]
    extras: Mapping[str, str] = field(default_factory=dict)
    """extras beside the method's own, by class name: `plugin:Part`"""

    def tree(self) -> Tree:
        """The whole configuration as nested tables of plain values."""
        plain: Tree = self.config.model_dump(mode="json")
        for section, name in CHOICES:
            plain[section][name] = {"use": self.uses[f"{section}.{name}"], **plain[section][name]}
        extras = self.config.method.extras
        tables = {type(part).__name__: part.model_dump(mode="json") for part in extras}
        for name, use in self.extras.items():
            tables[name] = {"use": use, **tables[name]}
        plain["method"]["extras"] = tables
        return plain

    def toml(self, provenance: bool = False) -> str:
        """The configuration as TOML that `--config` accepts; with the source of each value if asked."""
        tree = self.tree()
        comments = {path: self.sources.get(path, "default") for path in _paths(tree)} if provenance else None
        return to_toml(tree, comments)


def resolve(
    plugin: str | None = None,
    configs: Sequence[str] = (),
    swaps: Sequence[str] = (),
    sets: Sequence[str] = (),
    *,
    extras: Sequence[str] = (),
    layers: Sequence[Layer] = (),
    registry: Registry | None = None,
) -> Resolved:
    """Validates a run. Later wins: defaults, the method's preset, `configs`, `swaps`, `sets`, `layers`.

    `extras` are PLUGIN or PLUGIN:Part, parts beside those of the method. Raises ConfigError with every
    problem found.
    """
    registry = registry or Registry()
    problems: list[Problem] = []
    files = _collect(load_config, configs, problems)
    changes = _collect(parse_set, sets, problems)
    swapped = _collect(parse_swap, swaps, problems)
    added = _collect(lambda text: parse_extra(text, registry), extras, problems)
    if plugin is not None:
        layers = [*layers, Layer("--plugin", {"method": {"plugin": plugin}})]
    name = _plugin_name([*files, *changes, *layers], problems)
    found = _collect(registry.load, [name, DEFAULT_PLUGIN], problems)
    if len(found) < 2:
        raise ConfigError(problems)  # without its method nothing below can be judged
    method = found[0].method
    if method is None:
        raise ConfigError([*problems, Problem("method.plugin", _no_method(name, found[0], registry))])
    preset = Layer(f"preset {name}", expand(dict(method.preset))) if method.preset else None
    if found[0].module.startswith(f"{__package__.rpartition('.')[0]}.plugins."):
        preset = method_preset(name)
    files, foreign = _for_plugin(files, name)
    merged = merge([*([preset] if preset else []), *files, *swapped, *added, *changes, *layers])
    merged.dropped[:0] = foreign
    problems += merged.problems + _repeated(swapped) + _contradicted(changes, layers)
    merged.values.setdefault("method", {})["plugin"] = absolute(name)
    return _build(merged, found[0], registry, problems)


def _contradicted(changes: Sequence[Layer], layers: Sequence[Layer]) -> list[Problem]:
    """Settings that `--set` and an option of their own give differently."""
    given = {path: (layer.source, value) for layer in changes for path, value in leaves(layer.values)}
    return [
        Problem(path, f"given by {given[path][0]} and, otherwise, by {layer.source}; give it once")
        for layer in layers
        if layer.source in OPTIONS
        for path, value in leaves(layer.values)
        if path in given and given[path][1] != value
    ]


def parse_swap(text: str) -> Layer:
    """The layer of `--swap slot=plugin` or `slot=plugin:Part`."""
    slot, equals, use = (piece.strip() for piece in text.partition("="))
    if not equals or not use or use.endswith(":"):
        raise ConfigError(f"--swap {text}: expected SLOT=PLUGIN or SLOT=PLUGIN:Part")
    if slot not in SLOTS:
        raise ConfigError(f"--swap {text}: unknown slot {slot!r}. {nearest(slot, SLOTS)}")
    return Layer(f"--swap {text}", {"method": {slot: {"use": use}}})


def parse_extra(text: str, registry: Registry) -> Layer:
    """The layer of `--extra plugin` or `plugin:Part`."""
    if not text.strip(" :") or text.strip().endswith(":"):
        raise ConfigError(f"--extra {text}: expected PLUGIN or PLUGIN:Part")
    try:
        use, part = find_extra(text.strip(), registry)
    except ConfigError as error:
        raise ConfigError(f"--extra {text}: {error}") from None
    name = (part if isinstance(part, type) else type(part)).__name__
    return Layer(f"--extra {text}", {"method": {"extras": {name: {"use": use}}}})


def find_extra(use: str, registry: Registry, wanted: str = "") -> tuple[str, Part | type[Part]]:
    """The extra that `use` names, PLUGIN or PLUGIN:Part, and its full name `plugin:Part`.

    `wanted` stands for a part that is not named; without it a plugin's only extra is meant.
    """
    name, colon, part_name = use.rpartition(":")
    if not colon:
        name, part_name = use, wanted
    plugin = registry.load(name)
    fitting = {key: cls for key, cls in plugin.parts.items() if cls.slot() == "extras"}
    if not fitting:
        with_some = [key for key, found in registry.all() if isinstance(found, Plugin) and _has_extra(found)]
        raise ConfigError(f"plugin {name!r} has no extra. Plugins that have: {', '.join(with_some)}")
    if not part_name and len(fitting) > 1:
        choices = ", ".join(f"{name}:{key}" for key in sorted(fitting))
        raise ConfigError(f"plugin {name!r} has several extras; name one: {choices}")
    part_name = part_name or next(iter(fitting))
    if part_name not in fitting:
        raise ConfigError(f"plugin {name!r} has no extra {part_name!r}. {nearest(part_name, fitting)}")
    cls = fitting[part_name]
    own = plugin.method.extras if plugin.method else ()
    part = next((part for part in own if type(part) is cls), None)
    return f"{absolute(name)}:{part_name}", part or cls


def _has_extra(plugin: Plugin) -> bool:
    return any(cls.slot() == "extras" for cls in plugin.parts.values())


def find_part(use: str, slot: str, registry: Registry) -> tuple[str, Part | type[Part]]:
    """The part that `use` names for a slot, and its full name `plugin:Part`.

    `plugin` alone means whatever that plugin's method puts in the slot.
    """
    name, colon, part_name = use.rpartition(":")
    if not colon:
        name, part_name = use, ""
    plugin = registry.load(name)
    if not part_name:
        if plugin.method is None:
            raise ConfigError(_no_method(name, plugin, registry))
        method, owner = plugin.method, name
        part = method.part(slot)
        if part is None:
            default = registry.load(DEFAULT_PLUGIN).method
            part, owner = (default.part(slot) if default else None), DEFAULT_PLUGIN
        assert part is not None  # the default method fills every slot
        return f"{absolute(owner)}:{type(part).__name__}", part
    fitting = {name: cls for name, cls in plugin.parts.items() if cls.slot() == slot}
    if part_name in fitting:
        return f"{absolute(name)}:{part_name}", fitting[part_name]
    if part_name in plugin.parts:
        raise ConfigError(
            f"part {use} fills the slot {plugin.parts[part_name].slot()}, not {slot}. "
            f"Parts of {name} for {slot}: {', '.join(sorted(fitting)) or 'none'}"
        )
    raise ConfigError(
        f"plugin {name!r} has no part {part_name!r}. {nearest(part_name, fitting or plugin.parts)}"
    )


def _build(merged: Merged, plugin: Plugin, registry: Registry, problems: list[Problem]) -> Resolved:
    """Validates every table of the merged settings and puts the run together."""
    tree = {key: dict(value) if isinstance(value, dict) else value for key, value in merged.values.items()}
    task, method_table = tree.setdefault("task", {}), tree["method"]
    uses: dict[str, str] = {}
    added: dict[str, str] = {}
    failed: set[str] = set()

    def validated(path: str, cls: type[Component], base: Tree, given: Tree) -> Component | None:
        try:
            return cls.model_validate({**base, **given})
        except ValidationError as error:
            problems.extend(_sourced(problems_of(error, path, given, cls), merged))
        failed.add(path)
        return None

    def refuse(path: str, message: str) -> None:
        failed.add(path)
        problems.extend(_sourced([Problem(path, message)], merged))

    if isinstance(task, dict):
        for name, choices in _TASK_CHOICES.items():
            table = task.get(name, {})
            if not isinstance(table, dict):
                refuse(f"task.{name}", f'given {table!r}; expected a name or a table with use = "name"')
                continue
            given = dict(table)
            use = given.pop("use", _TASK_DEFAULTS[name])
            uses[f"task.{name}"] = use
            if not isinstance(use, str):
                refuse(f"task.{name}.use", f"given {use!r}; expected the name of a {name}")
                failed.add(f"task.{name}")
            elif name == "model" and ":" in use:
                task[name] = validated(f"task.{name}", CustomModel, {"target": use}, given)
            elif use in choices:
                task[name] = validated(f"task.{name}", choices[use], {}, given)
            else:
                more = " or module:callable" if name == "model" else ""
                refuse(f"task.{name}.use", f"unknown {name} {use!r}. {nearest(str(use), choices)}{more}")
                failed.add(f"task.{name}")
    if isinstance(method_table, dict):
        for slot in SLOTS:
            path, table = f"method.{slot}", method_table.get(slot, {})
            if not isinstance(table, dict):
                refuse(path, f'given {table!r}; expected a table such as {{use = "PLUGIN"}}')
                continue
            given = dict(table)
            use = given.pop("use", method_table["plugin"])
            if not isinstance(use, str):
                refuse(f"{path}.use", f"given {use!r}; expected PLUGIN or PLUGIN:Part")
                failed.add(path)
                continue
            try:
                uses[path], part = find_part(use, slot, registry)
            except ConfigError as error:
                refuse(f"{path}.use" if "use" in table else path, str(error))
                failed.add(path)
                continue
            base = part.model_dump(exclude_unset=True) if isinstance(part, Part) else {}
            cls = type(part) if isinstance(part, Part) else part
            method_table[slot] = validated(path, cls, base, given)
        method_table["extras"] = _extras(
            method_table.get("extras", {}), plugin, registry, added, validated, refuse
        )
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        found = problems_of(error, "", tree, RunConfig)
        fresh = [p for p in found if not any(p.path == f or p.path.startswith(f"{f}.") for f in failed)]
        problems.extend(_sourced(fresh, merged))
    if problems:
        raise ConfigError(problems)
    assert plugin.method is not None
    parts = {slot: getattr(config.method, slot) for slot in SLOTS}
    method = replace(plugin.method.with_parts(**parts), extras=config.method.extras)
    compose(method).object(config)  # what cannot work together is refused now, not in a run
    own = {slot: find_part(plugin.name, slot, registry)[0] for slot in SLOTS}
    swaps = {slot: uses[f"method.{slot}"] for slot in SLOTS if uses[f"method.{slot}"] != own[slot]}
    sources = dict(merged.sources)
    for path, use in uses.items():
        sources.setdefault(f"{path}.use", "default" if path.startswith("task.") else f"method {plugin.name}")
        if path.startswith("method."):
            for name in getattr(plugin.method.part(path.partition(".")[2]), "model_fields_set", ()):
                sources.setdefault(f"{path}.{name}", f"method {use.partition(':')[0]}")
    return Resolved(config, method, uses, swaps, sources, tuple(merged.dropped), added)


def _extras(
    tables: Any, plugin: Plugin, registry: Registry, added: dict[str, str], validated: Any, refuse: Any
) -> tuple[Part, ...]:
    """The method's extra parts with the settings of `[method.extras.ClassName]`, then those that `use` adds.

    Full names of the latter go into `added`.
    """
    parts: dict[str, Part | type[Part]] = {}
    for brought in plugin.method.extras if plugin.method else ():
        parts[type(brought).__name__] = brought
    if not isinstance(tables, dict):
        refuse("method.extras", f"given {tables!r}; expected tables by part name")
        return ()
    given: dict[str, Tree] = {}
    for name, table in tables.items():
        path = f"method.extras.{name}"
        if not isinstance(table, dict):
            refuse(path, f'given {table!r}; expected a table of its settings, with use = "PLUGIN" to add it')
            continue
        given[name] = {key: value for key, value in table.items() if key != "use"}
        if "use" not in table:
            if name not in parts:
                hint = 'One of another plugin is added by --extra PLUGIN, or use = "PLUGIN" in its table'
                refuse(path, f"unknown extra. {nearest(name, parts)}. {hint}")
            continue
        try:
            if not isinstance(table["use"], str):
                raise ConfigError(f"given {table['use']!r}; expected PLUGIN or PLUGIN:Part")
            use, part = find_extra(table["use"], registry, wanted=name)
        except ConfigError as error:
            refuse(f"{path}.use", str(error))
            continue
        cls, own = part if isinstance(part, type) else type(part), parts.get(name)
        if cls.__name__ != name:
            refuse(
                f"{path}.use", f"given {table['use']!r}, which is no {name}; name the table {cls.__name__}"
            )
        elif own is None:
            parts[name], added[name] = part, use
        elif type(own) is not cls:
            refuse(f"{path}.use", f"the method {plugin.name} brings another extra of that name; rename one")
    made = [
        validated(
            f"method.extras.{name}",
            type(part) if isinstance(part, Part) else part,
            part.model_dump(exclude_unset=True) if isinstance(part, Part) else {},
            given.get(name, {}),
        )
        for name, part in parts.items()
    ]
    return tuple(part for part in made if part is not None)


def _plugin_name(layers: Iterable[Layer], problems: list[Problem]) -> str:
    name = DEFAULT_PLUGIN
    for layer in layers:
        given = _named_plugin(layer)
        if isinstance(given, str):
            name = given
        elif given is not None:
            message = f"given {given!r}; expected a name or a path (from {layer.source})"
            problems.append(Problem("method.plugin", message))
    return name


def _named_plugin(layer: Layer) -> Any:
    table = layer.values.get("method")
    return table.get("plugin") if isinstance(table, dict) else None


def _for_plugin(files: Sequence[Layer], name: str) -> tuple[list[Layer], list[str]]:
    """The files without the parts of another method than the one that runs, and what that dropped."""
    kept, dropped = [], []
    for layer in files:
        theirs = _named_plugin(layer)
        if isinstance(theirs, str) and absolute(theirs) != absolute(name):
            dropped.append(f"method ({layer.source}) dropped: it is {theirs}'s, and {name} runs")
            layer = Layer(layer.source, {k: v for k, v in layer.values.items() if k != "method"})
        kept.append(layer)
    return kept, dropped


def _repeated(swaps: Sequence[Layer]) -> list[Problem]:
    """A slot that is swapped twice."""
    slots = [slot for layer in swaps for slot in layer.values["method"]]
    twice = sorted({slot for slot in slots if slots.count(slot) > 1})
    return [Problem(f"method.{slot}", "--swap is given twice for this slot; give it once") for slot in twice]


def _collect(function: Any, arguments: Iterable[str], problems: list[Problem]) -> list[Any]:
    results = []
    for argument in arguments:
        try:
            results.append(function(argument))
        except ConfigError as error:
            problems.extend(error.problems)
    return results


def _sourced(problems: Iterable[Problem], merged: Merged) -> list[Problem]:
    """The problems, each saying which layer gave the value."""
    return [
        Problem(p.path, f"{p.message} (from {source})") if (source := merged.source(p.path, p.message)) else p
        for p in problems
    ]


def _no_method(name: str, plugin: Plugin, registry: Registry) -> str:
    extras = all(part.slot() == "extras" for part in plugin.parts.values())
    others = ", ".join(other for other in registry.names() if other != name)
    return (
        f"plugin {name!r} has parts ({', '.join(sorted(plugin.parts))}) but no METHOD; run it by "
        f"{f'--extra {name}' if extras else f'--swap SLOT={name}:Part'} on another method: {others}"
    )


def _paths(tree: Tree, prefix: str = "") -> Iterable[str]:
    for key, value in tree.items():
        yield from _paths(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]


def schema(resolved: Resolved) -> Tree:
    """JSON schema of this composition's configuration file."""
    tree = RunConfig.model_json_schema()
    definitions: Tree = tree.setdefault("$defs", {})

    def table(cls: type[BaseModel], use: Tree, **more: Any) -> Tree:
        component = cls.model_json_schema() | more
        definitions.update(component.pop("$defs", {}))
        component["properties"] = {"use": use, **component.get("properties", {})}
        return component

    task = definitions["TaskConfig"]
    for name, choices in _TASK_CHOICES.items():
        tables = [table(cls, {"const": key}, required=["use"]) for key, cls in choices.items()]
        names: Tree = {"enum": list(choices)}
        if name == "model":
            custom = {"type": "string", "pattern": ":"}
            tables.append({"type": "object", "properties": {"use": custom}, "required": ["use"]})
            names = {"anyOf": [names, custom]}
        default = _TASK_CHOICES[name][_TASK_DEFAULTS[name]]
        task["properties"][name] = {
            "anyOf": [names, *tables, table(default, {"const": _TASK_DEFAULTS[name]})]
        }
    task["required"] = []
    patterns = definitions["SparsityConfig"]["properties"]
    patterns["prunable"] = {"anyOf": [{"type": "string"}, patterns["prunable"]]}
    method = definitions[MethodConfig.__name__]
    for slot in SLOTS:
        use = resolved.uses[f"method.{slot}"]
        names = {"enum": [use, use.rpartition(":")[0]]}
        part = getattr(resolved.config.method, slot)
        method["properties"][slot] = {"anyOf": [names, table(type(part), names)]}
    extras = {type(p).__name__: type(p).model_json_schema() for p in resolved.config.method.extras}
    for name, use in resolved.extras.items():
        names = {"enum": [use, use.rpartition(":")[0]]}
        extras[name]["properties"] = {"use": names, **extras[name].get("properties", {})}
    method["properties"]["extras"] = {"type": "object", "properties": extras, "additionalProperties": False}
    method["required"] = []
    tree["required"] = []
    return tree
