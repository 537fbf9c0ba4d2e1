"""The models that a configuration can name."""

from __future__ import annotations

from ..component import Component
from .custom import CustomModel
from .lenet import Conv2, LeNet
from .resnet import ResNet18
from .simple import Cnn, DropoutCnn, Mlp
from .speech import SpeechResNet18
from .vgg import CifarCnn, Vgg16

MODELS: dict[str, type[Component]] = {
    "lenet": LeNet,
    "conv2": Conv2,
    "resnet18": ResNet18,
    "resnet18-speech": SpeechResNet18,
    "cnn": Cnn,
    "cnn-dropout": DropoutCnn,
    "mlp": Mlp,
    "cifar-cnn": CifarCnn,
    "vgg16": Vgg16,
}
"""Models by the name that a configuration uses; every entry is an `Architecture`."""

__all__ = ["MODELS", "CustomModel"]
