"""Data sets: shapes, splits, normalisation, and what a user reads when files are missing."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from fedsparse.core.data import DATASETS, Dataset
from fedsparse.core.errors import RunError


def load(name: str, root: Path | None = None, download: bool = False, **settings: object) -> Dataset:
    source = DATASETS[name](**settings)
    dataset: Dataset = source.load(root or Path("nowhere"), download)
    return dataset


def test_digits_have_their_shape_and_fixed_split() -> None:
    digits = load("digits")
    assert digits.input_shape == (1, 8, 8)
    assert digits.train_inputs.shape == (1442, 1, 8, 8)
    assert digits.test_inputs.shape == (355, 1, 8, 8)
    assert digits.train_inputs.dtype == torch.uint8
    assert digits.train_targets.dtype == torch.int64
    assert int(digits.train_inputs.max()) == 16
    train, test = digits.train_targets.bincount(), digits.test_targets.bincount()
    assert torch.equal(test, (train + test) // 5)  # every fifth of each class


def test_digits_are_scikit_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read without its import, and with it where its files lie elsewhere."""
    quick = load("digits")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    slow = load("digits")
    for name in ("train_inputs", "train_targets", "test_inputs", "test_targets"):
        assert torch.equal(getattr(quick, name), getattr(slow, name))


def test_normalised_train_data_has_mean_0_and_deviation_1() -> None:
    for dataset in (load("digits"), load("synthetic", channels=3, height=8, width=8, noise=0.0)):
        values = dataset.normalise(dataset.train_inputs)
        assert values.dtype == torch.float32
        assert values.shape == dataset.train_inputs.shape
        # prototypes are few draws of a uniform distribution: their mean differs from 0.5 by some per cent
        assert abs(float(values.mean())) < 0.2
        assert abs(float(values.std()) - 1) < 0.2


def test_normalise_is_the_textbook_formula_per_channel() -> None:
    inputs = torch.arange(2 * 3 * 2 * 2, dtype=torch.uint8).view(2, 3, 2, 2) * 10
    targets = torch.zeros(2, dtype=torch.int64)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    dataset = Dataset("x", inputs, targets, inputs, targets, 1, mean, std)
    expected = (inputs.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(dataset.normalise(inputs), expected.float())
    stacked = torch.stack([inputs, inputs])  # clients in front
    torch.testing.assert_close(dataset.normalise(stacked)[1], expected.float())


def test_dataset_moves_and_shares_tensors_that_are_in_place() -> None:
    digits = load("digits")
    moved = digits.to("cpu")
    assert moved.train_inputs.data_ptr() == digits.train_inputs.data_ptr()
    assert digits.to("meta").train_inputs.device.type == "meta"


def test_synthetic_is_a_function_of_its_settings() -> None:
    settings = {"train": 101, "test": 33, "classes": 4, "channels": 2, "height": 5, "width": 7}
    one, same = load("synthetic", **settings), load("synthetic", **settings)
    assert one.train_inputs.shape == (101, 2, 5, 7)
    assert one.test_inputs.shape == (33, 2, 5, 7)
    assert one.train_inputs.dtype == torch.uint8
    assert one.classes == 4
    assert torch.equal(one.train_inputs, same.train_inputs)
    assert torch.equal(one.test_targets, same.test_targets)
    assert not torch.equal(one.train_inputs, load("synthetic", **settings, seed=1).train_inputs)
    counts = one.train_targets.bincount(minlength=4)
    assert int(counts.max() - counts.min()) <= 1


def test_synthetic_classes_differ_and_share_their_prototypes_between_train_and_test() -> None:
    quiet = load("synthetic", train=200, test=50, noise=0.0)
    prototypes = torch.stack([quiet.train_inputs[quiet.train_targets == c][0] for c in range(10)])
    assert torch.equal(quiet.test_inputs, prototypes[quiet.test_targets])
    assert len(prototypes.flatten(1).unique(dim=0)) == 10


def test_synthetic_larger_than_one_chunk_is_noisy_everywhere() -> None:
    large = load("synthetic", train=3000, test=10, classes=2, noise=0.2)  # 2.4 million pixels, several chunks
    images = large.train_inputs.flatten(1).float()
    assert bool((images.std(dim=1) > 0).all())
    assert len(large.train_inputs.flatten(1).unique(dim=0)) == 3000


def test_synthetic_noise_is_gaussian() -> None:
    """Where it is not clipped; 25,000 pixels: six standard errors of the mean, the deviation and a share."""
    quiet, loud = (load("synthetic", train=500, test=10, noise=noise) for noise in (0.0, 0.1))
    plain, found = quiet.train_inputs.double(), loud.train_inputs.double()
    middle = (plain > 110) & (plain < 145)
    noise = (found - plain)[middle] / 255
    error = 0.1 / noise.numel() ** 0.5
    assert noise.numel() > 25_000
    assert abs(noise.mean()) < 6 * error
    assert abs(noise.std() - 0.1) < 6 * error
    beyond = (noise.abs() > 0.2).double().mean()
    assert abs(beyond - 0.0455) < 6 * (0.0455 / noise.numel()) ** 0.5 + 0.004  # levels are rounded


@pytest.mark.parametrize(
    "settings",
    [
        {"train": 0},
        {"classes": 1},
        {"noise": -0.1},
        {"train": 10**8, "channels": 64, "height": 1024, "width": 1024},
        {"classes": 10_000, "train": 1, "test": 1, "channels": 64, "height": 512, "width": 512},
        {"unknown": 1},
    ],
)
def test_synthetic_refuses_impossible_sizes_before_it_allocates(settings: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        DATASETS["synthetic"](**settings)


FILES = {
    "mnist": "MNIST/raw",
    "fashion-mnist": "FashionMNIST/raw",
    "emnist": "EMNIST/raw",
    "cifar10": "cifar-10-batches-py",
    "cifar100": "cifar-100-python",
    "svhn": "train_32x32.mat",
}


@pytest.mark.parametrize("name", FILES)
def test_missing_files_are_one_message_that_says_what_to_do(name: str, tmp_path: Path) -> None:
    with pytest.raises(RunError) as caught:
        load(name, tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert f"data set {name}: its files are missing" in message
    assert str(tmp_path / FILES[name]) in message
    assert "`--set task.download=true`" in message
    assert "`--set task.data_root=DIR`" in message
    assert "You can use" not in message


@pytest.mark.parametrize("name", FILES)
def test_failed_download_is_one_message(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    with pytest.raises(RunError) as caught:
        load(name, tmp_path, download=True)
    message = str(caught.value)
    assert "\n" not in message
    assert f"data set {name}: could not be downloaded" in message
    assert str(tmp_path) in message
    assert capsys.readouterr().out == ""  # progress does not mix with what the command prints


def idx(array: np.ndarray) -> bytes:
    """MNIST's file format for an array of bytes."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_idx(folder: Path, prefix: str, images: np.ndarray, labels: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{prefix}-images-idx3-ubyte").write_bytes(idx(images))
    (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(labels))


def write_mnist(root: Path, kind: str = "MNIST", labels: int = 5) -> np.ndarray:
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28))
    for prefix in ("train", "t10k"):
        write_idx(root / kind / "raw", prefix, images, np.arange(labels))
    return images


def test_mnist_files_are_read_as_they_are(tmp_path: Path) -> None:
    images = write_mnist(tmp_path)
    dataset = load("mnist", tmp_path)
    assert dataset.input_shape == (1, 28, 28)
    assert np.array_equal(dataset.train_inputs[:, 0].numpy(), images)
    assert dataset.test_targets.tolist() == [0, 1, 2, 3, 4]
    assert (dataset.mean, dataset.std, dataset.scale) == ((0.1307,), (0.3081,), 255.0)


def test_fashion_mnist_can_take_the_constants_of_mnist(tmp_path: Path) -> None:
    write_mnist(tmp_path, "FashionMNIST")
    assert load("fashion-mnist", tmp_path).mean == (0.2860,)
    assert load("fashion-mnist", tmp_path, constants="mnist").mean == (0.1307,)


@pytest.mark.parametrize(
    ("split", "first", "classes"), [("letters", 1, 26), ("balanced", 0, 47), ("byclass", 0, 62)]
)
def test_emnist_is_upright_and_counts_from_0(tmp_path: Path, split: str, first: int, classes: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (classes, 28, 28))
    for part in ("train", "test"):
        write_idx(tmp_path / "EMNIST/raw", f"emnist-{split}-{part}", images, np.arange(classes) + first)
    dataset = load("emnist", tmp_path, split=split)
    assert dataset.classes == classes
    assert dataset.train_targets.tolist() == list(range(classes))
    assert np.array_equal(dataset.train_inputs[:, 0].numpy(), images.transpose(0, 2, 1))
    assert dataset.train_inputs.is_contiguous()


def test_svhn_files_are_read_through_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scipy_io = pytest.importorskip("scipy.io")
    images = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 10), dtype=np.uint8)
    for part in ("train", "test"):
        labels = np.arange(1, 11, dtype=np.uint8)[:, None]  # 10 stands for the digit 0
        scipy_io.savemat(tmp_path / f"{part}_32x32.mat", {"X": images, "y": labels})
    monkeypatch.setattr("torchvision.datasets.SVHN._check_integrity", lambda _: True)
    dataset = load("svhn", tmp_path)
    assert dataset.train_targets.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    assert np.array_equal(dataset.test_inputs.numpy(), images.transpose(3, 2, 0, 1))


def test_damaged_files_are_one_message(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    path = tmp_path / "MNIST/raw/train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(RunError, match="data set mnist: its files are incomplete or damaged") as caught:
        load("mnist", tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(RunError, match="delete damaged files"):
        load("mnist", tmp_path, download=True)


def test_cifar_files_with_a_wrong_checksum_are_not_unpickled(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in ("data_batch_1", "test_batch", "batches.meta"):
        (folder / name).write_bytes(b"cbuiltins\nexit\n(tR.")  # would end the process
    with pytest.raises(RunError, match="data set cifar10: its files are incomplete or damaged"):
        load("cifar10", tmp_path)


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    write_mnist(tmp_path, labels=4)
    with pytest.raises(RunError, match="5 images and 4 labels"):
        load("mnist", tmp_path)
    write_idx(tmp_path / "MNIST/raw", "train", np.zeros((2, 28, 28)), np.array([0, 10]))
    with pytest.raises(RunError, match="labels 0 to 10 of 10 classes"):
        load("mnist", tmp_path)


def test_naming_data_sets_imports_neither_torchvision_nor_scikit_learn() -> None:
    code = "import sys, fedsparse.core.data; assert not {'torchvision', 'sklearn'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_every_setting_is_described() -> None:
    for source in DATASETS.values():
        assert source.summary()
        for field in source.model_fields.values():
            assert field.description


def real_data() -> Path:
    if "FEDSPARSE_DATA" not in os.environ:
        pytest.skip("FEDSPARSE_DATA is not set")
    return Path(os.environ["FEDSPARSE_DATA"])


REAL = {
    "mnist": ("MNIST/raw/train-images-idx3-ubyte", (1, 28, 28), 60_000, 10_000),
    "fashion-mnist": ("FashionMNIST/raw/train-images-idx3-ubyte", (1, 28, 28), 60_000, 10_000),
    "cifar10": ("cifar-10-batches-py/data_batch_1", (3, 32, 32), 50_000, 10_000),
    "cifar100": ("cifar-100-python/train", (3, 32, 32), 50_000, 10_000),
    "svhn": ("train_32x32.mat", (3, 32, 32), 73_257, 26_032),
}


@pytest.mark.data
@pytest.mark.parametrize("name", REAL)
def test_real_files_have_the_published_sizes_and_constants(name: str) -> None:
    root = real_data()
    path, shape, train, test = REAL[name]
    if not (root / path).exists():
        pytest.skip(f"{name} is not in FEDSPARSE_DATA")
    dataset = load(name, root)
    assert dataset.input_shape == shape
    assert (len(dataset.train_inputs), len(dataset.test_inputs)) == (train, test)
    values = dataset.normalise(dataset.train_inputs[:10_000])
    # the customary CIFAR deviations (0.2) are means over images, below the deviation over pixels (0.25);
    # CIFAR-100 is normalised with CIFAR-10's constants
    assert abs(float(values.mean())) < 0.1
    assert 0.9 < float(values.std()) < 1.4


@pytest.mark.data
def test_cifar10_channels_are_not_mixed_with_pixels() -> None:
    root = real_data()
    if not (root / "cifar-10-batches-py/data_batch_1").exists():
        pytest.skip("cifar10 is not in FEDSPARSE_DATA")
    image = load("cifar10", root).train_inputs[0]
    assert image[:, 0, 0].tolist() == [59, 62, 63]  # the first pixel of the first photograph, a frog


@pytest.mark.data
def test_mnist_agrees_with_its_file() -> None:
    root = real_data()
    path = root / "MNIST/raw/train-labels-idx1-ubyte"
    if not path.exists():
        pytest.skip("mnist is not in FEDSPARSE_DATA")
    assert load("mnist", root).train_targets.tolist() == list(path.read_bytes()[8:])
