"""The data sets that a configuration can name, and how each is loaded.

torchvision and scikit-learn are imported only when a data set is loaded: listing the names must stay quick.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..component import Component
from ..errors import RunError
from .dataset import Dataset
from .source import Source
from .speech import SpeechCommands

_MNIST = ((0.1307,), (0.3081,))
_CIFAR = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))


def _torchvision(
    name: str, kind: str, folder: Path, root: Path, download: bool, parts: Sequence[Mapping[str, Any]]
) -> list[Any]:
    """The torchvision data sets `kind(root, **part)`; `folder` is where their files lie below `root`."""
    from torchvision import datasets

    try:
        # torchvision reports progress on stdout, which belongs to what the command prints
        with contextlib.redirect_stdout(sys.stderr):
            return [getattr(datasets, kind)(root, download=download, **part) for part in parts]
    except Exception as error:  # whatever a reader makes of a damaged file
        # torchvision's own hint, "You can use download=True", names no setting of ours
        reason = " ".join(str(error).split()).partition(" You can use")[0] or type(error).__name__
        raise RunError(_advice(name, folder, download, reason)) from error


def _advice(name: str, folder: Path, download: bool, reason: str) -> str:
    elsewhere = "`--set task.data_root=DIR` looks elsewhere"
    if download:
        return (
            f"data set {name}: could not be downloaded to, or read from, {folder} ({reason}); check the "
            f"network, delete damaged files so that they are fetched again, or {elsewhere}"
        )
    what = "its files are incomplete or damaged" if folder.exists() else "its files are missing"
    return (
        f"data set {name}: {what}; looked in {folder} ({reason}). "
        f"`--set task.download=true` downloads it, {elsewhere}"
    )


def _checked(dataset: Dataset, folder: Path, download: bool) -> Dataset:
    """The data set, if every image has a label and every label a class; files can be cut or mixed up."""
    for inputs, targets in (
        (dataset.train_inputs, dataset.train_targets),
        (dataset.test_inputs, dataset.test_targets),
    ):
        if len(inputs) != len(targets):
            reason = f"{len(inputs)} images and {len(targets)} labels"
        elif len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < dataset.classes:
            reason = f"labels {int(targets.min())} to {int(targets.max())} of {dataset.classes} classes"
        else:
            continue
        raise RunError(_advice(dataset.name, folder, download, reason))
    return dataset


def _copied(array: npt.NDArray[Any]) -> Tensor:
    """A contiguous tensor of its own: torchvision's arrays may be views, or read-only."""
    return torch.from_numpy(np.array(array, order="C"))


class Digits(Source):
    """8x8 handwritten digits that ship with scikit-learn: no download, for quick runs and tests.

    1,797 grey images of 10 classes, raw values 0 to 16. The split is fixed: every fifth sample of each
    class is a test sample (1,442 train, 355 test). The constants are the train split's.
    """

    def load(self, data_root: Path, download: bool) -> Dataset:
        """Reads nothing below `data_root`."""
        rows = _digits()
        inputs = _copied(rows[:, :64].astype(np.uint8)).view(-1, 1, 8, 8)
        targets = _copied(rows[:, 64].astype(np.int64))
        held_out = torch.zeros(len(targets), dtype=torch.bool)
        for label in range(10):
            held_out[torch.nonzero(targets == label).flatten()[4::5]] = True
        return Dataset(
            name="digits",
            train_inputs=inputs[~held_out],
            train_targets=targets[~held_out],
            test_inputs=inputs[held_out],
            test_targets=targets[held_out],
            classes=10,
            mean=(0.3051,),
            std=(0.3762,),
            scale=16.0,
        )


def _digits() -> npt.NDArray[Any]:
    """64 pixels and a label a row: scikit-learn's file, without its import, which takes two seconds."""
    found = importlib.util.find_spec("sklearn")
    for folder in (found and found.submodule_search_locations) or ():
        file = Path(folder) / "datasets" / "data" / "digits.csv.gz"
        if file.is_file():
            return np.loadtxt(file, delimiter=",")
    from sklearn.datasets import load_digits

    raw = load_digits()
    return np.column_stack([raw.data, raw.target])


_LEVELS = 2**16  # of generated noise, equally likely
_LARGEST = 2**34
"""Bytes of generated images that a configuration may ask for (16 GiB)."""


class Synthetic(Source):
    """Generated images, a random prototype a class plus noise: any number and size, no files.

    Prototypes are uniform in [0, 1], in tiles of 2x2 pixels so that convolution and pooling keep them;
    Gaussian noise of 65,536 levels is added, both in whole steps of 1/255, and the sum is clipped to [0, 1].
    Classes are balanced to within one sample. Train and test come from one distribution, and from `seed`
    alone.
    """

    train: int = Field(default=10_000, ge=1, le=100_000_000, description="Train images, 1 to 10^8.")
    test: int = Field(default=2_000, ge=1, le=100_000_000, description="Test images, 1 to 10^8.")
    classes: int = Field(default=10, ge=2, le=10_000, description="Classes, 2 to 10,000.")
    channels: int = Field(default=1, ge=1, le=64, description="Channels of an image, 1 to 64.")
    height: int = Field(default=28, ge=1, le=1024, description="Height of an image in pixels, 1 to 1,024.")
    width: int = Field(default=28, ge=1, le=1024, description="Width of an image in pixels, 1 to 1,024.")
    noise: float = Field(
        default=0.3,
        ge=0.0,
        le=10.0,
        description="Standard deviation of the noise, in units of the full range of a pixel, 0 to 10.",
    )
    seed: int = Field(
        default=0,
        ge=0,
        le=2**63 - 1,
        description="Seed of the data alone, so that runs with other seeds train on the same images.",
    )

    @model_validator(mode="after")
    def _fits_in_memory(self) -> Synthetic:
        pixels = self.channels * self.height * self.width
        asked = pixels * max(self.train + self.test, 4 * self.classes)  # prototypes are float32
        if asked > _LARGEST:
            raise ValueError(
                f"(train + test) x channels x height x width asks for {asked / 2**30:.1f} GiB of images, "
                f"at most {_LARGEST / 2**30:.0f} GiB are allowed"
            )
        return self

    def load(self, data_root: Path, download: bool) -> Dataset:
        """Reads nothing below `data_root`."""
        rng = np.random.default_rng(self.seed)
        tiles = (self.classes, self.channels, -(-self.height // 2), -(-self.width // 2))
        prototypes = rng.random(tiles, dtype=np.float32).repeat(2, axis=2).repeat(2, axis=3)
        prototypes = prototypes[:, :, : self.height, : self.width]
        train_inputs, train_targets = self._draw(self.train, prototypes, rng)
        test_inputs, test_targets = self._draw(self.test, prototypes, rng)
        return Dataset(
            name="synthetic",
            train_inputs=train_inputs,
            train_targets=train_targets,
            test_inputs=test_inputs,
            test_targets=test_targets,
            classes=self.classes,
            mean=(0.5,) * self.channels,
            # uniform plus Gaussian; clipping to [0, 1] cannot spread further than 0.5
            std=(min(0.5, (1 / 12 + self.noise**2) ** 0.5),) * self.channels,
        )

    def _draw(
        self, count: int, prototypes: npt.NDArray[np.float32], rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """`count` images uint8 (n, c, h, w) and labels; in chunks, so that memory stays near the result's."""
        targets = rng.permutation(np.arange(count, dtype=np.int64) % self.classes)
        inputs = np.empty((count, *prototypes.shape[1:]), dtype=np.uint8)
        plain, levels = np.rint(255 * prototypes).astype(np.int16), self._levels()
        rows = max(1, 2**20 // prototypes[0].size)
        for start in range(0, count, rows):
            part = inputs[start : start + rows]
            chunk = levels[rng.integers(_LEVELS, size=part.shape, dtype=np.uint16)]
            chunk += plain[targets[start : start + rows]]
            part[...] = np.clip(chunk, 0, 255, out=chunk)
        return torch.from_numpy(inputs), torch.from_numpy(targets)

    def _levels(self) -> npt.NDArray[np.int16]:
        """The quantiles of the noise: to look one up takes a tenth of the time of a normal number."""
        middles = (torch.arange(_LEVELS, dtype=torch.float64) + 0.5) / _LEVELS
        noise = 255 * self.noise * torch.special.ndtri(middles)
        levels: npt.NDArray[np.int16] = noise.round().short().numpy()
        return levels


class Mnist(Source):
    """MNIST: 60,000 + 10,000 handwritten digits, grey 28x28, 10 classes (files in `MNIST/raw`)."""

    def load(self, data_root: Path, download: bool) -> Dataset:
        """Constants 0.1307 / 0.3081, of the train split."""
        return _mnist_like("mnist", "MNIST", data_root, download, 10, _MNIST)


class FashionMnist(Source):
    """Fashion-MNIST: 60,000 + 10,000 pieces of clothing, grey 28x28, 10 classes (`FashionMNIST/raw`)."""

    constants: Literal["own", "mnist"] = Field(
        default="own",
        description="Mean and deviation to normalise with: the data set's `own` (0.2860, 0.3530), or those "
        "of `mnist` (0.1307, 0.3081), which the FedDST code reuses.",
    )

    def load(self, data_root: Path, download: bool) -> Dataset:
        """Constants as the field says."""
        constants = _MNIST if self.constants == "mnist" else ((0.2860,), (0.3530,))
        return _mnist_like("fashion-mnist", "FashionMNIST", data_root, download, 10, constants)


_EMNIST_CLASSES = {"byclass": 62, "bymerge": 47, "balanced": 47, "letters": 26, "digits": 10, "mnist": 10}


class Emnist(Source):
    """EMNIST: handwritten letters and digits, grey 28x28, upright, 10 to 62 classes (`EMNIST/raw`)."""

    split: Literal["byclass", "bymerge", "balanced", "letters", "digits", "mnist"] = Field(
        default="balanced",
        description="Which of the six published splits: `byclass` has 62 classes, `bymerge` and `balanced` "
        "47, `letters` 26, `digits` and `mnist` 10.",
    )

    def load(self, data_root: Path, download: bool) -> Dataset:
        """Constants 0.1736 / 0.3317 (of the `byclass` split) for every split."""
        return _mnist_like(
            "emnist",
            "EMNIST",
            data_root,
            download,
            _EMNIST_CLASSES[self.split],
            ((0.1736,), (0.3317,)),
            first_label=int(self.split == "letters"),  # `letters` alone counts from 1
            transposed=True,  # the files hold columns first
            split=self.split,
        )


def _mnist_like(
    name: str,
    kind: str,
    data_root: Path,
    download: bool,
    classes: int,
    constants: tuple[tuple[float, ...], tuple[float, ...]],
    first_label: int = 0,
    transposed: bool = False,
    **options: Any,
) -> Dataset:
    """A data set in MNIST's file format: grey images (n, h, w) in `.data`, labels in `.targets`."""
    root = data_root.expanduser()
    folder = root / kind / "raw"
    parts = [{**options, "train": True}, {**options, "train": False}]
    train, test = _torchvision(name, kind, folder, root, download, parts)

    def inputs(part: Any) -> Tensor:
        images = part.data.numpy()
        return _copied(images.swapaxes(1, 2) if transposed else images).unsqueeze(1)

    dataset = Dataset(
        name=name,
        train_inputs=inputs(train),
        train_targets=_copied(train.targets.numpy()) - first_label,
        test_inputs=inputs(test),
        test_targets=_copied(test.targets.numpy()) - first_label,
        classes=classes,
        mean=constants[0],
        std=constants[1],
    )
    return _checked(dataset, folder, download)


class Cifar10(Source):
    """CIFAR-10: 50,000 + 10,000 colour photographs, 32x32, 10 classes (`cifar-10-batches-py`)."""

    def load(self, data_root: Path, download: bool) -> Dataset:
        """Constants of the FedDST and PFFDST codes; MD5 is checked before files are read."""
        return _cifar("cifar10", "CIFAR10", "cifar-10-batches-py", data_root, download, 10)


class Cifar100(Source):
    """CIFAR-100: 50,000 + 10,000 colour photographs, 32x32, 100 classes (`cifar-100-python`)."""

    def load(self, data_root: Path, download: bool) -> Dataset:
        """CIFAR-10's constants, as the FedDST and PFFDST codes use; MD5 is checked before files are read."""
        return _cifar("cifar100", "CIFAR100", "cifar-100-python", data_root, download, 100)


def _cifar(name: str, kind: str, folder_name: str, data_root: Path, download: bool, classes: int) -> Dataset:
    """A data set in CIFAR's file format: colour images (n, h, w, c) in `.data`, labels in `.targets`."""
    root = data_root.expanduser()
    folder = root / folder_name
    parts = [{"train": True}, {"train": False}]
    train, test = _torchvision(name, kind, folder, root, download, parts)
    dataset = Dataset(
        name=name,
        train_inputs=_copied(train.data.transpose(0, 3, 1, 2)),
        train_targets=torch.tensor(train.targets, dtype=torch.int64),
        test_inputs=_copied(test.data.transpose(0, 3, 1, 2)),
        test_targets=torch.tensor(test.targets, dtype=torch.int64),
        classes=classes,
        mean=_CIFAR[0],
        std=_CIFAR[1],
    )
    return _checked(dataset, folder, download)


class Svhn(Source):
    """SVHN: 73,257 + 26,032 photographed house digits, colour 32x32, 10 classes (`*_32x32.mat`)."""

    def load(self, data_root: Path, download: bool) -> Dataset:
        """Constants of the train split; MD5 is checked before files are read."""
        root = data_root.expanduser()
        folder = root / "train_32x32.mat"
        parts = [{"split": "train"}, {"split": "test"}]
        train, test = _torchvision("svhn", "SVHN", folder, root, download, parts)
        dataset = Dataset(
            name="svhn",
            train_inputs=_copied(train.data),
            train_targets=_copied(train.labels.astype(np.int64)),
            test_inputs=_copied(test.data),
            test_targets=_copied(test.labels.astype(np.int64)),
            classes=10,
            mean=(0.4377, 0.4438, 0.4728),
            std=(0.1980, 0.2010, 0.1970),
        )
        return _checked(dataset, folder, download)


DATASETS: dict[str, type[Component]] = {
    "digits": Digits,
    "synthetic": Synthetic,
    "mnist": Mnist,
    "fashion-mnist": FashionMnist,
    "emnist": Emnist,
    "cifar10": Cifar10,
    "cifar100": Cifar100,
    "svhn": Svhn,
    "speech-commands": SpeechCommands,
}
"""Data sets by the name that a configuration uses; every entry is a `Source`."""
