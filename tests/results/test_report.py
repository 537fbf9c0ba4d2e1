"""`fedsparse report`: a page that needs nothing else, figures that show what the metrics say."""

import json
import re
import struct
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from fedsparse.core.report.columns import grouped
from fedsparse.core.report.compare import compare
from fedsparse.core.results import Result

CURVE = [None, 0.2, None, 0.4, 0.6]
NAMES = {"accuracy-rounds", "accuracy-megabytes", "sparsity", "masks", "traffic"}


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


def test_regrown_is_the_share_of_active_weights_that_are_new(figures):
    before, now = np.zeros(1000, bool), np.zeros(1000, bool)
    before[:200], now[150:400] = True, True
    overlap = (before & now).sum() / (before | now).sum()
    run = Result(None, {}, {}, [{"sparsity": 0.8, "mask_iou": 1.0}, {"sparsity": 0.75, "mask_iou": overlap}])
    share = figures.regrown(run)
    assert np.isnan(share[0])
    assert share[1] == pytest.approx((now & ~before).sum() / now.sum())


def test_runs_without_evaluations_are_drawn_without_accuracy(made, figures):
    groups = grouped([Result.load(made("a", [None, None])), Result.load(made("b", [], plugin="beta"))])
    assert {picture.name for picture in figures.draw(groups)} == {"sparsity", "masks", "traffic"}
    assert figures.draw(groups[1:]) == ()


def test_without_matplotlib_one_message_says_what_to_install(made, cli, monkeypatch):
    for module in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    folder = made("a", CURVE)
    done = cli("report", folder, "--out", "out")
    assert done.exit_code == 1
    assert "pip install 'fedsparse[plots]'" in done.output
    assert not (folder.parent / "out").exists()
    assert cli("compare", folder).exit_code == 0
