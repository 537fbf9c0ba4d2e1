"""A model from anywhere: `module:callable`."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import reduce
from typing import Any

from pydantic import ConfigDict, Field
from torch import nn

from .architecture import Architecture, unsuited


class CustomModel(Architecture):
    """A callable that returns a module; every other setting is a keyword argument to it.

    A callable with parameters named `input_shape` or `classes` is given the data set's, unless the
    configuration sets them.
    """

    model_config = ConfigDict(extra="allow")

    target: str = Field(
        pattern=r"^\w+(\.\w+)*:\w+(\.\w+)*$",
        description="Importable module and callable in it, as `package.module:callable`.",
    )

    def build(self, input_shape: tuple[int, int, int], classes: int) -> nn.Module:
        """What the callable returns; raises `ConfigError` if it is not found, fails or returns no module."""
        make = self._resolve()
        arguments: dict[str, Any] = dict(self.model_extra or {})
        offered = {"input_shape": input_shape, "classes": classes}
        try:
            accepted = inspect.signature(make).parameters
            arguments = {key: value for key, value in offered.items() if key in accepted} | arguments
        except (TypeError, ValueError):  # a callable without a signature gets what was set
            pass
        try:
            model = make(**arguments)
        except Exception as error:
            given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
            raise unsuited(f"{self.target}({given}) failed: {_text(error)}") from error
        if not isinstance(model, nn.Module):
            raise unsuited(f"{self.target} returned {type(model).__name__}, not a torch.nn.Module")
        return model

    def _resolve(self) -> Callable[..., object]:
        module, _, path = self.target.partition(":")
        try:
            found: object = importlib.import_module(module)
        except Exception as error:
            raise unsuited(
                f"cannot import {module!r}: {_text(error)}; is it installed, or its folder in PYTHONPATH?"
            ) from error
        try:
            found = reduce(getattr, path.split("."), found)
        except AttributeError:
            raise unsuited(f"module {module!r} has no {path!r}") from None
        if not callable(found):
            raise unsuited(f"{self.target} is not callable")
        return found


def _text(error: Exception) -> str:
    """One line that says what went wrong."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
