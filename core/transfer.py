"""Numbers of the host on their way to the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def to_device(values: Sequence[int] | Sequence[float] | np.ndarray, device: torch.device | str) -> Tensor:
    """Numbers as a tensor on the device. The host does not wait for the work that the device still has.

    On a CPU the tensor is the array's memory, not a copy.
    """
    held = torch.from_numpy(values) if isinstance(values, np.ndarray) else torch.tensor(values)
    if torch.device(device).type == "cuda":
        held = held.pin_memory()  # other memory may be copied while the host waits
    return held.to(device, non_blocking=True)
