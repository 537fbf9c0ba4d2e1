"""The wheel: built, installed elsewhere, every module imported from it."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel's content in a folder of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    names = listed.stdout.splitlines() if listed.returncode == 0 else []
    if not names:
        pytest.skip("needs a git checkout, to build from what is committed")
    for name in names:
        target = source / name
        if (ROOT / name).is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    build = "from setuptools import build_meta; build_meta.build_wheel('..')"
    done = subprocess.run(
        [sys.executable, "-c", build], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_every_module_is_in_the_wheel_and_imports(installed):
    folders = ("cli", "core", "plugins")
    expected = {str(p.relative_to(ROOT)) for f in folders for p in (ROOT / f).rglob("*.py")}
    expected |= {"__init__.py", "testing.py"}
    packed = {str(p.relative_to(installed / "fedsparse")) for p in (installed / "fedsparse").rglob("*.py")}
    assert packed == expected
    presets = {str(p.relative_to(ROOT)) for p in (ROOT / "configs").rglob("*.toml")}
    assert presets == {
        str(p.relative_to(installed / "fedsparse")) for p in (installed / "fedsparse").rglob("*.toml")
    }
    kept = {str(p.relative_to(ROOT)) for p in (ROOT / "configs").rglob("*") if p.suffix in (".json", ".md")}
    assert kept
    assert all((installed / "fedsparse" / name).is_file() for name in kept)
    assert (installed / "fedsparse" / "py.typed").exists()
    modules = sorted(
        "fedsparse." + n.removesuffix(".py").replace("/", ".") for n in expected - {"__init__.py"}
    )
    modules = [m.removesuffix(".__init__") for m in modules]
    code = (
        f"import sys; sys.path.insert(0, {str(installed)!r})\n"
        f"import importlib, fedsparse\n"
        f"assert fedsparse.__file__.startswith({str(installed)!r}), fedsparse.__file__\n"
        f"for name in {modules}:\n"
        f"    module = importlib.import_module(name)\n"
        f"    assert module.__file__.startswith({str(installed)!r}), module.__file__\n"
        f"for name in fedsparse.__all__:\n    getattr(fedsparse, name)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=installed,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_wheel_has_the_entry_points_and_the_licence(installed):
    (info,) = installed.glob("fedsparse-*.dist-info")
    entries = (info / "entry_points.txt").read_text()
    for name in ("fedavg", "feddst", "pffdst"):
        assert f"{name} = fedsparse.plugins.{name}" in entries
    assert (info / "licenses" / "LICENSE").exists()
    assert not list(installed.glob("fedsparse/tests"))
