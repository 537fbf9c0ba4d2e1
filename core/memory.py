"""Memory that is not there: how it shows in exceptions."""

from __future__ import annotations

import torch


def out_of_memory(error: BaseException | None) -> bool:
    """Whether a GPU or this machine had no memory left, perhaps in a hook whose error stands around it."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return True
        if isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error):
            return True
        error = error.__cause__
    return False
