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
from fedsparse.core.runner import run


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


def places(value, path=()):
    """Paths of everything in nested tables and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        yield (*path, name)
        yield from places(item, (*path, name))


def test_a_forged_state_or_ledger_is_refused_before_the_first_round(saved, make_engine, tmp_path):
    """Of other types, or without an entry, under sums that fit: read whole, or refused."""
    text, chance = (saved / "2" / "state.json").read_text(), random.Random(7)
    engine, folder, refused = make_engine("scaffold", federation__rounds=2), tmp_path / "c", 0
    shutil.copytree(saved / "2", folder)
    ours = [p for p in places(json.loads(text)) if p[0] == "round" or not {"memory", "rows"} & set(p[:3])]
    for _ in range(300):
        plain, path = json.loads(text), chance.choice(ours)
        node = plain
        for name in path[:-1]:
            node = node[name]
        if chance.random() < 0.3:
            del node[path[-1]]
        else:
            node[path[-1]] = chance.choice([None, "x", -1, 10**30, [], {}, {"plain": 3}, [1, 2], "params"])
        (folder / "state.json").write_text(json.dumps(plain))
        reseal(folder)
        try:
            state, ledger = checkpoint.load(folder, {})
            checkpoint.check(state, engine.params, engine.buffers, engine.prunable)
            engine.ledger.load_state(ledger)
        except RunError:
            refused += 1
    assert refused > 200


def test_a_resumed_run_names_the_checkpoint_whose_state_is_none(make_resolved, tmp_path):
    made = make_resolved("fedavg", federation__rounds=2, output__checkpoint_every=1)
    run(made, out=tmp_path / "run")
    folder = tmp_path / "run" / "checkpoint"
    text = (folder / "state.json").read_text()
    for old, new, said in [
        ('"seeded": {"plain": -1}', '"seeded": {"plain": "x"}', "its ledger is damaged: TypeError "),
        ('{"tensor": "/mask/fc1.weight"}', '{"tensor": "/mask/fc2.weight"}', "its mask 'fc1.weight' is not"),
    ]:
        assert old in text
        (folder / "state.json").write_text(text.replace(old, new))
        reseal(folder)
        with pytest.raises(RunError, match=f"^cannot read the checkpoint {folder}: {said}"):
            run(made, out=tmp_path / "run", resume=True)


def test_a_model_file_with_a_flipped_bit_is_refused(tmp_path):
    path, chance = tmp_path / "model.safetensors", random.Random(2)
    model = {"w": torch.arange(50.0), "on": torch.tensor([True, False])}
    for _ in range(40):
        save_model(path, model)
        assert torch.equal(load_model(path)["w"], model["w"])
        flip(path, chance)
        with pytest.raises(RunError, match=f"cannot read {path}: ."):
            load_model(path)
