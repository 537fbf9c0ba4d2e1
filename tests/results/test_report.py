"""`fedsparse report`: a page that needs nothing else, figures that show what the metrics say."""

import io
import json
import re
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.numpy import load_file

from fedsparse.cli.main import main
from fedsparse.core import clients, mask_history
from fedsparse.core.errors import RunError
from fedsparse.core.report import maps
from fedsparse.core.report.columns import grouped
from fedsparse.core.report.compare import compare
from fedsparse.core.results import Result

CURVE = [None, 0.2, None, 0.4, 0.6]
NAMES = {"accuracy-rounds", "accuracy-megabytes", "sparsity", "masks", "traffic"}
MORE = {"density", "overlap", "upload-kinds", "clients"}


@pytest.fixture
def figures():
    pytest.importorskip("matplotlib")
    from fedsparse.core.report import figures

    return figures


class Page(HTMLParser):
    """Tags, what they refer to, and whether all are closed."""

    def __init__(self, text):
        super().__init__()
        self.links, self.open, self.tags = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "srcset", "action")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_report_is_one_page_with_its_figures(made, cli, figures):
    runs = [made("a0", CURVE), made("a1", [0.1, 0.3, 0.3, 0.5, 0.5], seed=1), made("b", CURVE, plugin="<b&>")]
    done = cli("report", *runs, "--out", "out", "--budgets", "4", "--target", "0.4")
    assert done.exit_code == 0, done.output
    out = runs[0].parent / "out"
    assert {path.name for path in out.iterdir()} == {
        "report.html",
        "compare.json",
        *(f"{n}.png" for n in NAMES),
    }
    for name in NAMES:
        png = (out / f"{name}.png").read_bytes()
        assert png.startswith(b"\x89PNG")
        width, height = struct.unpack(">II", png[16:24])
        assert width == 1120
        assert height > 400
    text = (out / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not page.open
    assert len(page.links) == len(NAMES)
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert not re.search(r"https?://|url\(|@import", text)
    assert "&lt;b&amp;&gt;" in text
    assert "<b&>" not in text
    assert "download bytes · 8 / 10 Mbit/s" in text
    tree = json.loads((out / "compare.json").read_text())
    assert tree == compare(runs, budgets=[4], target=0.4).tree()
    taken = cli("report", *runs, "--out", "out")
    assert taken.exit_code == 1
    assert "is not an empty folder" in taken.output


def test_lines_are_means_over_seeds_and_bands_deviations(made, figures):
    from matplotlib.figure import Figure

    runs = [made("a0", CURVE), made("a1", [None, 0.4, None, 0.6], seed=1, megabytes=2)]
    (group,) = grouped([Result.load(path) for path in runs])
    panel = figures.Panel("accuracy", lambda run: run.metrics["test_accuracy"], stepped=False)
    look = {"color": "black"}
    axis = Figure().subplots()
    line, label = figures._draw(axis, group, panel, False, look)
    assert label == "alpha, 2 seeds"
    assert line.get_xdata().tolist() == [2, 4]  # the fifth round is of one seed only
    assert line.get_ydata().tolist() == pytest.approx([0.3, 0.5])
    (band,) = axis.collections
    edges = band.get_paths()[0].vertices[:, 1]
    assert (edges.min(), edges.max()) == pytest.approx((0.3 - 0.02**0.5, 0.5 + 0.02**0.5))
    axis = Figure().subplots()
    line, _ = figures._draw(axis, group, panel, True, look)
    assert line.get_xdata().tolist() == [6, 12]  # megabytes: the mean of 4 and 8, of 8 and 16
    (single,) = grouped([Result.load(runs[0])])
    axis = Figure().subplots()
    figures._draw(axis, single, panel, False, look)
    assert not axis.collections


def test_what_runs_lack_is_left_out_and_said(made, figures):
    groups = grouped([Result.load(made("a", [None, None])), Result.load(made("b", [], plugin="beta"))])
    drawn = figures.draw(groups)
    assert {picture.name for picture in drawn.pictures} == {"sparsity", "masks", "traffic"}
    left_out = ["Accuracy", "Accuracy", "Density by layer", "Overlap", "Upload by kind", "Labels"]
    assert all(note.startswith(what) for note, what in zip(drawn.notes, left_out, strict=True))
    nothing = figures.draw(groups[1:])
    assert nothing.pictures == ()
    assert len(nothing.notes) == len(left_out) + 3


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """Two seeds of PFFDST and one of FedSparsify, whose layers are others."""
    root = tmp_path_factory.mktemp("played")
    for name, seed in (("pffdst", 0), ("pffdst", 1), ("fedsparsify", 0)):
        sets = {"federation.rounds": 6, "federation.local_epochs": 1, "output.masks": 3}
        pairs = [argument for path, value in sets.items() for argument in ("--set", f"{path}={value}")]
        arguments = ["run", "-q", "--plugin", name, "--seed", str(seed), *pairs]
        done = CliRunner().invoke(main, [*arguments, "--out", str(root / f"{name}{seed}")])
        assert done.exit_code == 0, done.output
    return root


def test_real_runs_have_every_picture(played, figures):
    groups = grouped([Result.load(folder) for folder in sorted(played.iterdir())])
    with_kinds = []
    for group in groups:
        runs = [
            replace(run, rounds=[{**line, **kinds(line["upload_bytes"])} for line in run.rounds])
            for run in group.runs
        ]
        with_kinds.append(replace(group, runs=tuple(runs)))
    drawn = figures.draw(with_kinds)
    assert {picture.name for picture in drawn.pictures} == NAMES | MORE
    assert drawn.notes == ()


def kinds(total):
    parts = {"mask": total // 10, "dense": total // 20, "other": 24}
    parts = {"values": total - sum(parts.values()), **parts}
    return {f"upload_{kind}_bytes": count for kind, count in parts.items()}


def test_upload_by_kind_is_a_mean_over_rounds_and_seeds(made, figures):
    groups = grouped([Result.load(made("a", CURVE)), Result.load(made("b", CURVE, seed=1))])
    lines = [
        [{**line, **kinds(total)} for line in run.rounds]
        for run, total in zip(groups[0].runs, (1000, 2000), strict=True)
    ]
    runs = tuple(replace(run, rounds=own) for run, own in zip(groups[0].runs, lines, strict=True))
    assert figures.bars._kinds(replace(groups[0], runs=runs)) == [1500 - 150 - 75 - 24, 150, 75, 24]
    assert figures.bars._kinds(groups[0]) is None  # not recorded


def test_density_maps_are_means_over_seeds(played, figures):
    fedsparsify, pffdst = grouped([Result.load(folder) for folder in sorted(played.iterdir())])
    found = figures.maps._density(pffdst)
    assert found.density.shape == (len(found.layers), 6)
    means = [np.mean([run.rounds[4]["density"][layer] for run in pffdst.runs]) for layer in found.layers]
    assert found.density[:, 4].tolist() == pytest.approx(means)
    assert found.layers != figures.maps._density(fedsparsify).layers


def test_kept_masks_have_the_overlaps_that_the_metrics_say(played):
    run = Result.load(played / "pffdst0")
    history = mask_history.load(run.path)
    assert list(history) == [0, 2, 4, 6]
    matrix = mask_history.overlaps(list(history.values()))
    assert (matrix == matrix.T).all()
    assert (np.diag(matrix) == 1).all()
    moved = [line["mask_iou"] for line in run.rounds]
    for row in range(3):
        first, second = moved[2 * row : 2 * row + 2]
        if 1.0 in (first, second):  # one step only: the metrics know the overlap
            assert matrix[row, row + 1] == pytest.approx(min(first, second))
    assert matrix.min() < 1  # it moved
    final = load_file(run.path / "mask.safetensors")
    packed = {name: np.packbits(final[name]) for name in run.rounds[0]["density"]}
    assert (history[6] == np.concatenate(list(packed.values()))).all()


def test_overlap_by_hand(tmp_path):
    masks = [[1, 1, 1, 0, 0, 0, 0, 0, 1], [0, 1, 1, 1, 0, 0, 0, 0, 1], [0] * 9]
    for played, bits in enumerate(masks):
        mask_history.keep(
            tmp_path, played, {"w": torch.tensor(bits[:8]).bool(), "v": torch.tensor(bits[8:]).bool()}
        )
    history = mask_history.load(tmp_path)
    matrix = mask_history.overlaps([*history.values(), history[2]])
    assert matrix[0, 1] == 3 / 5
    assert matrix[0, 2] == 0
    assert matrix[2, 3] == 1  # two empty ones


def test_masks_are_kept_evenly_and_few():
    assert mask_history.kept_rounds(40, 20) == set(range(0, 41, 2))
    assert mask_history.kept_rounds(3, 20) == {0, 1, 2, 3}
    assert max(mask_history.kept_rounds(997, 20)) == 997
    assert len(mask_history.kept_rounds(997, 20)) == 21
    assert mask_history.kept_rounds(10, 0) == set()


def test_a_damaged_file_is_one_message(played, cli, tmp_path):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "a"
    shutil.copytree(played / "pffdst0", folder)
    whole = (folder / "masks" / "00002.npz").read_bytes()
    other = io.BytesIO()
    np.savez(other, names=["w"], weights=[9], bits=np.zeros(3, np.uint8))
    for text in (b"", b"no archive", b"PK\x03\x04 and then not", whole[: len(whole) // 2], other.getvalue()):
        (folder / "masks" / "00002.npz").write_bytes(text)
        with pytest.raises(RunError, match=r"00002\.npz.*remove it"):
            mask_history.load(folder)
    done = cli("report", folder, "--out", "out")
    assert done.exit_code == 1
    assert "00002.npz" in done.output
    (folder / "masks" / "00002.npz").unlink()
    for text in (
        "",
        "{}",
        '{"pool": 2, "label_counts": [[1], [1, 2]]}',
        '{"pool": 1, "label_counts": [[-1]]}',
    ):
        (folder / "clients.json").write_text(text)
        with pytest.raises(RunError, match=r"clients\.json.*remove it"):
            clients.load(folder)
    (folder / "clients.json").unlink()
    done = cli("report", folder, "--out", "out")  # what they said to do
    assert done.exit_code == 0, done.output


def test_labels_are_those_of_the_clients(played, make_engine):
    held = clients.load(played / "pffdst0")
    assert held.counts.shape[0] == held.pool
    assert held.counts.shape[1] == 10
    assert held.counts.sum() > 1000
    same, other = clients.load(played / "fedsparsify0"), clients.load(played / "pffdst1")
    assert (same.counts == held.counts).all()
    assert other.counts.shape != held.counts.shape or (other.counts != held.counts).any()
    groups = grouped([Result.load(folder) for folder in sorted(played.iterdir())])
    ((names, _),) = maps._distributions(groups)  # the first seeds' partition is one
    assert names == ["fedsparsify", "pffdst"]


def test_labels_of_a_huge_pool_are_those_of_its_first_clients(make_engine, tmp_path):
    asked = []

    class Huge:
        clients = 10**12

        def train_of(self, client):
            asked.append(client)
            return np.array([0, 1, 2])

    task = replace(make_engine().task, partition=Huge())
    clients.write(tmp_path, task)
    assert asked == list(range(clients.MOST))
    held = clients.load(tmp_path)
    assert held.pool == 10**12
    assert (held.counts.sum(axis=1) == 3).all()


def test_a_resumed_run_leaves_the_files_of_an_uninterrupted_one(cli, tmp_path):
    sets = {
        "federation.rounds": 7,
        "federation.local_epochs": 1,
        "output.checkpoint_every": 3,
        "output.masks": 4,
    }
    pairs = [argument for path, value in sets.items() for argument in ("--set", f"{path}={value}")]
    assert cli("run", "-q", "--plugin", "pffdst", *pairs, "--out", "whole").exit_code == 0
    shutil.copytree("whole", "cut")
    shutil.rmtree("cut/checkpoint")
    shutil.move("cut/checkpoint.old", "cut/checkpoint")  # as if killed after round 6 of 7, while it wrote
    with open("cut/masks/00007.npz", "wb") as file:
        file.write(b"half")
    with open("cut/masks/00007.npz.new", "wb") as file:
        file.write(b"half")
    done = cli("resume", "cut", "-q")
    assert done.exit_code == 0, done.output

    def left(folder):
        files = [*Path(folder, "masks").iterdir(), Path(folder, "clients.json")]
        return {file.name: file.read_bytes() for file in files}

    assert left("cut") == left("whole")
    assert len(left("cut")) == 6
    assert (
        cli("run", "-q", "--plugin", "fedavg", *pairs, "--set", "output.masks=0", "--out", "none").exit_code
        == 0
    )
    assert not Path("none/masks").exists()


def test_reporting_imports_no_torch(made):
    pytest.importorskip("matplotlib")
    folder = made("a", CURVE)
    code = (
        "import sys\nfrom fedsparse.cli.main import main\n"
        f"main(['report', {str(folder)!r}, '--out', 'out'], standalone_mode=False)\n"
        "assert not {'torch', 'pandas'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_without_matplotlib_one_message_says_what_to_install(made, cli, monkeypatch):
    for module in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    folder = made("a", CURVE)
    done = cli("report", folder, "--out", "out")
    assert done.exit_code == 1
    assert "pip install 'fedsparse[plots]'" in done.output
    assert not (folder.parent / "out").exists()
    assert cli("compare", folder).exit_code == 0
