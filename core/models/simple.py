"""Plain stacks of convolutions and linear layers, and the two that fit any small image."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from .architecture import Architecture, unsuited
from .pooling import max_pool

Width = Annotated[int, Field(ge=1, le=65_536)]
"""Channels or units of one layer."""

Rate = Annotated[float, Field(ge=0.0, lt=1.0)]
"""Of dropout."""


class Stack(nn.Module):
    """Convolutions `conv1`, …, each followed by max-pooling and ReLU, then linear layers `fc1`, ….

    `channels` and `units` are the widths of convolutions and of hidden linear layers; `pool` is the window
    and the stride. The last linear layer gives `classes` logits, or probabilities with `softmax`.
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        classes: int,
        *,
        channels: Sequence[int] = (),
        kernel: int = 3,
        padding: int = 1,
        pool: tuple[int, int] = (2, 2),
        units: Sequence[int] = (),
        softmax: bool = False,
    ) -> None:
        super().__init__()
        width, *size = input_shape
        self.pool, self.softmax = pool, softmax
        self.convs = [f"conv{i}" for i in range(1, len(channels) + 1)]
        for name, out in zip(self.convs, channels, strict=True):
            self.add_module(name, nn.Conv2d(width, out, kernel, padding=padding))
            size = [(n + 2 * padding - kernel + 1 - pool[0]) // pool[1] + 1 for n in size]
            if min(size) < 1:
                raise unsuited(
                    f"nothing is left of {input_shape[1]}x{input_shape[2]} inputs after {name} and its "
                    f"pooling; use fewer convolutions"
                )
            width = out
        width *= size[0] * size[1]
        self.linears = [f"fc{i}" for i in range(1, len(units) + 2)]
        for name, out in zip(self.linears, [*units, classes], strict=True):
            self.add_module(name, nn.Linear(width, out))
            width = out

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) to (b, classes)."""
        for name in self.convs:
            # ReLU and max-pooling commute; this order applies ReLU to the smaller tensor
            x = torch.relu(max_pool(getattr(self, name)(x), *self.pool))
        x = x.flatten(1)
        for name in self.linears[:-1]:
            x = torch.relu(getattr(self, name)(x))
        x = getattr(self, self.linears[-1])(x)
        return x.softmax(dim=1) if self.softmax else x


class Mlp(Architecture):
    """Linear layers with ReLU between them, for inputs of any shape.

    `hidden = [128, 128]` on (1, 28, 28) is FedSparsify's FashionMNIST net, 118,282 parameters.
    """

    hidden: tuple[Width, ...] = Field(
        default=(200, 200),
        max_length=16,
        description="Units of each hidden layer, 1 to 65,536, at most 16 layers; empty is a linear model.",
    )

    def build(self, input_shape: tuple[int, int, int], classes: int) -> nn.Module:
        """Layers `fc1`, `fc2`, …."""
        return Stack(input_shape, classes, units=self.hidden)


class Cnn(Architecture):
    """3x3 convolutions with ReLU and 2x2 max-pooling, one hidden linear layer: for any small image."""

    widths: tuple[Width, ...] = Field(
        default=(32, 64),
        min_length=1,
        max_length=16,
        description="Channels of each convolution, 1 to 65,536 each; each halves height and width.",
    )
    hidden: Width = Field(default=128, description="Units of the hidden linear layer, 1 to 65,536.")

    def build(self, input_shape: tuple[int, int, int], classes: int) -> nn.Module:
        """Layers `conv1`, `conv2`, …, `fc1`, `fc2`."""
        return Stack(input_shape, classes, channels=self.widths, units=(self.hidden,))


class DropoutCnn(Architecture):
    """Two unpadded 3x3 convolutions of 32 and 64 channels, one 2x2 max-pooling, dropout, 128 hidden units.

    1,626,442 parameters for (3, 32, 32) and 10 classes: the CIFAR-10 benchmark's network of pfl-research.
    """

    dropout: tuple[Rate, Rate] = Field(
        default=(0.25, 0.5),
        description="Rates of dropout behind the pooling and behind the hidden units, in [0, 1).",
    )

    def build(self, input_shape: tuple[int, int, int], classes: int) -> nn.Module:
        """Layers `conv1`, `conv2`, `fc1`, `fc2`; height and width from 6 pixels."""
        channels, height, width = input_shape
        if min(height, width) < 6:
            raise unsuited(
                f"cnn-dropout needs inputs of 6x6 pixels or more, the data set's are {height}x{width}; "
                f"use mlp"
            )
        layers: dict[str, nn.Module] = {
            "conv1": nn.Conv2d(channels, 32, 3),
            "relu1": nn.ReLU(),
            "conv2": nn.Conv2d(32, 64, 3),
            "relu2": nn.ReLU(),
            "pool": nn.MaxPool2d(2),
            "dropout1": nn.Dropout(self.dropout[0]),
            "flatten": nn.Flatten(),
            "fc1": nn.Linear(64 * ((height - 4) // 2) * ((width - 4) // 2), 128),
            "relu3": nn.ReLU(),
            "dropout2": nn.Dropout(self.dropout[1]),
            "fc2": nn.Linear(128, classes),
        }
        return nn.Sequential(OrderedDict(layers))
