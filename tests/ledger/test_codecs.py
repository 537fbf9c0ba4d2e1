"""Mask codecs: bytes by hand, round trips, sizes, corrupt data."""

from __future__ import annotations

import pytest
import torch

from fedsparse.core.errors import RunError
from fedsparse.core.ledger import Codec, decode_masks, encode_masks, masks_size
from fedsparse.core.ledger.codecs import masks_sizes

SHAPES = [(), (1,), (0,), (7,), (8,), (3, 5), (10, 3, 5, 5), (70, 300)]
DENSITIES = [0.0, 0.003, 0.05, 0.2, 0.5, 0.9, 0.99, 1.0]


def on(size: int, *positions: int) -> torch.Tensor:
    mask = torch.zeros(size, dtype=torch.bool)
    mask[list(positions)] = True
    return mask


def random_masks(density: float, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"w{i}": torch.rand(shape, generator=generator) < density for i, shape in enumerate(SHAPES)}


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("flips", [None, 0.0, 0.01, 1.0])
def test_round_trip_and_size(density: float, flips: float | None) -> None:
    """Any mask comes back, against any reference, and its size is known without encoding it."""
    masks = random_masks(density, 1)
    reference = None
    if flips is not None:
        reference = {name: masks[name] ^ flip for name, flip in random_masks(flips, 2).items()}
    data = encode_masks(masks, reference)
    assert masks_size(masks, reference) == len(data)
    back = decode_masks(data, {name: mask.shape for name, mask in masks.items()}, reference)
    assert list(back) == list(masks)
    for name, mask in masks.items():
        assert back[name].dtype == torch.bool
        assert torch.equal(back[name], mask)


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("size", [1, 300, 2**14])
def test_sizes_of_stacked_masks_are_those_of_each(density: float, size: int) -> None:
    generator = torch.Generator().manual_seed(3)
    stack = {"a": torch.rand(5, size, generator=generator) < density, "b": torch.ones(5, 2, 2).bool()}
    for reference in (None, {name: each[1] for name, each in stack.items()}):
        each = [{name: rows[at] for name, rows in stack.items()} for at in range(5)]
        assert masks_sizes(stack, reference).tolist() == [len(encode_masks(own, reference)) for own in each]


@pytest.mark.parametrize(
    ("mask", "reference", "codec", "data"),
    [
        (on(12, 0, 3, 4, 9), None, Codec.BITMAP, "00 1902"),
        (on(300, 0, 5, 299), None, Codec.ACTIVE, "01 03 00 04 a502"),
        (~on(300, 0, 5, 299), None, Codec.INACTIVE, "02 03 00 04 a502"),
        (~on(300, 0, 5, 299), ~on(300, 5, 299), Codec.CHANGED, "03 01 00"),
        (on(300), None, Codec.ACTIVE, "01 00"),
        (~on(300), None, Codec.INACTIVE, "02 00"),
        (on(1, 0), None, Codec.BITMAP, "00 01"),
        (on(20000, 19999), None, Codec.ACTIVE, "01 01 9f9c01"),
        (on(0), None, Codec.BITMAP, "00"),
    ],
)
def test_bytes_by_hand(mask: torch.Tensor, reference: torch.Tensor | None, codec: Codec, data: str) -> None:
    """Each codec is the shortest somewhere, and writes what its documentation says."""
    base = None if reference is None else {"w": reference}
    assert encode_masks({"w": mask}, base).hex() == data.replace(" ", "")
    assert bytes.fromhex(data)[0] == codec


def test_order_is_flat_whatever_the_strides() -> None:
    """Positions are row-major also in channels-last memory."""
    mask = torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)) < 0.3
    assert encode_masks({"w": mask.to(memory_format=torch.channels_last)}) == encode_masks({"w": mask})


def test_every_truncation_raises() -> None:
    """A message cut anywhere, or one byte too long, is refused."""
    masks = random_masks(0.05, 3)
    reference = {name: mask.clone() for name, mask in masks.items()}
    reference["w7"][0, :5] ^= True
    shapes = {name: mask.shape for name, mask in masks.items()}
    for base in (None, reference):
        data = encode_masks(masks, base)
        for size in range(len(data)):
            with pytest.raises(RunError, match="corrupt message"):
                decode_masks(data[:size], shapes, base)
        with pytest.raises(RunError, match="1 bytes too many"):
            decode_masks(data + b"\0", shapes, base)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("00 1912", "padding"),
        ("04 00", "codec 4"),
        ("03 00", "needs a reference"),
        ("01 0d 00", "above 12"),
        ("01 02 00 0b", "12 positions, 12 is named"),
        ("01 02 05 8b", "without end"),
        ("01 7f 00", "above 12"),
        ("01 0c 00", "12 numbers expected, 1 bytes left"),
    ],
)
def test_corrupt_data_raises(data: str, message: str) -> None:
    """Every rule of the format is checked."""
    with pytest.raises(RunError, match=message):
        decode_masks(bytes.fromhex(data), {"w": torch.Size([12])})


def test_long_forms_raise() -> None:
    """A number has one spelling, so a mask has at most one message a codec."""
    shapes = {"w": torch.Size([300])}
    assert decode_masks(bytes.fromhex("010105"), shapes)["w"].nonzero().tolist() == [[5]]
    for data in ("01018500", "01810005"):
        with pytest.raises(RunError, match="shortest form"):
            decode_masks(bytes.fromhex(data), shapes)
    with pytest.raises(RunError, match="number above 300"):
        decode_masks(bytes.fromhex("0101ad02"), shapes)


def test_random_bytes_raise_nothing_else() -> None:
    """Noise is a mask or a RunError."""
    generator = torch.Generator().manual_seed(4)
    shapes = {"a": torch.Size([200]), "b": torch.Size([3])}
    reference = {"a": on(200, 1), "b": on(3)}
    refused = 0
    for _ in range(2000):
        noise = torch.randint(0, 256, (6,), generator=generator, dtype=torch.uint8)
        noise[0] %= 5
        try:
            decode_masks(noise.numpy().tobytes(), shapes, reference)
        except RunError:
            refused += 1
    assert 1900 < refused <= 2000


def test_reference_of_another_shape_raises() -> None:
    """numpy would broadcast it."""
    with pytest.raises(RunError, match="no reference of its shape"):
        encode_masks({"w": on(4)}, {"w": on(1)})
    with pytest.raises(RunError, match="no reference of its shape"):
        masks_size({"w": on(4)}, {})
