"""Dataset: a data set held whole in memory as stored, augmented and normalised on the device by the batch."""

from __future__ import annotations

import dataclasses
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import rng
from ..layout import Layout

MARGIN = 4
"""Pixels of zeros that `crop_flip` puts on each side of an image."""


@lru_cache(maxsize=64)
def _affine(
    mean: tuple[float, ...],
    std: tuple[float, ...],
    scale: float,
    pixels: int,
    last: bool,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Gain and offset (c·pixels,) of `(x / scale - mean) / std`, in the order in which an image lies.

    One number a value, because a flat product takes half the time of one that repeats a number a channel.
    """
    gain = torch.tensor([1 / (scale * s) for s in std], dtype=torch.float32).to(device)
    offset = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], dtype=torch.float32).to(device)
    if last:
        return gain.repeat(pixels), offset.repeat(pixels)
    return gain.repeat_interleave(pixels), offset.repeat_interleave(pixels)


def _lies_last(images: Tensor) -> bool:
    """Whether the channels are the last dimension in memory."""
    if images.dim() != 4 or images.is_contiguous():
        return False
    return images.is_contiguous(memory_format=torch.channels_last)


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Inputs and labels of one data set.

    `train_inputs`, `test_inputs`: (n, c, h, w), of the most compact type that holds them: uint8 for images,
    int16 for sound, float16 for its spectra. `train_targets`, `test_targets`: int64 (n,), in [0, classes).
    `mean`, `std`: one number a channel, of inputs divided by `scale` (the largest raw value).
    """

    name: str
    train_inputs: Tensor
    train_targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float = 255.0

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one input."""
        _, channels, height, width = self.train_inputs.shape
        return channels, height, width

    def normalise(self, inputs: Tensor) -> Tensor:
        """`(x / scale - mean) / std`: stored (…, c, h, w) to float32, on its device, in its memory order."""
        height, width = inputs.shape[-2:]
        last = _lies_last(inputs)
        gain, offset = _affine(self.mean, self.std, self.scale, height * width, last, inputs.device)
        plain = inputs.permute(0, 2, 3, 1) if last else inputs
        values = plain.to(torch.float32, copy=True).reshape(-1, len(gain))
        torch.addcmul(offset, values, gain, out=values)
        if last:
            return values.view(plain.shape).permute(0, 3, 1, 2)
        return values.view(inputs.shape)

    def train(self, chosen: Tensor) -> Tensor:
        """Stored training inputs of these indices (n,), in the memory order of the data set."""
        return taken(self.train_inputs, chosen)

    def arranged(self, layout: Layout) -> Dataset:
        """The same data with its images in this layout."""
        return dataclasses.replace(
            self,
            train_inputs=layout.arrange(self.train_inputs),
            test_inputs=layout.arrange(self.test_inputs),
        )

    def to(self, device: torch.device | str) -> Dataset:
        """The same data on `device`; tensors that are there already are shared, not copied."""
        return dataclasses.replace(
            self,
            train_inputs=self.train_inputs.to(device),
            train_targets=self.train_targets.to(device),
            test_inputs=self.test_inputs.to(device),
            test_targets=self.test_targets.to(device),
        )


def taken(inputs: Tensor, chosen: Tensor) -> Tensor:
    """The inputs of these indices (n,), in the memory order in which all of them lie."""
    if _lies_last(inputs):
        return inputs.permute(0, 2, 3, 1).index_select(0, chosen).permute(0, 3, 1, 2)
    return inputs.index_select(0, chosen)


def crop_flip(images: Tensor, streams: Tensor, places: Tensor) -> Tensor:
    """Each image (n, c, h, w) shifted by up to `MARGIN` pixels a direction, then, one time in two, mirrored.

    A window of the image's size is cut at a uniform place out of the image with `MARGIN` pixels of zeros
    around it. These are raw zeros, black, as torchvision's usual pipelines pad: normalised they are
    -mean / std, not 0. An image's draws are three of a stream: `streams` (n,), keys on the images' device,
    and `places` (n,), its place among the images of that stream.
    """
    count, channels, height, width = images.shape
    drawn = rng.bits_at(streams[:, None], places[:, None] * 3 + torch.arange(3, device=images.device))
    # 2^63 is no multiple of the 9 offsets: the bias is below 1e-18
    top, left = (drawn[:, :2] % (2 * MARGIN + 1)).unbind(1)
    rows = top[:, None] + torch.arange(height, device=images.device)
    along = torch.arange(width, device=images.device)
    columns = left[:, None] + torch.where(drawn[:, 2:] % 2 == 1, along.flip(0), along)
    image = torch.arange(count, device=images.device).view(-1, 1, 1, 1)
    channel = torch.arange(channels, device=images.device).view(-1, 1, 1)
    padded = pad(images, (MARGIN,) * 4)
    return padded[image, channel, rows.view(count, 1, height, 1), columns.view(count, 1, 1, width)]
