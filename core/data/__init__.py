"""Data sets, held whole in memory, and how they are divided among clients."""

from __future__ import annotations

from ..component import Component
from .dataset import Dataset
from .partition import Dirichlet, Iid, Partition, Pool, Shards
from .partition_by_user import ByUser
from .partition_drawn import Drawn
from .partitions_by_class import ClassDisjoint, Lda
from .sources import DATASETS

PARTITIONS: dict[str, type[Component]] = {
    "iid": Iid,
    "dirichlet": Dirichlet,
    "shards": Shards,
    "lda": Lda,
    "class-disjoint": ClassDisjoint,
    "by-user": ByUser,
    "drawn": Drawn,
}
"""Partitions by the name that a configuration uses; every entry is a `PartitionRule`."""

__all__ = ["DATASETS", "PARTITIONS", "Dataset", "Partition", "Pool"]
