"""ResNet-18 for sound: waveforms and spectrograms."""

from __future__ import annotations

from torch import nn

from .architecture import unsuited
from .resnet import BasicResNet18, ResNet18


class SpeechResNet18(ResNet18):
    """ResNet-18 with a 7x7 stem of stride 2 and max-pooling, for waveforms and log-mel spectrograms.

    11,188,195 parameters for 35 words. Source: the SparsyFed code, which shows it waveforms of shape
    (1, 1, 8000). Of inputs of height 1 the kernels' middle row alone ever sees data: two thirds of each
    3x3 kernel and six sevenths of the stem get no gradient from the task, and are prunable all the same.
    """

    def build(self, input_shape: tuple[int, int, int], classes: int) -> nn.Module:
        """The layers of resnet18.

        Width (time) is halved five times. From 33 on more than one value is left, so that batch normalisation
        has something to normalise in a batch of a single clip.
        """
        if input_shape[2] < 33:
            raise unsuited(
                f"resnet18-speech needs inputs that are 33 or more wide, the data set's are "
                f"{input_shape[1]}x{input_shape[2]}; use resnet18"
            )
        groups = self.groups if self.norm == "group" else None
        return BasicResNet18(input_shape[0], classes, groups, large_stem=True)
