"""The shape of the code: short method files, a core that knows no method, nothing written twice."""

import ast
import io
import itertools
import re
import tokenize
from pathlib import Path

import pytest

from fedsparse.core.hookspecs import SLOTS
from fedsparse.core.registry import Registry

ROOT = Path(__file__).parents[2]
FILES = sorted(path for path in (ROOT / "plugins").glob("*.py") if path.stem != "__init__")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def docstring_lines(tree):
    lines = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            lines |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def code(path):
    """Lines of code: without docstrings, comments and blank lines."""
    text = path.read_text(encoding="utf-8")
    skipped = docstring_lines(ast.parse(text))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and not token.line[: token.start[1]].strip():
            skipped.add(token.start[0])
    lines = enumerate(text.splitlines(), 1)
    return [line.strip() for number, line in lines if line.strip() and number not in skipped]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_method_file_is_short(path):
    assert len(code(path)) <= 150


def test_engine_and_specifications_are_short():
    assert len(code(ROOT / "core" / "engine.py")) <= 250
    assert len(code(ROOT / "core" / "hookspecs.py")) <= 200


@pytest.mark.parametrize("path", sorted((ROOT / "core").rglob("*.py")), ids=lambda path: path.stem)
def test_core_names_no_method_and_imports_nothing_above_it(path):
    text = "\n".join(code(path))
    # fedavg is the default that resolve.py must name; the others are words of every language
    for name in {file.stem for file in FILES} - {"fedavg", "set", "random", "median"}:
        assert not re.search(rf"\b{name}\b", text), name
    assert not re.search(r"from \.+(plugins|cli)\b", text)


def test_no_two_method_files_share_six_lines():
    # a hook's signature is the specification's, and imports are no logic
    given = re.compile(r"from |import |@hookimpl|def |self, |\) -> |\w+: [\w\[\], |]+,$|.{0,2}$")

    def windows(path):
        lines = [line for line in code(path) if not given.match(line)]
        return {tuple(lines[i : i + 6]) for i in range(len(lines) - 5)}

    for one, other in itertools.combinations(FILES, 2):
        shared = windows(one) & windows(other)
        assert not shared, (one.stem, other.stem, shared)


def test_the_readme_lists_every_method_with_its_slots_and_length():
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", README, re.MULTILINE))
    for name, plugin in Registry().all():
        own = [
            slot
            for slot in [*SLOTS, "extras"]
            for part in plugin.method.parts()
            if part.slot() == slot and type(part).__module__ == plugin.module
        ]
        paper, slots, length = (cell.strip() for cell in rows[name].split(" | "))
        assert paper == plugin.method.paper
        assert slots == (", ".join(f"`{slot}`" for slot in own) or "none")
        assert int(length) == len(code(ROOT / "plugins" / f"{name}.py"))
