"""Powers of magnitudes, on host memory by numpy where that takes a third of torch's time."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .recording import operation
from .selection import readable


@operation
def power(magnitudes: Tensor, exponent: Tensor) -> Tensor:
    """`magnitudes` (0 or more) to the power of `exponent`, 0-d; a fourth root may differ in its last bit."""
    # torch's square root is several times slower where many entries are 0
    if readable(magnitudes, exponent) and magnitudes.dtype == torch.float32 and exponent.item() == 0.25:
        root = np.sqrt(magnitudes.numpy())
        return torch.from_numpy(np.sqrt(root, out=root))
    return magnitudes.pow(exponent)
