"""Google Speech Commands v2 from its folder of WAV files, as waveforms or log-mel spectrograms."""

from __future__ import annotations

import math
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import conv1d, pad

from ..errors import RunError
from .dataset import Dataset
from .source import Source

_RATE = 16_000
"""Samples a second in the files, and the samples that a clip is padded or cut to."""
_BANDS = 40
_FLOOR = 1e-6
"""Added to energies before the logarithm: far below a spoken word's, and silence stays finite."""
_CHUNK = 256
"""Clips that are transformed at a time."""
_LARGEST = 2**34
"""Bytes of inputs that a folder may ask for (16 GiB); the published set takes 3.4 GB at 16 kHz."""


class SpeechCommands(Source):
    """Google Speech Commands v2: spoken words of one second, 35 classes (WAV files in folders by word).

    Read from `SpeechCommands/speech_commands_v0.02`, where torchaudio puts it, or from `data_root` itself
    if that holds the two lists. Test samples are those of `testing_list.txt`, train samples those on
    neither list (as published 11,005 and 84,843). Classes are the names of the folders in sorted order,
    without `_background_noise_`. Shorter clips are padded with zeros at the end, longer ones cut. Source:
    Warden, Speech Commands: A Dataset for Limited-Vocabulary Speech Recognition.
    """

    features: Literal["waveform", "log-mel"] = Field(
        default="waveform",
        description="`waveform`: samples in [-1, 1), kept as int16, of shape (1, 1, sample_rate). `log-mel`: "
        "log energies of 40 mel bands in windows of 25 ms every 10 ms, kept as float16, of shape "
        "(1, 40, 101), normalised with the mean and deviation of all train values.",
    )
    sample_rate: Literal[8000, 16000] = Field(
        default=16000,
        description="Samples a second: 16000 as recorded, or 8000, halved through a windowed-sinc filter "
        "(torchaudio's default one), as SparsyFed trains on.",
    )
    validation: Literal["unused", "train", "test"] = Field(
        default="unused", description="What samples of `validation_list.txt` (as published 9,981) count as."
    )

    def load(self, data_root: Path, download: bool) -> Dataset:
        """Constants 0 / 1 for waveforms. Never downloads: the message names the archive to unpack."""
        folder = _find(data_root.expanduser())
        clips = sorted(f"{path.parent.name}/{path.name}" for path in folder.glob("[!_.]*/*.wav"))
        words = {word: label for label, word in enumerate(sorted({clip.partition("/")[0] for clip in clips}))}
        use = dict.fromkeys(_listed(folder, "validation_list.txt"), self.validation)
        use |= dict.fromkeys(_listed(folder, "testing_list.txt"), "test")
        if missing := sorted(use.keys() - set(clips)):
            reason = f"{len(missing)} of the {len(use)} clips on its lists are missing, such as {missing[0]}"
            raise _damaged(folder, reason)
        chosen: dict[str, list[str]] = {"train": [], "test": [], "unused": []}
        for clip in clips:
            chosen[use.get(clip, "train")].append(clip)
        del chosen["unused"]
        if not all(chosen.values()):
            raise _damaged(folder, f"{len(chosen['train'])} train and {len(chosen['test'])} test clips")
        example = self._features(torch.zeros(1, _RATE, dtype=torch.int16))
        asked = example.nbytes * sum(map(len, chosen.values()))
        if asked > _LARGEST:
            raise RunError(
                f"data set speech-commands: the {len(clips):,} clips in {folder} ask for "
                f"{asked / 2**30:.1f} GiB, at most {_LARGEST / 2**30:.0f} GiB are allowed; the published set "
                "has 105,829 clips"
            )

        inputs = {part: self._inputs(folder, names, example) for part, names in chosen.items()}
        targets = {
            part: torch.tensor([words[name.partition("/")[0]] for name in names])
            for part, names in chosen.items()
        }
        mean, std = _moments(inputs["train"]) if self.features == "log-mel" else (0.0, 1.0)
        return Dataset(
            name="speech-commands",
            train_inputs=inputs["train"],
            train_targets=targets["train"],
            test_inputs=inputs["test"],
            test_targets=targets["test"],
            classes=len(words),
            mean=(mean,),
            std=(std,),
            scale=1.0 if self.features == "log-mel" else 32768.0,
        )

    def _inputs(self, folder: Path, clips: Sequence[str], example: Tensor) -> Tensor:
        """The features (n, 1, h, w) of these clips; in chunks, so that memory stays near the result's."""
        inputs = torch.empty(len(clips), *example.shape[1:], dtype=example.dtype)
        for start in range(0, len(clips), _CHUNK):
            names = clips[start : start + _CHUNK]
            chunk = np.zeros((len(names), _RATE), np.int16)
            for row, name in zip(chunk, names, strict=True):
                samples = _read(folder, name)
                row[: len(samples)] = samples
            inputs[start : start + len(names)] = self._features(torch.from_numpy(chunk))
        return inputs

    def _features(self, clips: Tensor) -> Tensor:
        """What is stored, (n, 1, h, w), of one-second clips, int16 (n, 16000)."""
        waves = clips / 32768
        if self.sample_rate != _RATE:
            waves = halved(waves)
        if self.features == "log-mel":
            return log_mel(waves, self.sample_rate).half().unsqueeze(1)
        return (waves * 32768).round().clamp(-32768, 32767).short().view(len(clips), 1, 1, -1)


def halved(waves: Tensor) -> Tensor:
    """Waves (n, t) at half the sample rate, (n, ⌈t / 2⌉), without what would alias.

    A sinc that cuts off at 0.99 of the new Nyquist frequency under a Hann window of six zero crossings a
    side, zeros beyond the ends: torchaudio's default `Resample(2, 1)`.
    """
    crossings, rolloff = 6, 0.99
    width = math.ceil(2 * crossings / rolloff)
    time = (torch.arange(-width, width + 1, dtype=torch.float64) * rolloff / 2).clamp(-crossings, crossings)
    kernel = torch.sinc(time) * torch.cos(time * math.pi / (2 * crossings)) ** 2 * rolloff / 2
    # sixteen outputs at a time, each a channel with the kernel further on: ten times as fast as one by one
    block, length = 16, waves.shape[1]
    kernels = torch.stack([pad(kernel, (2 * k, 2 * (block - 1 - k))) for k in range(block)]).to(waves)
    padded = pad(waves, (width, width + -length % (2 * block))).unsqueeze(1)
    blocks = conv1d(padded, kernels.unsqueeze(1), stride=2 * block)
    return blocks.transpose(1, 2).flatten(1)[:, : (length + 1) // 2]


def log_mel(waves: Tensor, rate: int) -> Tensor:
    """Log energies (n, bands, frames) of waves (n, t): Hann windows of 25 ms, one every 10 ms.

    Frames are centred on multiples of 10 ms, the ends mirrored. The bands are triangles that overlap by
    half, evenly spaced on the mel scale 2595 log10(1 + f / 700) from 0 to the Nyquist frequency, of peak 1.
    """
    window = torch.hann_window(rate // 40, dtype=waves.dtype)
    size = 2 ** (rate // 40 - 1).bit_length()
    spectrum = torch.stft(waves, size, rate // 100, rate // 40, window, return_complex=True)
    return (mel_bands(rate, size).to(waves) @ spectrum.abs().square() + _FLOOR).log()


def mel_bands(rate: int, size: int) -> Tensor:
    """Weight of each frequency of a Fourier transform of `size` in each mel band, float64 (bands, freqs)."""
    top = 2595 * math.log10(1 + rate / 2 / 700)
    corners = 700 * (10 ** (torch.linspace(0, top, _BANDS + 2, dtype=torch.float64) / 2595) - 1)
    low, peak, high = (corners[start : start + _BANDS, None] for start in range(3))
    frequency = torch.linspace(0, rate / 2, size // 2 + 1, dtype=torch.float64)
    return torch.minimum((frequency - low) / (peak - low), (high - frequency) / (high - peak)).clamp(min=0)


def _find(root: Path) -> Path:
    """The folder that holds the two lists."""
    usual = root / "SpeechCommands" / "speech_commands_v0.02"
    for folder in (usual, root):
        if (folder / "validation_list.txt").is_file():
            return folder
    raise RunError(
        f"data set speech-commands: its files are missing; looked in {usual} (no validation_list.txt, nor in "
        f"{root}). It is not downloaded: unpack speech_commands_v0.02.tar.gz from "
        "http://download.tensorflow.org/data there, or `--set task.data_root=DIR` looks elsewhere"
    )


def _damaged(folder: Path, reason: str) -> RunError:
    return RunError(
        f"data set speech-commands: its files are incomplete or damaged; looked in {folder} ({reason}). "
        "Unpack speech_commands_v0.02.tar.gz there again, or `--set task.data_root=DIR` looks elsewhere"
    )


def _listed(folder: Path, name: str) -> list[str]:
    """The clips on one of the lists, as `word/file.wav`."""
    try:
        return (folder / name).read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise _damaged(folder, f"cannot read {name}: {getattr(error, 'strerror', None) or error}") from error


def _read(folder: Path, name: str) -> npt.NDArray[np.int16]:
    """At most one second of a clip; what its header announces beyond that is not read."""
    try:
        with wave.open(str(folder / name), "rb") as clip:
            found = clip.getnchannels(), 8 * clip.getsampwidth(), clip.getframerate()
            count = min(clip.getnframes(), _RATE)
            raw = clip.readframes(count)
    except Exception as error:  # whatever the reader makes of a damaged file
        raise _damaged(folder, f"{name}: {' '.join(str(error).split()) or type(error).__name__}") from error
    if found != (1, 16, _RATE):
        given = f"{found[0]} channel(s) of {found[1]} bits at {found[2]} Hz"
        raise _damaged(folder, f"{name}: {given}, not 1 of 16 at {_RATE}")
    if not count or len(raw) != 2 * count:
        raise _damaged(folder, f"{name}: {len(raw) // 2} of {count} samples")
    return np.frombuffer(raw, "<i2")


def _moments(inputs: Tensor) -> tuple[float, float]:
    """Mean and standard deviation (1 if they do not deviate) of all values, in float64, a chunk at a time."""
    chunks = torch.split(inputs, _CHUNK)
    mean = sum(float(chunk.double().sum()) for chunk in chunks) / inputs.numel()
    variance = sum(float((chunk.double() - mean).square().sum()) for chunk in chunks) / inputs.numel()
    return mean, variance**0.5 or 1.0
