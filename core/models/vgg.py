"""Stacks of padded 3x3 convolutions with batch normalisation, for CIFAR images: VGG-16 and a smaller one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

from .architecture import Architecture, unsuited


class CifarCnn(Architecture):
    """Six 3x3 convolutions in pairs, max-pooling after each pair, and 512 hidden units.

    1,609,930 parameters for (3, 32, 32) and 10 classes. Source: the FedSparsify code. Batch normalisation
    follows the first two poolings.
    """

    dropout: float = Field(
        default=0.2, ge=0.0, lt=1.0, description="Rate of dropout behind the hidden units, in [0, 1)."
    )

    def build(self, input_shape: tuple[int, int, int], classes: int) -> nn.Module:
        """Layers `conv1` to `conv6`, `norm2`, `norm4`, `fc1`, `fc2`; height and width from 8 pixels."""
        _need_pixels("cifar-cnn", input_shape, 8)
        return _Convolutions(
            input_shape,
            classes,
            widths=(64, 64, 128, 128, 128, 128),
            pooled=(2, 4, 6),
            normed=(2, 4),
            hidden=(512,),
            dropout=self.dropout,
        )


class Vgg16(Architecture):
    """VGG-16 for CIFAR: 13 convolutions, each with batch normalisation, and one linear layer.

    14,774,436 parameters for (3, 32, 32) and 100 classes. Source: the FedSparsify code.
    """

    def build(self, input_shape: tuple[int, int, int], classes: int) -> nn.Module:
        """Layers `conv1`, `norm1`, …, `conv13`, `norm13`, `fc1`; height and width from 32 pixels."""
        _need_pixels("vgg16", input_shape, 32)
        return _Convolutions(
            input_shape,
            classes,
            widths=(64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512),
            pooled=(2, 4, 7, 10, 13),
            normed=range(1, 14),
            norm_first=True,
        )


def _need_pixels(name: str, input_shape: tuple[int, int, int], least: int) -> None:
    if min(input_shape[1:]) < least:
        raise unsuited(
            f"{name} needs inputs of {least}x{least} pixels or more, the data set's are "
            f"{input_shape[1]}x{input_shape[2]}; use cnn or mlp"
        )


class _Convolutions(nn.Module):
    """Convolutions with ReLU; `pooled` and `normed` number those behind which pooling and norm stand.

    The norm comes before the ReLU with `norm_first`, else after the pooling.
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        classes: int,
        *,
        widths: Sequence[int],
        pooled: Sequence[int],
        normed: Sequence[int],
        norm_first: bool = False,
        hidden: Sequence[int] = (),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.convs, self.pooled, self.normed = len(widths), set(pooled), set(normed)
        self.norm_first, self.dropout = norm_first, dropout
        inputs, height, width = input_shape
        for i, channels in enumerate(widths, start=1):
            self.add_module(f"conv{i}", nn.Conv2d(inputs, channels, 3, padding=1))
            if i in self.normed:
                self.add_module(f"norm{i}", nn.BatchNorm2d(channels))
            inputs = channels
        units = inputs * (height >> len(self.pooled)) * (width >> len(self.pooled))
        self.linears = [f"fc{i}" for i in range(1, len(hidden) + 2)]
        for name, out in zip(self.linears, [*hidden, classes], strict=True):
            self.add_module(name, nn.Linear(units, out))
            units = out

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) to logits (b, classes)."""
        for i in range(1, self.convs + 1):
            x = getattr(self, f"conv{i}")(x)
            if i in self.normed and self.norm_first:
                x = getattr(self, f"norm{i}")(x)
            x = torch.relu(x)
            if i in self.pooled:
                x = nn.functional.max_pool2d(x, 2)
            if i in self.normed and not self.norm_first:
                x = getattr(self, f"norm{i}")(x)
        x = x.flatten(1)
        for name in self.linears[:-1]:
            x = nn.functional.dropout(torch.relu(getattr(self, name)(x)), self.dropout, self.training)
        logits: Tensor = getattr(self, self.linears[-1])(x)
        return logits
