"""fedsparse: sparse federated training with methods as plugins.

What a plugin needs is here: `from fedsparse import Method, Part, hookimpl`. Names load when first used, so
that importing fedsparse imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import Field

    from . import testing
    from .core import masks, optim, rng, schedule
    from .core.api import resume, run
    from .core.budget import Budget, Layer
    from .core.errors import ConfigError, FedsparseError, RunError
    from .core.hookspecs import hookimpl
    from .core.ledger import PassDensity, Traffic
    from .core.loss import ClientLoss, Probe
    from .core.method import Method
    from .core.part import Part
    from .core.results import Result
    from .core.state import (
        Aggregated,
        Batch,
        Carry,
        Clock,
        Frozen,
        Masks,
        Measured,
        Memory,
        Params,
        Readjusted,
        Report,
        Scores,
        ServerState,
        Stepped,
        Sums,
        Uploaded,
    )

_HOMES = {
    "masks": ".core",
    "optim": ".core",
    "rng": ".core",
    "schedule": ".core",
    "testing": ".",
    "Budget": ".core.budget",
    "Layer": ".core.budget",
    "ConfigError": ".core.errors",
    "FedsparseError": ".core.errors",
    "RunError": ".core.errors",
    "hookimpl": ".core.hookspecs",
    "PassDensity": ".core.ledger",
    "Traffic": ".core.ledger",
    "ClientLoss": ".core.loss",
    "Probe": ".core.loss",
    "Method": ".core.method",
    "Part": ".core.part",
    "Result": ".core.results",
    "resume": ".core.api",
    "run": ".core.api",
    "Field": "pydantic",
    **dict.fromkeys(
        [
            "Aggregated",
            "Batch",
            "Carry",
            "Clock",
            "Frozen",
            "Masks",
            "Measured",
            "Memory",
            "Params",
            "Readjusted",
            "Report",
            "Scores",
            "ServerState",
            "Stepped",
            "Sums",
            "Uploaded",
        ],
        ".core.state",
    ),
}

__all__ = [
    "Aggregated",
    "Batch",
    "Budget",
    "Carry",
    "ClientLoss",
    "Clock",
    "ConfigError",
    "FedsparseError",
    "Field",
    "Frozen",
    "Layer",
    "Masks",
    "Measured",
    "Memory",
    "Method",
    "Params",
    "Part",
    "PassDensity",
    "Probe",
    "Readjusted",
    "Report",
    "Result",
    "RunError",
    "Scores",
    "ServerState",
    "Stepped",
    "Sums",
    "Traffic",
    "Uploaded",
    "hookimpl",
    "masks",
    "optim",
    "resume",
    "rng",
    "run",
    "schedule",
    "testing",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fedsparse' has no attribute {name!r}")
    home = _HOMES[name]
    if home in (".", ".core"):
        return import_module(f"{home.rstrip('.')}.{name}", __name__)
    return getattr(import_module(home, __name__ if home.startswith(".") else None), name)


def __dir__() -> list[str]:
    return __all__
