"""Coverage-guided fuzzing of the decoder, without a corpus: a model or a RunError, nothing else."""

import subprocess
import sys

import pytest

RUNS = 100_000

HARNESS = """
import sys
import zlib

import atheris

with atheris.instrument_imports(include=["fedsparse.core.ledger"]):
    from fedsparse.core.ledger import HEADER, Form, Message, TYPES, decode_masks, messages, unpack

import torch

from fedsparse.core.errors import RunError

torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
MASK = {"w": torch.rand(20, 30, generator=generator) < 0.4, "v": torch.rand(9, generator=generator) < 0.4}
FROZEN = {"w": MASK["w"] & (torch.rand(20, 30, generator=generator) < 0.3), "b": torch.arange(4) > 2}
PARAMS = {"w": torch.randn(20, 30), "v": torch.randn(9), "b": torch.randn(4)}
MODEL = Message(PARAMS, {"steps": torch.tensor(3), "mean": torch.ones(5)}, MASK, FROZEN)
FORMS = [
    Form(bool(bits & 1), bool(bits & 2), MASK if bits & 4 else None, None, values, "fuzz")
    for bits in range(8)
    for values in TYPES.values()
]
SHAPES = {name: mask.shape for name, mask in MASK.items()}
tried = refused = 0


def resident():
    # MB now; libFuzzer's own limit goes by a peak that a large parent process passes on
    with open("/proc/self/statm") as pages:
        return int(pages.read().split()[1]) * 4096 / 2**20


before = resident()


def one(data):
    global tried, refused
    tried += 1
    form = FORMS[data[0] % len(FORMS)] if data else FORMS[0]
    body = bytes(data[1:])
    try:
        if data and data[0] >= 200:
            decode_masks(body, SHAPES, MASK)
        else:
            if len(body) >= HEADER and data[0] < 150:  # the fuzzer need not guess what is fixed, nor sums
                start = b"FS" + bytes([1, form.flags])
                masks = min(int.from_bytes(body[8:10], "little"), len(body) - HEADER)
                rest = len(body) - HEADER - masks
                lengths = [masks, max(rest - 28, 0), min(rest, 28)]
                tail = b"".join(n.to_bytes(6, "little") for n in lengths) + body[HEADER:]
                crc = zlib.crc32(tail, zlib.crc32(start, messages._known(MODEL, form)))
                body = start + crc.to_bytes(4, "little") + tail
            got = unpack(body, MODEL, form)
            assert {n: p.shape for n, p in got.params.items()} == {n: p.shape for n, p in PARAMS.items()}
    except RunError as error:
        assert "corrupt message: " in str(error)
        refused += 1
    if tried % 1_000 == 0:
        assert resident() < before + 256, "large allocations"
    if tried % 10_000 == 0:
        print(f"{tried} executions, {refused} refused", flush=True)


atheris.Setup(sys.argv, one)
atheris.Fuzz()
"""


@pytest.mark.slow
def test_fuzzed_messages(tmp_path):
    """A crash leaves its input in the folder and ends with another status."""
    pytest.importorskip("atheris")
    (tmp_path / "harness.py").write_text(HARNESS)
    limits = [f"-runs={RUNS}", "-max_len=4096", "-rss_limit_mb=0", "-timeout=5", "-seed=1"]
    limits.append("-malloc_limit_mb=256")
    command = [sys.executable, "harness.py", *limits]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert f"Done {RUNS}" in done.stderr
