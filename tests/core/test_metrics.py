"""What a round's line says of masks, on masks that can be counted by hand."""

import pytest
import torch

from fedsparse.core.execution.exchange import Uploads
from fedsparse.core.metrics import measured
from fedsparse.core.results import Result
from fedsparse.core.state import Clock, ServerState
from fedsparse.core.trackers import numbers


def line(before, now, frozen):
    masks = [{"a": torch.tensor(a).bool(), "b": torch.tensor(b).bool()} for a, b in (before, now, frozen)]
    state = ServerState(0, {}, {}, masks[1], masks[2])
    uploads = Uploads(metrics={"loss": torch.tensor(6.0)}, steps_weight=3)
    return measured(state, masks[0], masks[1], ("a", "b"), uploads, Clock(0, 1))


def test_density_and_what_was_regrown():
    made = line(([1, 1, 0, 0], [1, 1, 1]), ([1, 0, 1, 1], [1, 0, 0]), ([1, 0, 0, 0], [0, 0, 0]))
    assert made["train_loss"] == 2
    assert made["density"] == {"a": 0.75, "b": pytest.approx(1 / 3, abs=1e-6)}
    assert made["sparsity"] == pytest.approx(3 / 7)
    assert made["regrown_fraction"] == 2 / 4  # two of a's, of four that are active
    assert made["frozen_fraction"] == 1 / 4
    assert made["mask_changed"] == 5
    assert made["mask_iou"] == 2 / 7


def test_an_empty_mask_has_nothing_regrown():
    made = line(([1], [1]), ([0], [0]), ([0], [0]))
    assert (made["regrown_fraction"], made["frozen_fraction"], made["mask_iou"]) == (0, 0, 0)


def test_numbers_by_layer_have_the_layer_in_their_name():
    metrics = {"round": 1, "density": {"a": 0.5, "b.weight": 1.0}, "clients": [1, 2], "test_loss": None}
    assert dict(numbers(metrics)) == {"density/a": 0.5, "density/b.weight": 1.0}
    result = Result(None, {}, {}, [{"round": 0}, metrics])
    assert set(result.metrics) == {"round", "density/a", "density/b.weight"}
    assert result.metrics["density/a"].tolist() == pytest.approx([float("nan"), 0.5], nan_ok=True)
