"""The registry: plugins by name, found through entry points and loaded only when used."""

from __future__ import annotations

import importlib.util
import os
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from .errors import ConfigError, nearest

if TYPE_CHECKING:
    from .method import Method
    from .part import Part

GROUP = "fedsparse"
RESTRICT = "FEDSPARSE_PLUGINS"


@dataclass(frozen=True)
class Plugin:
    """A loaded plugin: its method, if it has one, and every part that it defines or uses, by class name."""

    name: str
    source: str
    module: str
    method: Method | None
    parts: dict[str, type[Part]]


@dataclass
class Registry:
    """Plugins of the entry-point group `fedsparse`, and local files by path."""

    loaded: dict[str, Plugin] = field(default_factory=dict)
    clashes: dict[str, str] = field(default_factory=dict)

    @cached_property
    def entries(self) -> dict[str, EntryPoint]:
        """Entry points by name, restricted by FEDSPARSE_PLUGINS (names separated by commas)."""
        found: dict[str, EntryPoint] = {}
        for entry in entry_points(group=GROUP):
            if entry.name in found and found[entry.name].value != entry.value:
                self.clashes[entry.name] = f"{_source(found[entry.name])} and {_source(entry)}"
            found[entry.name] = entry
        wanted = os.environ.get(RESTRICT)
        if wanted is None:
            return found
        names = {name.strip() for name in wanted.split(",")} | {"fedavg"}  # every method's default parts
        return {name: entry for name, entry in found.items() if name in names}

    def names(self) -> list[str]:
        """Names of all plugins, without importing one."""
        return sorted(self.entries)

    def source(self, name: str) -> str:
        """Distribution and version that brings a plugin."""
        return self.clashes.get(name) or _source(self.entries[name])

    def load(self, reference: str) -> Plugin:
        """The plugin of a name, or of the path of a Python file. Raises ConfigError with what to do."""
        if reference not in self.loaded:
            self.loaded[reference] = (
                self._load_file(Path(reference)) if is_path(reference) else self._load_entry(reference)
            )
        return self.loaded[reference]

    def _load_entry(self, name: str) -> Plugin:
        if name not in self.entries:
            restricted = f" ({RESTRICT} restricts the choice)" if RESTRICT in os.environ else ""
            raise ConfigError(
                f"unknown plugin {name!r}{restricted}. {nearest(name, self.entries)}. "
                "A file of your own is given by its path, such as ./mine.py"
            )
        if name in self.clashes:
            raise ConfigError(f"plugin {name!r} is claimed by {self.clashes[name]}; uninstall one of them")
        try:
            module = self.entries[name].load()
        except (Exception, SystemExit) as error:
            raise ConfigError(
                f"plugin {name!r} ({self.source(name)}) fails to import: {describe(error)}"
            ) from error
        return _read(name, self.source(name), module)

    def _load_file(self, path: Path) -> Plugin:
        if not path.is_file():
            raise ConfigError(f"plugin {path}: {'is a folder' if path.is_dir() else 'there is no such file'}")
        path = path.resolve()
        name = f"fedsparse_local_{path.stem}_{blake2b(str(path).encode(), digest_size=4).hexdigest()}"
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise ConfigError(f"plugin {path}: not a Python file; its name must end in .py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # classes defined in it must be found when pickled
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            del sys.modules[name]
            raise ConfigError(f"plugin {path} fails to import: {describe(error)}") from error
        return _read(str(path), str(path), module)

    def all(self) -> Iterator[tuple[str, Plugin | ConfigError]]:
        """Every plugin, or why it cannot be loaded."""
        for name in self.names():
            try:
                yield name, self.load(name)
            except ConfigError as error:
                yield name, error


def is_path(reference: str) -> bool:
    """Whether a plugin reference is a file rather than a name."""
    return reference.endswith(".py") or "/" in reference


def absolute(reference: str) -> str:
    """The reference with a path made absolute, so that a written configuration works from anywhere."""
    return str(Path(reference).resolve()) if is_path(reference) else reference


def _source(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.value


def describe(error: BaseException) -> str:
    """One line for an exception of foreign code: type, message, and the line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    outer = [frame for frame in frames if "importlib" not in frame.filename]
    # the plugin's own line says more than the line of a library that it called
    outer = [frame for frame in outer if "site-packages" not in frame.filename] or outer
    place = f" ({Path(outer[-1].filename).name}:{outer[-1].lineno})" if outer else ""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}{place}" if message else f"{type(error).__name__}{place}"


def _read(name: str, source: str, module: ModuleType) -> Plugin:
    from .method import Method
    from .part import Part

    method = getattr(module, "METHOD", None)
    if method is not None and not isinstance(method, Method):
        raise ConfigError(f"plugin {name!r}: METHOD is {method!r}; expected a fedsparse.Method")
    classes = [type(part) for part in method.parts()] if method else []
    classes += [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__]
    listed = getattr(module, "PARTS", ())
    if not isinstance(listed, list | tuple) or not all(isinstance(c, type) for c in listed):
        raise ConfigError(f"plugin {name!r}: PARTS is {listed!r}; expected a list of Part classes")
    parts = {c.__name__: c for c in [*classes, *listed] if issubclass(c, Part)}
    if method is None and not parts:
        raise ConfigError(f"plugin {name!r}: the module has neither METHOD nor a Part")
    for part in parts.values():
        try:
            part.slot()
        except TypeError as error:
            raise ConfigError(f"plugin {name!r}: {error}") from None
    return Plugin(name, source, module.__name__, method, parts)
