"""Speech Commands: the official split, the labels, the features, and what a user reads about bad files."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from fedsparse.core.data import DATASETS, Dataset, speech
from fedsparse.core.errors import RunError

LAID_OUT = Path("SpeechCommands", "speech_commands_v0.02")
WORDS = ("yes", "cat", "no")


def load(root: Path, download: bool = False, **settings: object) -> Dataset:
    dataset: Dataset = DATASETS["speech-commands"](**settings).load(root, download)
    return dataset


def write(path: Path, samples: np.ndarray, rate: int = 16_000, channels: int = 1, width: int = 2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as clip:
        clip.setnchannels(channels)
        clip.setsampwidth(width)
        clip.setframerate(rate)
        clip.writeframes(samples.astype("<i2").tobytes())


def noise(seed: int, length: int = 16_000) -> np.ndarray:
    return np.random.default_rng(seed).integers(-32768, 32768, length)


def corpus(folder: Path) -> dict[str, np.ndarray]:
    """Four clips a word (file 0 for testing, file 1 for validation), by `word/file.wav`, and other files."""
    clips = {f"{word}/{k}.wav": noise(10 * w + k) for w, word in enumerate(WORDS) for k in range(4)}
    for name, samples in clips.items():
        write(folder / name, samples)
    write(folder / "_background_noise_/hum.wav", noise(99, 40_000))
    (folder / "README.md").write_text("words")
    (folder / "testing_list.txt").write_text("".join(f"{word}/0.wav\n" for word in WORDS))
    (folder / "validation_list.txt").write_text("".join(f"{word}/1.wav\n" for word in WORDS))
    return clips


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("data")
    corpus(folder / LAID_OUT)
    return folder


def test_clips_are_kept_as_they_were_recorded_with_labels_in_the_order_of_the_words(tmp_path: Path) -> None:
    clips = corpus(tmp_path / LAID_OUT)
    dataset = load(tmp_path)
    assert dataset.classes == 3
    assert dataset.train_inputs.shape == (6, 1, 1, 16_000)
    assert dataset.train_inputs.dtype == torch.int16
    assert dataset.input_shape == (1, 1, 16_000)
    assert dataset.train_targets.tolist() == [0, 0, 1, 1, 2, 2]  # cat, no, yes
    assert dataset.train_targets.dtype == torch.int64
    for row, (word, k) in enumerate((w, k) for w in sorted(WORDS) for k in (2, 3)):
        assert np.array_equal(dataset.train_inputs[row, 0, 0].numpy(), clips[f"{word}/{k}.wav"])


@pytest.mark.parametrize(
    ("validation", "train", "test"), [("unused", "23", "0"), ("train", "123", "0"), ("test", "23", "01")]
)
def test_official_lists_decide_the_split(root: Path, validation: str, train: str, test: str) -> None:
    dataset = load(root, validation=validation)

    def held(inputs: torch.Tensor) -> list[int]:
        return inputs[:, 0, 0, 0].tolist()

    def expected(files: str) -> list[int]:
        return [int(noise(10 * WORDS.index(word) + int(k))[0]) for word in sorted(WORDS) for k in files]

    assert held(dataset.train_inputs) == expected(train)
    assert held(dataset.test_inputs) == expected(test)
    assert dataset.test_targets.tolist() == sorted([0, 1, 2] * len(test))


def test_the_folder_itself_may_be_the_data_root(root: Path) -> None:
    assert torch.equal(load(root / LAID_OUT).train_inputs, load(root).train_inputs)


def test_short_clips_are_padded_at_the_end_and_long_ones_cut(tmp_path: Path) -> None:
    clips = corpus(tmp_path)
    write(tmp_path / "cat/2.wav", noise(1, 11_000))
    write(tmp_path / "cat/3.wav", noise(2, 30_000))
    short, long = load(tmp_path).train_inputs[:2, 0, 0].numpy()
    assert np.array_equal(short, np.concatenate([noise(1, 11_000), np.zeros(5_000)]))
    assert np.array_equal(long, noise(2, 30_000)[:16_000])
    assert len(clips) == 12


def test_clips_beyond_one_chunk_are_in_their_places(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load(root, sample_rate=8000)
    monkeypatch.setattr(speech, "_CHUNK", 4)
    pieces = load(root, sample_rate=8000)
    assert torch.equal(whole.train_inputs, pieces.train_inputs)


def test_normalised_waveforms_are_in_minus_1_to_1(root: Path) -> None:
    dataset = load(root)
    values = dataset.normalise(dataset.train_inputs)
    assert values.dtype == torch.float32
    assert values.shape == dataset.train_inputs.shape
    assert torch.equal(values, dataset.train_inputs.float() / 32768)
    assert float(values.abs().max()) <= 1


def tone(hertz: float, rate: int = 16_000) -> torch.Tensor:
    return 0.5 * torch.sin(2 * torch.pi * hertz * torch.arange(rate, dtype=torch.float64) / rate)[None]


def test_halving_the_rate_keeps_what_the_new_rate_can_hold() -> None:
    for hertz in (100.0, 1000.0, 2500.0):
        halved = speech.halved(tone(hertz))
        assert halved.shape == (1, 8000)
        # the ripple where the filter does not fall yet (-6 dB at 3960 Hz); the ends see the zeros beyond
        torch.testing.assert_close(halved[:, 20:-20], tone(hertz, 8000)[:, 20:-20], rtol=0, atol=0.005)


def test_halving_the_rate_removes_what_would_alias() -> None:
    for hertz in (5000.0, 6500.0, 7500.0):
        # a hundredth of the tone: 40 dB, in the filter's stop band
        assert float(speech.halved(tone(hertz))[:, 20:-20].abs().max()) < 0.005


def test_halving_the_rate_is_the_windowed_sinc_sum() -> None:
    wave_ = torch.randn(1, 101, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    halved = speech.halved(wave_)
    assert halved.shape == (1, 51)
    for out in (0, 7, 25, 50):
        total = 0.0
        for t in range(101):
            x = 0.99 * (t - 2 * out) / 2  # in zero crossings of the sinc, of which 6 a side are kept
            if abs(x) < 6:
                total += 0.495 * float(wave_[0, t]) * float(np.sinc(x)) * float(np.cos(np.pi * x / 12)) ** 2
        assert abs(float(halved[0, out]) - total) < 1e-12  # the same sum in another order


def test_8_khz_clips_are_the_resampled_ones_to_the_nearest_step(root: Path) -> None:
    full, half = load(root), load(root, sample_rate=8000)
    assert half.train_inputs.shape == (6, 1, 1, 8000)
    assert half.train_inputs.dtype == torch.int16
    expected = speech.halved(full.train_inputs.flatten(1) / 32768)
    found = half.normalise(half.train_inputs).flatten(1)
    clipped = expected.clamp(-1, 32767 / 32768)  # full-scale noise overshoots
    # half a step of 1/32768, and float32 at 1
    torch.testing.assert_close(found, clipped, rtol=0, atol=0.5 / 32768 + 1e-7)


@pytest.mark.parametrize("rate", [8000, 16_000])
def test_log_mel_spectra_have_their_shape_and_are_normalised(root: Path, rate: int) -> None:
    dataset = load(root, features="log-mel", sample_rate=rate)
    assert dataset.input_shape == (1, 40, 101)
    assert dataset.train_inputs.dtype == dataset.test_inputs.dtype == torch.float16
    values = dataset.normalise(dataset.train_inputs)
    assert values.dtype == torch.float32
    # mean and deviation are those of the stored values; float32 sums of 24,240 of them
    assert abs(float(values.mean())) < 1e-4
    assert abs(float(values.std(correction=0)) - 1) < 1e-4
    assert dataset.train_targets.tolist() == load(root).train_targets.tolist()


@pytest.mark.parametrize("rate", [8000, 16_000])
def test_mel_bands_are_half_overlapping_triangles_that_miss_nothing(rate: int) -> None:
    bands = speech.mel_bands(rate, rate // 31)
    assert bands.shape == (40, rate // 31 // 2 + 1)
    assert bool((bands.sum(1) > 0).all())
    assert float(bands.max()) <= 1
    assert bool((bands > 0).sum(0).le(2).all())
    hertz = torch.linspace(0, rate / 2, bands.shape[1], dtype=torch.float64)
    mel = 2595 * torch.log10(1 + hertz / 700)
    step = mel[-1] / 41
    inside = (mel >= step) & (mel <= 40 * step)  # between the first and the last peak
    torch.testing.assert_close(bands[:, inside].sum(0), torch.ones(int(inside.sum()), dtype=torch.float64))


def test_log_mel_of_a_tone_peaks_in_its_band_at_its_time() -> None:
    clip = tone(1000.0)
    clip[:, :8000] = 0
    spectrum = speech.log_mel(clip, 16_000)[0]
    assert spectrum.shape == (40, 101)
    mel = 2595 * np.log10(1 + 1000 / 700)
    band = round(mel / (2595 * np.log10(1 + 8000 / 700)) * 41) - 1
    assert int(spectrum[:, 75].argmax()) == band
    assert float(spectrum[:, :48].max()) == pytest.approx(np.log(1e-6))  # silence until half a second
    assert float(spectrum[band, 75]) > 3
    # a tone of amplitude a gives |a / 2 * (sum of the window)|^2 spread over the bins of its main lobe
    bins = (
        torch.stft(clip, 512, 160, 400, torch.hann_window(400).double(), return_complex=True).abs().square()
    )
    energy = float(bins[0, 32, 75])
    assert energy == pytest.approx((0.5 / 2 * 200) ** 2, rel=1e-3)  # leakage of the negative frequency
    assert float(spectrum[band, 75].exp()) > 0.5 * energy


def test_silence_alone_is_finite(tmp_path: Path) -> None:
    for name in corpus(tmp_path):
        write(tmp_path / name, np.zeros(100))
    dataset = load(tmp_path, features="log-mel")
    assert bool(dataset.normalise(dataset.train_inputs).isfinite().all())


@pytest.mark.parametrize("download", [False, True])
def test_a_missing_folder_is_one_message_that_says_what_to_do(tmp_path: Path, download: bool) -> None:
    with pytest.raises(RunError) as caught:
        load(tmp_path, download)
    message = str(caught.value)
    assert "\n" not in message
    assert "data set speech-commands: its files are missing" in message
    assert str(tmp_path / LAID_OUT) in message
    assert "unpack speech_commands_v0.02.tar.gz" in message
    assert "`--set task.data_root=DIR`" in message
    assert "download=true" not in message  # would not help


def spoil(folder: Path, how: str) -> None:
    path = folder / "no/2.wav"
    if how == "cut":
        path.write_bytes(path.read_bytes()[:5001])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "no samples":
        write(path, np.zeros(0))
    elif how == "text":
        path.write_text("<html>not found</html>")
    elif how == "rate":
        write(path, noise(0), rate=44_100)
    elif how == "stereo":
        write(path, noise(0), channels=2)
    elif how == "8 bits":
        write(path, noise(0), width=1)
    elif how == "lost":
        (folder / "cat/0.wav").unlink()
    elif how == "no list":
        (folder / "testing_list.txt").unlink()
    elif how == "binary list":
        (folder / "testing_list.txt").write_bytes(b"\xff\xfe")
    elif how == "no test":
        (folder / "testing_list.txt").write_text("")


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("cut", "no/2.wav: 2478 of 16000 samples"),
        ("empty", "no/2.wav: EOFError"),
        ("no samples", "no/2.wav: 0 of 0 samples"),
        ("text", "no/2.wav: file does not start with RIFF id"),
        ("rate", r"no/2.wav: 1 channel\(s\) of 16 bits at 44100 Hz"),
        ("stereo", r"no/2.wav: 2 channel\(s\) of 16 bits"),
        ("8 bits", r"no/2.wav: 1 channel\(s\) of 8 bits"),
        ("lost", "1 of the 6 clips on its lists are missing, such as cat/0.wav"),
        ("no list", "cannot read testing_list.txt: No such file"),
        ("binary list", "cannot read testing_list.txt: 'utf-8' codec"),
        ("no test", "9 train and 0 test clips"),
    ],
)
def test_damaged_files_are_one_message(tmp_path: Path, how: str, reason: str) -> None:
    corpus(tmp_path)
    spoil(tmp_path, how)
    with pytest.raises(RunError, match=reason) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("data set speech-commands: its files are incomplete or damaged")


def test_more_than_the_memory_limit_is_refused_before_anything_is_read(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = (6 + 3) * 32_000  # train and test clips
    monkeypatch.setattr(speech, "_LARGEST", needed - 1)
    monkeypatch.setattr(speech, "_read", lambda *_: pytest.fail("a clip was read"))
    with pytest.raises(RunError, match=r"12 clips .* ask for 0.0 GiB") as caught:
        load(root)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    monkeypatch.setattr(speech, "_LARGEST", needed)
    assert len(load(root).train_inputs) == 6


def test_a_header_that_announces_gigabytes_costs_no_memory(tmp_path: Path) -> None:
    corpus(tmp_path)
    path = tmp_path / "no/2.wav"
    raw = bytearray(path.read_bytes())
    raw[40:44] = (2**32 - 2).to_bytes(4, "little")  # the size of the data
    path.write_bytes(raw)
    assert load(tmp_path).train_inputs.shape == (6, 1, 1, 16_000)


@pytest.mark.parametrize("settings", [{"sample_rate": 11025}, {"features": "mfcc"}, {"validation": "drop"}])
def test_other_settings_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        DATASETS["speech-commands"](**settings)
