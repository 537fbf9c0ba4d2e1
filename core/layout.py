"""The order of tensors in memory: channels last is what convolutions on CPUs are fastest with."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .state import Params


class Layout(NamedTuple):
    """How images and the weights of 2-d convolutions lie in memory; values and shapes are the same."""

    channels_last: bool = False

    def arrange(self, tensor: Tensor) -> Tensor:
        """The tensor in this layout, itself if it lies so."""
        if not self.channels_last or tensor.dim() != 4:
            return tensor
        if tensor.shape[1] == 1:  # strides of one channel do not matter to values, but to the kernels chosen
            height, width = tensor.shape[2:]
            return tensor.contiguous().as_strided(tensor.shape, (height * width, 1, width, 1))
        return tensor.contiguous(memory_format=torch.channels_last)

    def stacked(self, images: Tensor) -> Tensor:
        """Images of stacked clients (clients, b, c, h, w): under vmap these are channels of convolutions."""
        if not self.channels_last or images.dim() != 5:
            return images
        return images.permute(1, 3, 4, 0, 2).contiguous().permute(3, 0, 4, 1, 2)

    def params(self, params: Params) -> Params:
        """All tensors in this layout; weights of one channel as steps return them."""
        return {
            name: p.contiguous() if p.dim() == 4 and p.shape[1] == 1 else self.arrange(p)
            for name, p in params.items()
        }


def choose_layout(setting: str, model: nn.Module, device: torch.device) -> Layout:
    """ "on", "off", or "auto": on for models with 2-d convolutions on a CPU, where it was measured to pay."""
    convolves = any(isinstance(module, nn.Conv2d) for module in model.modules())
    return Layout(convolves and (setting == "on" or (setting == "auto" and device.type == "cpu")))
