"""Dataset: a data set held whole in memory as uint8, normalised on the device a batch at a time."""

from __future__ import annotations

import dataclasses
from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=64)
def _affine(
    mean: tuple[float, ...], std: tuple[float, ...], scale: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Gain and offset (c, 1, 1) of `(x / scale - mean) / std`; kept, so that a batch pays for no transfer."""
    gain = torch.tensor([1 / (scale * s) for s in std], dtype=torch.float32)
    offset = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], dtype=torch.float32)
    return gain.view(-1, 1, 1).to(device), offset.view(-1, 1, 1).to(device)


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Images and labels of one data set.

    `train_inputs`, `test_inputs`: uint8 (n, c, h, w). `train_targets`, `test_targets`: int64 (n,), in
    [0, classes). `mean`, `std`: one number a channel, of inputs divided by `scale` (the largest raw value).
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
        """`(x / scale - mean) / std`: uint8 (…, c, h, w) to float32 of that shape, on the inputs' device."""
        gain, offset = _affine(self.mean, self.std, self.scale, inputs.device)
        return torch.addcmul(offset, inputs, gain)

    def to(self, device: torch.device | str) -> Dataset:
        """The same data on `device`; tensors that are there already are shared, not copied."""
        return dataclasses.replace(
            self,
            train_inputs=self.train_inputs.to(device),
            train_targets=self.train_targets.to(device),
            test_inputs=self.test_inputs.to(device),
            test_targets=self.test_targets.to(device),
        )
