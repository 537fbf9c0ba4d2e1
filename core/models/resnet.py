"""ResNet-18 for small images."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn.functional import max_pool2d

from .architecture import Architecture, unsuited

_WIDTHS = (64, 128, 256, 512)
_BLOCKS = 2


class ResNet18(Architecture):
    """ResNet-18 with a 3x3 stem of stride 1 and no first pooling: 20 convolutions and `fc`.

    11,173,962 parameters on CIFAR-10. Source: the PFFDST code. Height and width from 8 pixels; at 8, a batch
    of a single image has one value a channel, which batch normalisation takes by its running statistics.
    """

    norm: Literal["batch", "group"] = Field(
        default="batch",
        description="Normalisation after each convolution: `batch` has running statistics that are "
        "averaged over clients, `group` has none.",
    )
    groups: int = Field(
        default=2, ge=1, le=64, description="Groups of group normalisation: 1, 2, 4, 8, 16, 32 or 64."
    )

    @field_validator("groups")
    @classmethod
    def _divides_channels(cls, groups: int) -> int:
        if _WIDTHS[0] % groups:
            raise ValueError("must be 1, 2, 4, 8, 16, 32 or 64, to divide the number of channels")
        return groups

    def build(self, input_shape: tuple[int, int, int], classes: int) -> nn.Module:
        """Layers `stem`, `stage1_block1_conv1`, `stage1_block1_norm1`, …, `fc`."""
        if min(input_shape[1:]) < 8:
            raise unsuited(
                f"resnet18 needs inputs of 8x8 pixels or more, the data set's are "
                f"{input_shape[1]}x{input_shape[2]}; use cnn or mlp"
            )
        return BasicResNet18(input_shape[0], classes, self.groups if self.norm == "group" else None)


class BasicResNet18(nn.Module):
    """Basic blocks under flat names; `groups` None means batch normalisation.

    `large_stem` puts ImageNet's 7x7 convolution and 3x3 max-pooling, both of stride 2, in front.
    """

    def __init__(self, channels: int, classes: int, groups: int | None, large_stem: bool = False) -> None:
        super().__init__()

        def add(conv: str, norm: str, inputs: int, width: int, kernel: int, stride: int) -> None:
            layer = nn.Conv2d(inputs, width, kernel, stride, padding=kernel // 2, bias=False)
            self.add_module(conv, layer)
            self.add_module(norm, nn.GroupNorm(groups, width) if groups else nn.BatchNorm2d(width))

        self.large_stem = large_stem
        add("stem", "stem_norm", channels, _WIDTHS[0], *((7, 2) if large_stem else (3, 1)))
        inputs = _WIDTHS[0]
        self.blocks: list[str] = []
        for stage, width in enumerate(_WIDTHS, start=1):
            for block in range(1, _BLOCKS + 1):
                name = f"stage{stage}_block{block}"
                stride = 2 if stage > 1 and block == 1 else 1
                add(f"{name}_conv1", f"{name}_norm1", inputs, width, 3, stride)
                add(f"{name}_conv2", f"{name}_norm2", width, width, 3, 1)
                if stride != 1:
                    add(f"{name}_shortcut", f"{name}_shortcut_norm", inputs, width, 1, stride)
                self.blocks.append(name)
                inputs = width
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) to logits (b, classes)."""
        layers = self._modules

        def apply(conv: str, norm: str, x: Tensor) -> Tensor:
            y: Tensor = getattr(self, norm)(getattr(self, conv)(x))
            return y

        x = torch.relu(apply("stem", "stem_norm", x))
        if self.large_stem:
            x = max_pool2d(x, 3, 2, 1)
        for name in self.blocks:
            y = torch.relu(apply(f"{name}_conv1", f"{name}_norm1", x))
            y = apply(f"{name}_conv2", f"{name}_norm2", y)
            if f"{name}_shortcut" in layers:
                x = apply(f"{name}_shortcut", f"{name}_shortcut_norm", x)
            x = torch.relu(x + y)
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits
