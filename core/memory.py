"""Memory that is not there: how it shows in exceptions."""

from __future__ import annotations

import torch

_TEXTS = (
    *("DefaultCPUAllocator", "CUDA error: out of memory"),
    *("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED"),
)


def out_of_memory(error: BaseException | None) -> bool:
    """Whether a GPU or this machine had no memory left, perhaps in a hook whose error stands around it."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return True
        if isinstance(error, RuntimeError) and any(text in str(error) for text in _TEXTS):
            return True
        error = error.__cause__
    return False
