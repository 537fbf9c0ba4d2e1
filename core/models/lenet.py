"""The small networks of the FedDST paper's code."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import nn

from .architecture import Architecture, unsuited
from .simple import Stack

_SOFTMAX = (
    "End in a softmax although the loss applies another one, as the released code does; this damps gradients "
    "strongly. False returns logits."
)


Pixels = Annotated[int, Field(ge=1, le=8)]
"""A side of a pooling window, or its stride."""


class LeNet(Architecture):
    """LeNet with 5x5 convolutions and 3x3 max-pooling of stride 1, as in the FedDST code.

    (1, 28, 28): `MNISTNet`, 261,840 parameters for 10 classes. (3, 32, 32): `CIFAR10Net`, 782,006; with 100
    classes `CIFAR100Net`, 783,092, which has one linear layer less. `pooling = [2, 2]` makes the usual
    LeNet-5 of it: 62,006 parameters for (3, 32, 32) and 10 classes.
    """

    double_softmax: bool = Field(default=False, description=_SOFTMAX)
    pooling: tuple[Pixels, Pixels] = Field(
        default=(3, 1), description="Window and stride of max-pooling, 1 to 8 pixels each."
    )

    def build(self, input_shape: tuple[int, int, int], classes: int) -> nn.Module:
        """Layers `conv1`, `conv2`, `fc1`, `fc2` and, for (3, 32, 32) without 100 classes, `fc3`."""
        channels: tuple[int, ...]
        units: tuple[int, ...]
        if input_shape == (1, 28, 28):
            channels, units = (10, 20), (50,)
        elif input_shape == (3, 32, 32):
            channels, units = (6, 16), (120,) if classes == 100 else (120, 84)
        else:
            raise unsuited(
                f"lenet takes inputs of shape (1, 28, 28) or (3, 32, 32), the data set's are {input_shape}; "
                f"use cnn or mlp"
            )
        return Stack(
            input_shape,
            classes,
            channels=channels,
            kernel=5,
            padding=0,
            pool=self.pooling,
            units=units,
            softmax=self.double_softmax,
        )


class Conv2(Architecture):
    """The FEMNIST network of the FedDST code: two padded 5x5 convolutions, 2,048 hidden units.

    6,603,710 parameters for 62 classes.
    """

    double_softmax: bool = Field(default=False, description=_SOFTMAX)

    def build(self, input_shape: tuple[int, int, int], classes: int) -> nn.Module:
        """Layers `conv1`, `conv2`, `fc1`, `fc2`."""
        if input_shape != (1, 28, 28):
            raise unsuited(
                f"conv2 takes inputs of shape (1, 28, 28), the data set's are {input_shape}; use cnn or mlp"
            )
        return Stack(
            input_shape,
            classes,
            channels=(32, 64),
            kernel=5,
            padding=2,
            units=(2048,),
            softmax=self.double_softmax,
        )
