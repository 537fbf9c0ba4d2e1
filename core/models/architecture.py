"""What every model that a configuration can name offers."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import nn

from ..component import Component
from ..errors import ConfigError, Problem


class Architecture(Component, ABC):
    """A network to be built for a data set."""

    @abstractmethod
    def build(self, input_shape: tuple[int, int, int], classes: int) -> nn.Module:
        """A network from float32 (b, c, h, w) to (b, classes), initialised as the framework does by default.

        `input_shape` is (c, h, w). The initial weights come from torch's global generator. Raises
        `ConfigError` at `task.model` if the architecture does not fit the inputs.
        """


def unsuited(message: str) -> ConfigError:
    """The error of a model that does not fit the task."""
    return ConfigError([Problem("task.model", message)])
