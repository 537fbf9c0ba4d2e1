"""Augmentation: exactly what a loop over images does with the same draws, of training batches only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsparse.core import rng
from fedsparse.core.data import dataset
from fedsparse.core.engine import Engine
from fedsparse.core.errors import ConfigError

MakeEngine = Callable[..., Engine]
IMAGES = {"task__dataset__channels": 3, "task__dataset__height": 8, "task__dataset__width": 10}


def images(count: int, shape: tuple[int, int, int] = (3, 32, 32)) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(
        1, 256, (count, *shape), dtype=torch.uint8, generator=generator
    )  # no zero of their own


def one_by_one(stored: Tensor, stream: Tensor) -> Tensor:
    """The reference: each image pasted into zeros, cut out and mirrored by itself."""
    count, channels, height, width = stored.shape
    out = []
    for image, (down, right, mirrored) in zip(stored, rng.bits(stream, (count, 3)).tolist(), strict=True):
        canvas = torch.zeros(channels, height + 8, width + 8, dtype=torch.uint8)
        canvas[:, 4 : 4 + height, 4 : 4 + width] = image
        top, left = down % 9, right % 9
        window = canvas[:, top : top + height, left : left + width]
        out.append(window.flip(2) if mirrored % 2 else window)
    return torch.stack(out)


def crop_flip(batch: Tensor, stream: Tensor) -> Tensor:
    """The images of one client."""
    return dataset.crop_flip(batch, stream.expand(len(batch)), torch.arange(len(batch)))


def offsets(count: int, stream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Top, left and mirrored of each image, read from where a marked pixel went."""
    marked = torch.zeros(count, 1, 16, 16, dtype=torch.uint8)
    marked[:, 0, 8, 5] = 1
    found = crop_flip(marked, stream)[:, 0].nonzero()
    assert torch.equal(found[:, 0], torch.arange(count))  # a pixel this far in is never lost
    draws = rng.bits(stream, (count, 3))
    mirrored = draws[:, 2] % 2 == 1
    column = torch.where(mirrored, 15 - found[:, 2], found[:, 2])
    return 8 + 4 - found[:, 1], 5 + 4 - column, mirrored


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (2, 5, 9)])
def test_batched_augmentation_is_the_loop_over_images(shape: tuple[int, int, int]) -> None:
    stored, stream = images(50, shape), rng.key(3, "augment", 0, 1, 2)
    before = stored.clone()
    augmented = crop_flip(stored, stream)
    assert torch.equal(augmented, one_by_one(stored, stream))
    assert torch.equal(stored, before)
    assert (augmented.shape, augmented.dtype) == (stored.shape, torch.uint8)
    assert not torch.equal(augmented, stored)


def test_no_images_stay_none() -> None:
    assert crop_flip(images(0), rng.key(0)).shape == (0, 3, 32, 32)


def test_offsets_are_uniform_and_mirroring_is_a_fair_independent_coin() -> None:
    count = 20_000
    top, left, mirrored = offsets(count, rng.key(1))
    # five standard deviations of a binomial count, for a fixed stream
    for values in (top, left):
        counts = values.bincount(minlength=9)
        assert len(counts) == 9
        assert float((counts - count / 9).abs().max()) < 5 * (count / 9 * 8 / 9) ** 0.5
    pairs = (9 * top + left).bincount(minlength=81)
    assert float((pairs - count / 81).abs().max()) < 5 * (count / 81) ** 0.5
    assert abs(int(mirrored.sum()) - count / 2) < 5 * (count / 4) ** 0.5
    assert abs(int(mirrored[top > 4].sum()) - int((top > 4).sum()) / 2) < 5 * (count / 9) ** 0.5


def inputs(engine: Engine, client: int = 0, round_: int = 0, epoch: int = 0) -> Tensor:
    return torch.cat([batch.inputs for batch in engine.task.batches(client, round_, epoch)])


def test_training_batches_are_augmented_before_they_are_normalised(make_engine: MakeEngine) -> None:
    made = make_engine(task__augment="crop-flip", seed=5, **IMAGES)
    plain = make_engine(seed=5, **IMAGES)
    task = made.task
    owned = rng.generator(5, "batches", 4, 2, 1).permutation(task.partition.train_of(2))
    stored = one_by_one(task.dataset.train_inputs[owned], rng.key(5, "augment", 4, 2, 1))
    assert torch.equal(inputs(made, 2, 4, 1), task.dataset.normalise(stored))
    black = task.dataset.normalise(torch.zeros(1, 3, 8, 10, dtype=torch.uint8))[0, 0, 0, 0]
    assert float(black) == pytest.approx(-task.dataset.mean[0] / task.dataset.std[0])  # zeros are raw
    for one, other in zip(made.task.batches(2, 4, 1), plain.task.batches(2, 4, 1), strict=True):
        assert one.inputs.shape == other.inputs.shape
        assert one.inputs.dtype == other.inputs.dtype == torch.float32
        assert torch.equal(one.targets, other.targets)


def test_draws_repeat_and_differ_by_round_client_epoch_and_seed(make_engine: MakeEngine) -> None:
    fixed: dict[str, Any] = {"task__augment": "crop-flip", "federation__shuffle": False, **IMAGES}
    made = make_engine(**fixed)
    first = inputs(made)
    inputs(made, 1)  # another client's draws come between
    assert torch.equal(first, inputs(made))
    assert torch.equal(first, inputs(make_engine(**fixed)))
    assert not torch.equal(first, inputs(made, epoch=1))
    assert not torch.equal(first, inputs(made, round_=1))
    keys = {
        int(rng.key(s, "augment", r, c, e)) for s in (0, 1) for r in (0, 1) for c in (0, 1) for e in (0, 1)
    }
    assert len(keys) == 16
    twin = replace(made.task, seed=1)
    assert not torch.equal(first, torch.cat([batch.inputs for batch in twin.batches(0, 0, 0)]))


def test_test_data_probe_and_stored_data_are_untouched(make_engine: MakeEngine) -> None:
    made, plain = make_engine(task__augment="crop-flip", **IMAGES), make_engine(**IMAGES)
    before = made.task.dataset.train_inputs.clone()
    inputs(made)
    assert torch.equal(made.task.dataset.train_inputs, before)
    for (x, y), (other_x, other_y) in zip(made.task.test_batches(), plain.task.test_batches(), strict=True):
        assert torch.equal(x, other_x)
        assert torch.equal(y, other_y)
    assert torch.equal(made.task.sample(40).inputs, plain.task.sample(40).inputs)


def test_off_by_default_and_then_batches_are_the_stored_images(make_engine: MakeEngine) -> None:
    made = make_engine(**IMAGES)
    assert made.task.augment == "none"
    owned = rng.generator(0, "batches", 2, 1, 0).permutation(made.task.partition.train_of(1))
    data = made.task.dataset
    assert torch.equal(inputs(made, 1, 2, 0), data.normalise(data.train_inputs[owned]))
    assert torch.equal(inputs(make_engine(task__augment="none", **IMAGES), 1, 2, 0), inputs(made, 1, 2, 0))


def test_a_run_trains_on_augmented_images_and_repeats(make_engine: MakeEngine) -> None:
    def trained(augment: str) -> Tensor:
        made = make_engine(task__augment=augment, federation__rounds=2, **IMAGES)
        state = [report.state for report in made.rounds(made.start())][-1]
        return torch.cat([p.flatten() for p in state.params.values()])

    augmented = trained("crop-flip")
    assert torch.equal(augmented, trained("crop-flip"))
    assert not torch.equal(augmented, trained("none"))


def test_images_that_a_crop_could_miss_are_refused(make_engine: MakeEngine) -> None:
    with pytest.raises(ConfigError, match=r"images of more than 4 pixels a side; .* of 4x10 in") as caught:
        make_engine(task__augment="crop-flip", **IMAGES | {"task__dataset__height": 4})
    assert [problem.path for problem in caught.value.problems] == ["task.augment"]


def test_sound_is_not_cropped_and_flipped(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedsparse.core.data.sources import Synthetic

    load = Synthetic.load

    def spectra(self: Synthetic, *arguments: Any) -> Any:
        made = load(self, *arguments)
        return replace(made, train_inputs=made.train_inputs.half(), test_inputs=made.test_inputs.half())

    monkeypatch.setattr(Synthetic, "load", spectra)
    make_engine(**IMAGES)
    with pytest.raises(ConfigError, match=r"in float16\. Use 'none'"):
        make_engine(task__augment="crop-flip", **IMAGES)
