"""Two hundred damaged checkpoints, each refused with its file and a reason."""

import json
import random
import shutil
import tracemalloc

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedsparse.core import checkpoint
from fedsparse.core.errors import RunError
from fedsparse.core.packing import load_model, save_model


@pytest.fixture(scope="module")
def saved(make_engine, tmp_path_factory):
    """Checkpoints of rounds 1 and 2."""
    folder = tmp_path_factory.mktemp("saved")
    engine = make_engine("scaffold", federation__rounds=2)
    for report in engine.rounds(engine.start()):
        checkpoint.save(folder / str(report.state.round), report.state, engine.ledger.state(), {})
    return folder


def reseal(folder):
    """Sums that fit, as who means harm would write them."""
    (folder / checkpoint.SUMS).write_bytes(checkpoint._sums(folder))


def flip(path, chance):
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def cut(path, chance):
    path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size)])


def lengthen(path, chance):
    path.write_bytes(path.read_bytes() + chance.randbytes(1 + chance.randrange(50)))


def swap(path, chance):
    shutil.copy(path.parent.parent / "other" / path.name, path)


def remove(path, chance):
    path.unlink()


DAMAGES = [flip, flip, cut, cut, lengthen, swap, remove]


def test_two_hundred_damaged_checkpoints(saved, tmp_path):
    chance, folder = random.Random(5), tmp_path / "c"
    shutil.copytree(saved / "1", tmp_path / "other")
    names = [*checkpoint.FILES, checkpoint.SUMS]
    for number in range(200):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(saved / "2", folder)
        DAMAGES[number % len(DAMAGES)](folder / names[number // len(DAMAGES) % 3], chance)
        with pytest.raises(
            RunError, match=rf"^cannot read the checkpoint {folder}, it is damaged: \w+Error ."
        ):
            checkpoint.load(folder, {})
    assert checkpoint.load(saved / "2", {})[0].round == 2


def test_forged_checkpoints_are_refused_without_memory(saved, tmp_path):
    """Missing keys, other shapes and huge ones under sums that fit."""
    plain = (saved / "2" / "state.json").read_text()
    tensors = load_file(saved / "2" / "tensors.safetensors")
    some = next(iter(tensors))
    huge = json.dumps({"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()

    def forged(number, text=plain, content=tensors):
        folder = tmp_path / str(number)
        shutil.copytree(saved / "2", folder)
        (folder / "state.json").write_text(text)
        save_file(content, folder / "tensors.safetensors")
        return folder

    folders = [
        forged(0, content={name: t for name, t in tensors.items() if name != some}),
        forged(1, text=plain.replace('"params"', '"parms"')),
        forged(2, text="[" * 100_000),
        forged(3, text=plain.replace('"tensor"', '"tenser"', 1)),
        forged(4),
    ]
    (folders[4] / "tensors.safetensors").write_bytes(len(huge).to_bytes(8, "little") + huge)
    tracemalloc.start()
    for folder in folders:
        reseal(folder)
        with pytest.raises(RunError, match="it is damaged"):
            checkpoint.load(folder, {})
    assert tracemalloc.get_traced_memory()[1] < 50_000_000
    tracemalloc.stop()


def test_a_model_file_with_a_flipped_bit_is_refused(tmp_path):
    path, chance = tmp_path / "model.safetensors", random.Random(2)
    model = {"w": torch.arange(50.0), "on": torch.tensor([True, False])}
    for _ in range(40):
        save_model(path, model)
        assert torch.equal(load_model(path)["w"], model["w"])
        flip(path, chance)
        with pytest.raises(RunError, match=f"cannot read {path}: ."):
            load_model(path)
