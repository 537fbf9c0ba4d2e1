"""The models that a configuration can name."""

from __future__ import annotations

from ..component import Component
from .custom import CustomModel
from .lenet import Conv2, LeNet
from .resnet import ResNet18
from .simple import Cnn, Mlp

MODELS: dict[str, type[Component]] = {
    "lenet": LeNet,
    "conv2": Conv2,
    "resnet18": ResNet18,
    "cnn": Cnn,
    "mlp": Mlp,
}
"""Models by the name that a configuration uses; every entry is an `Architecture`."""

__all__ = ["MODELS", "CustomModel"]
