"""Exports give back the model: packed and csr bit for bit, ONNX within rounding; damage is refused."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import fedsparse
from fedsparse.cli.main import main
from fedsparse.core import export as exporting
from fedsparse.core import packing, task
from fedsparse.core.errors import RunError
from fedsparse.core.export import export, load_csr, load_packed
from fedsparse.core.resolve import resolve

SHORT = {"federation__rounds": 4, "federation__local_epochs": 1}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run's folder, not to be written to."""
    return fedsparse.run("pffdst", out=tmp_path_factory.mktemp("export") / "run", **SHORT).path


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    return export(run, out=tmp_path_factory.mktemp("exported"))


def same(a, b):
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype
        assert tensor.shape == b[name].shape
        flat = [t.contiguous().reshape(-1).view(torch.uint8) for t in (tensor, b[name])]
        assert torch.equal(*flat), name
    return True


def test_packed_and_csr_give_back_the_run_bit_for_bit(run, exported):
    model = load_file(run / "model.safetensors")
    assert same(model, load_packed(exported.files["packed"]))
    assert same(model, load_csr(exported.files["csr"]))
    weights, mask = sum(t.numel() for t in model.values()), load_file(run / "mask.safetensors")
    nonzero = sum(int(t.count_nonzero()) for t in model.values())
    # 4 bytes a value and a bit a weight, but for what is dense, and the header
    assert exported.sizes["packed"] < 4 * nonzero + weights / 8 + 4 * 1_000
    assert exported.sizes["packed"] == exported.files["packed"].stat().st_size
    assert sum(t.numel() for t in mask.values()) > nonzero


def test_onnx_computes_what_the_run_evaluated(run, exported):
    import onnxruntime

    built = task.build(resolve(configs=[str(run / "config.toml")]).config)
    session = onnxruntime.InferenceSession(exported.files["onnx"], providers=["CPUExecutionProvider"])
    logits = [session.run(None, {"input": x.numpy()})[0] for x, _ in built.test_batches(100)]
    hits = np.concatenate(logits).argmax(1) == built.dataset.test_targets.numpy()
    summary = json.loads((run / "summary.json").read_text())
    assert hits.mean() == pytest.approx(summary["final"]["test_accuracy"], abs=1e-12)


def test_the_report_measures_each_contender_on_both_batches(exported):
    assert {(row.name, row.batch) for row in exported.latencies} == {
        (name, batch)
        for name in ("PyTorch, dense", "onnxruntime", "PyTorch, linear layers as sparse_csr")
        for batch in (1, 64)
    }
    assert all(row.milliseconds > 0 for row in exported.latencies)
    assert all(row.speedup == 1 for row in exported.latencies if row.name == "PyTorch, dense")
    assert exported.sizes["dense, zipped"] < exported.sizes["dense"]


@pytest.mark.parametrize(("save", "load"), [("packed", load_packed), ("csr", load_csr)])
def test_negative_zeros_other_types_and_odd_shapes_survive(tmp_path, save, load):
    matrix = torch.zeros(9, 7)
    matrix[0, 3], matrix[8, 6], matrix[4, 4] = -0.0, 1e-45, float("nan")
    model = {
        "a/b": matrix,
        "half": torch.eye(33).to(torch.bfloat16),
        "empty": torch.empty(0, 3),
        "full": torch.ones(3, 3),
        "all/zero": torch.zeros(50, 50),
        "count": torch.tensor(5),
    }
    path = tmp_path / "m"
    stored = getattr(packing, f"save_{save}")(path, model, ["a/b", "half", "empty", "full", "all/zero"])
    assert stored == ["a/b", "half", "all/zero"]
    assert same(model, load(path))


@pytest.mark.parametrize(("kind", "load"), [("packed", load_packed), ("csr", load_csr)])
def test_a_damaged_file_is_refused_wherever_the_damage_is(tmp_path, kind, load):
    torch.manual_seed(0)
    model = {"w": torch.randn(40, 30) * (torch.rand(40, 30) < 0.2), "b": torch.randn(30)}
    path = tmp_path / "m"
    getattr(packing, f"save_{kind}")(path, model, ["w"])
    good = path.read_bytes()
    for place in range(0, len(good), 3):
        bad = bytearray(good)
        bad[place] ^= 1
        path.write_bytes(bad)
        with pytest.raises(RunError, match=r"cannot read .*export the run again|is no"):
            load(path)
    for length in (0, 7, 100, len(good) - 1):
        path.write_bytes(good[:length])
        with pytest.raises(RunError, match="cannot read"):
            load(path)
    with pytest.raises(RunError, match="cannot read"):
        load(tmp_path / "absent")
    save_file({"w": torch.zeros(1)}, path)
    with pytest.raises(RunError, match=f"is no {kind} model"):
        load(path)


def forged(path, kind, pieces, shapes):
    """A file with a right digest whose content does not fit together."""
    text = json.dumps(shapes)
    digest = packing._digest(pieces, text)
    save_file(pieces, path, {"format": f"fedsparse.{kind}", "shapes": text, "sha256": digest})


def test_sizes_are_checked_before_memory_is_taken(tmp_path):
    bits, value = torch.tensor([128], dtype=torch.uint8), torch.ones(1)
    good = {"bitmap/w": bits, "values/w": value}
    forged(tmp_path / "m", "packed", good, {"w": [2, 3]})
    assert load_packed(tmp_path / "m")["w"].tolist() == [[1, 0, 0], [0, 0, 0]]
    for pieces, shape in (
        (good, [10**9, 10**9]),
        (good, [-2, -3]),
        (good, [2.0, 3]),
        (good, "six"),
        ({**good, "values/w": torch.ones(2)}, [2, 3]),
        ({**good, "bitmap/w": torch.tensor([1], dtype=torch.uint8)}, [2, 3]),
        ({"bitmap/w": bits}, [2, 3]),
        ({**good, "values/v": value.clone()}, [2, 3]),
    ):
        forged(tmp_path / "m", "packed", pieces, {"w": shape})
        with pytest.raises(RunError, match="cannot read"):
            load_packed(tmp_path / "m")
    rows, columns = torch.tensor([0, 1, 1], dtype=torch.int32), torch.tensor([2], dtype=torch.int32)
    good = {"rows/w": rows, "columns/w": columns, "values/w": value}
    forged(tmp_path / "m", "csr", good, {"w": [2, 3]})
    assert load_csr(tmp_path / "m")["w"].tolist() == [[0, 0, 1], [0, 0, 0]]
    for pieces, shape in (
        (good, [2, 10**15]),
        (good, [2, 2]),
        (good, [3, 2]),
        (good, [6]),
        ({**good, "rows/w": torch.tensor([0, 2, 1], dtype=torch.int32)}, [2, 3]),
        ({**good, "columns/w": -columns}, [2, 3]),
    ):
        forged(tmp_path / "m", "csr", pieces, {"w": shape})
        with pytest.raises(RunError, match="cannot read"):
            load_csr(tmp_path / "m")


def test_without_onnx_only_that_format_is_missing(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(RunError, match=r"onnx is not installed: pip install 'fedsparse\[export\]'"):
        export(run, ["packed", "onnx"], tmp_path / "a")
    assert not (tmp_path / "a").exists()
    done = export(run, out=tmp_path / "b")
    assert list(done.files) == ["packed", "csr"]
    assert "fedsparse[export]" in done.notes[0]


def test_an_onnx_file_that_computes_something_else_is_not_kept(run, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "TOLERANCE", -1.0)
    with pytest.raises(RunError, match=r"logits are .* off PyTorch's"):
        export(run, ["packed", "onnx"], tmp_path / "a")
    assert list((tmp_path / "a").iterdir()) == []


NORMALISED = """
from torch import nn

def make(classes):
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(),
        nn.Linear(8 * 36, classes),
    )
"""


def test_normalisation_and_buffers_are_exported(tmp_path, monkeypatch):
    (tmp_path / "normalised_net.py").write_text(NORMALISED)
    monkeypatch.syspath_prepend(tmp_path)
    settings = {"task__model": "normalised_net:make", "sparsity__target": 0.9}
    result = fedsparse.run("fedavg", out=tmp_path / "a", **SHORT, **settings)
    done = export(result.path)
    assert list(done.files) == ["packed", "onnx", "csr"]
    read = load_packed(done.files["packed"])
    assert "1.running_var" in read
    assert same(load_file(result.path / "model.safetensors"), read)


def test_what_cannot_be_exported_is_refused(run, tmp_path, cli):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    refused = cli("export", copy, "--format", "zip")
    assert refused.exit_code == 2
    assert cli("export", copy, "--format", "packed").exit_code == 0
    again = cli("export", copy)
    assert again.exit_code == 1
    assert "name another with --out" in again.stderr
    config = (copy / "config.toml").read_text()
    (copy / "config.toml").write_text(config.replace("hidden = 128", "hidden = 64"))
    with pytest.raises(RunError, match=r"does not hold the model that config.toml describes.* fc1.bias"):
        export(copy, ["csr"], tmp_path / "x")
    (copy / "model.safetensors").write_bytes(b"no")
    with pytest.raises(RunError, match=r"cannot read .*model.safetensors"):
        export(copy, out=tmp_path / "x")
    (copy / "model.safetensors").unlink()
    with pytest.raises(RunError, match=r"has no model.safetensors: its run did not end"):
        export(copy, out=tmp_path / "x")


def test_the_command_offers_every_format_and_prints_the_report(run, tmp_path, cli):
    (option,) = [p for p in main.commands["export"].params if p.name == "formats"]
    assert sorted(option.type.choices) == sorted(exporting.FORMATS)
    done = cli("export", run, "--out", tmp_path / "x")
    assert done.exit_code == 0, done.output
    for words in ("equal bit for bit", "packed, zipped", "onnxruntime", "dense / this"):
        assert words in done.stdout
