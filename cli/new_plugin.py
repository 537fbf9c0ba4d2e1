"""`fedsparse new-plugin`: an installable package with a small method that works, to be changed."""

from __future__ import annotations

import keyword
from pathlib import Path
from string import Template

from ..core.errors import ConfigError, RunError
from ..core.registry import Registry

PYPROJECT = """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "fedsparse-$dashed"
version = "0.1.0"
description = "The sparse federated training method $name, a plugin for fedsparse"
readme = "README.md"
requires-python = ">=3.11"
dependencies = ["fedsparse"]

[project.optional-dependencies]
test = ["pytest>=8.2"]

# makes the method known by its name
[project.entry-points.fedsparse]
$name = "$package"

[tool.pytest.ini_options]
testpaths = ["tests"]

[tool.ruff]
line-length = 110
"""

METHOD = '''\
"""$name: the server rewires the smallest weights at random.

Every `period` rounds, in the first half of the run, the server drops the smallest active weights and draws
as many new ones at random. Say here what is the paper's, what is your reading, and what you left out.
"""

from __future__ import annotations

from typing import ClassVar

from fedsparse import Budget, Clock, Field, Masks, Memory, Method, Params, Part, Readjusted, hookimpl, masks
from torch import Tensor


class $part(Part):
    """Drops the smallest active weights and draws as many new ones at random."""

    grows: ClassVar[bool] = True  # new weights start at 0
    site: ClassVar[str] = "server:end"  # after aggregation; also "server:start", "client"

    ratio: float = Field(default=0.2, ge=0, le=1, description="fraction of the active weights replaced")
    period: int = Field(default=10, ge=1, description="rounds between readjustments")

    @hookimpl
    def due(self, clock: Clock) -> bool:
        return clock.round % self.period == 0 and clock.round < clock.rounds // 2

    @hookimpl
    def readjust(
        self, params: Params, mask: Masks, frozen: Masks, budget: Budget, key: Tensor, memory: Memory
    ) -> Readjusted:
        sparser = budget.at(1 - (1 - budget.sparsity) * (1 - self.ratio))
        kept = masks.prune_smallest(params, mask, sparser, frozen)
        grown = masks.grow_largest(kept, masks.random_scores(mask, key), budget)
        return Readjusted(masks.apply(params, kept), grown, memory)


METHOD = Method(
    "$name",
    readjust=$part(),
    preset={"sparsity": {"target": 0.8}},
    paper="Author et al., Title, Venue Year",
)
'''

TESTS = '''\
"""Every contract of fedsparse, held against this method."""

import pytest
from fedsparse.testing import Contract, checks


@pytest.mark.parametrize("check", checks("$name"), ids=str)
def test_contract(check: Contract) -> None:
    check()
'''

README = """\
# $name

A method for fedsparse, sparse federated training in PyTorch.

```sh
pip install -e '.[test]'
fedsparse run --plugin $name                               # train with it on handwritten digits
fedsparse run --plugin pffdst --swap readjust=$name        # its readjustment in another method
fedsparse plugins show $name                               # its fields
fedsparse plugins check $name                              # every contract; also: python -m pytest
```

The method is `src/$package/__init__.py`.
"""

FILES = {
    "pyproject.toml": PYPROJECT,
    "README.md": README,
    "src/$package/__init__.py": METHOD,
    "src/$package/py.typed": "",
    "tests/test_$name.py": TESTS,
}

LONGEST = 100  # letters of a name, which names folders


def new_plugin(name: str, parent: Path) -> Path:
    """Writes the package `fedsparse-NAME` into a new folder of `parent`, which is returned.

    Raises ConfigError for a name that cannot be a plugin's, and RunError if the folder exists or cannot be
    written.
    """
    refuse_name(name)
    package = f"fedsparse_{name}"
    words = {
        "name": name,
        "dashed": name.replace("_", "-"),
        "package": package,
        "part": "".join(word.capitalize() for word in name.split("_")) + "Regrow",
    }
    folder = parent / f"fedsparse-{words['dashed']}"
    if folder.exists():
        raise RunError(f"{folder} exists; choose another name, or another place by --in FOLDER")
    try:
        for path, text in FILES.items():
            file = folder / Template(path).substitute(words)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(Template(text).substitute(words), encoding="utf-8")
    except OSError as error:
        raise RunError(f"cannot write {error.filename}: {error.strerror}") from None
    return folder


def refuse_name(name: str) -> None:
    """Raises ConfigError unless the name is a free one: lower-case letters, digits and single underscores."""
    words = name.split("_")
    plain = all(word.isascii() and word.isalnum() and word == word.lower() for word in words)
    if not plain or not name.isidentifier() or keyword.iskeyword(name):
        raise ConfigError(
            f"{name!r} cannot name a plugin: expected a Python identifier of lower-case letters, digits and "
            "single underscores, which is no word of the language, such as my_method"
        )
    if len(name) > LONGEST:
        raise ConfigError(f"a plugin's name has at most {LONGEST} letters; {name[:20]}… has {len(name)}")
    registry = Registry()
    if name in registry.names():
        raise ConfigError(f"a plugin {name!r} is installed, by {registry.source(name)}; choose another name")
