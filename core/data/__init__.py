"""Data sets, held whole in memory, and how they are divided among clients."""

from __future__ import annotations

from .dataset import Dataset
from .partition import PARTITIONS, Partition
from .sources import DATASETS

__all__ = ["DATASETS", "PARTITIONS", "Dataset", "Partition"]
