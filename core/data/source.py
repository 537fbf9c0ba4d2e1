"""What every data set that a configuration can name offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

from ..component import Component
from .dataset import Dataset


class Source(Component, ABC):
    """Where a data set comes from."""

    @abstractmethod
    def load(self, data_root: Path, download: bool) -> Dataset:
        """The data set on the CPU.

        `data_root` is the folder that holds the files of all data sets; `download` allows to fetch what is
        missing into it. Raises `RunError` if files are missing, damaged or cannot be fetched.
        """
