"""Messages of any shape, density, frozen set, type and reference; and bytes that are none of them."""

from __future__ import annotations

import tracemalloc
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fedsparse.core.errors import RunError
from fedsparse.core.ledger import (
    HEADER,
    TYPES,
    Form,
    Ledger,
    Message,
    Seed,
    beside_size,
    deliver,
    message_size,
    pack,
    pack_beside,
    rounded,
    unpack,
    unpack_beside,
)

Tensors = dict[str, torch.Tensor]
ANY = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
SHAPES = st.lists(st.lists(st.integers(0, 7), max_size=4).map(tuple), max_size=4)
FRACTIONS = st.sampled_from([0.0, 0.01, 0.1, 0.5, 0.97, 1.0])
FLOATS = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16])


@st.composite
def models(draw: Callable[..., object]) -> tuple[Message, Form]:
    """A model and the form of a message for it."""
    shapes = [("wide", (30, 40)), *((f"p{i}", shape) for i, shape in enumerate(draw(SHAPES)))]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    values = TYPES[draw(st.sampled_from(list(TYPES)))]
    density, freezing, flips = draw(FRACTIONS), draw(FRACTIONS), draw(st.none() | FRACTIONS)

    def chance(shape: tuple[int, ...], of: float) -> torch.Tensor:
        return torch.rand(shape, generator=generator) < of

    params, mask, frozen = {}, {}, {}
    for name, shape in shapes:
        params[name] = torch.randn(shape, generator=generator).to(draw(FLOATS))
        params[name][chance(shape, 0.05)] = draw(st.sampled_from([-0.0, torch.nan, torch.inf, 5e-8]))
        if draw(st.booleans()):
            mask[name] = chance(shape, density)
            params[name] = torch.where(mask[name], params[name], 0)
        if draw(st.booleans()):
            frozen[name] = chance(shape, freezing) & mask.get(name, torch.tensor(True))
    buffers = {"steps": torch.tensor(2**40 + 1), "mean": torch.randn(3, generator=generator)}
    params, buffers = (rounded(t, values, lambda: "here") for t in (params, buffers))
    reference = None
    if flips is not None:
        reference = {name: m ^ chance(tuple(m.shape), flips) for name, m in mask.items()}
    seed = Seed(draw(st.integers(-(2**63), 2**63 - 1)), lambda key: mask) if draw(st.booleans()) else None
    form = Form(draw(st.booleans()), draw(st.booleans()), reference, seed, values, "round 3, client 5")
    return Message(params, buffers, mask, frozen), form


@ANY
@given(models())
def test_any_message_arrives_and_is_as_long_as_charged(case: tuple[Message, Form]) -> None:
    """`deliver` compares what arrives bit for bit and the length with the formula."""
    model, form = case
    got = deliver(model, message_size(model, form), form)
    assert got.params.keys() == model.params.keys()
    assert all(got.params[name].dtype == p.dtype for name, p in model.params.items())
    with pytest.raises(RunError, match="charged as"):
        deliver(model, message_size(model, form) + 1, form)


def test_any_nan_arrives_as_one() -> None:
    """At the end of a vector a NaN is rounded to other bits than within: 0xffff, 0x7fc0."""
    for place in (0, 1195, 1199):
        bits = torch.zeros(1200, dtype=torch.int16)
        bits[place] = -1
        values = bits.view(torch.bfloat16).double().view(30, 40)
        still = torch.zeros(30, 40, dtype=torch.bool)
        still[7, 3] = True
        model = Message({"w": values}, {}, {}, {"w": still})
        form = Form(values=torch.bfloat16)
        got = deliver(model, message_size(model, form), form)
        assert torch.equal(got.params["w"].isnan(), values.isnan())


@ANY
@given(models())
def test_any_tensors_beside_the_model_arrive(case: tuple[Message, Form]) -> None:
    """Where a mask is named its positions travel, and the rest is 0 already."""
    model, form = case
    live = dict(list(model.mask.items())[::2])
    data = pack_beside(model.params, live, form)
    counts = {name: int(mask.sum()) for name, mask in live.items()}
    assert len(data) == beside_size(model.params, counts, form.values)
    got = unpack_beside(data, model.params, live, form)
    for name, value in model.params.items():
        assert torch.equal(got[name].nan_to_num(7), value.nan_to_num(7))


@ANY
@given(models(), st.data())
def test_any_change_of_a_message_is_refused(case: tuple[Message, Form], data: st.DataObject) -> None:
    """Cut, lengthened, with bits flipped, or noise: one error that names the message and a reason."""
    model, form = case
    good = pack(model, form)
    kind = data.draw(st.sampled_from(["cut", "longer", "flipped", "noise", "header and noise"]))
    if kind == "cut":
        bad = good[: data.draw(st.integers(0, len(good) - 1))]
    elif kind == "longer":
        bad = good + data.draw(st.binary(min_size=1, max_size=20))
    elif kind == "flipped":
        changed = bytearray(good)
        changed[data.draw(st.integers(0, len(good) - 1))] ^= data.draw(st.integers(1, 255))
        bad = bytes(changed)
    else:
        bad = (good[:HEADER] if kind != "noise" else b"") + data.draw(st.binary(max_size=200))
    if bad != good:
        with pytest.raises(RunError, match=r"^round 3, client 5: corrupt message: ."):
            unpack(bad, model, form)


def sealed(data: bytes, known: int) -> bytes:
    """The same bytes with a checksum that fits, as who means harm would write them."""
    return data[:4] + zlib.crc32(data[8:], zlib.crc32(data[:4], known)).to_bytes(4, "little") + data[8:]


@ANY
@given(models(), st.data())
def test_a_forged_checksum_crashes_nothing(case: tuple[Message, Form], data: st.DataObject) -> None:
    """What passes the checksum is a model of the right shapes or a RunError, nothing else."""
    from fedsparse.core.ledger import messages

    model, form = case
    changed = bytearray(pack(model, form))
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(HEADER, len(changed) - 1))] = data.draw(st.integers(0, 255))
    got = outcome(lambda: unpack(sealed(bytes(changed), messages._known(model, form)), model, form))
    if isinstance(got, Message):
        assert {n: p.shape for n, p in got.params.items()} == {n: p.shape for n, p in model.params.items()}
    else:
        assert got.startswith("round 3, client 5: corrupt message: ")


def outcome(action: Callable[[], Any]) -> Any:
    """What it returns, or the text of its RunError."""
    try:
        return action()
    except RunError as error:
        return str(error)


def plain(density: float = 0.3) -> Message:
    generator = torch.Generator().manual_seed(1)
    mask = {"fc.weight": torch.rand(60, 50, generator=generator) < density}
    weight = torch.randn(60, 50, generator=generator) * mask["fc.weight"]
    params = {"fc.weight": weight, "fc.bias": torch.randn(60, generator=generator)}
    return Message(params, {"steps": torch.tensor(7)}, mask, {})


def test_a_thousand_corrupted_payloads() -> None:
    """Every one is refused by name and with a reason, and memory stays that of the shapes."""
    forms = [
        Form(label="round 3, download of client 5"),
        Form(send_mask=True, values=torch.bfloat16, label="round 3, download of client 5"),
        Form(send_mask=True, reference=plain(0.31).mask, label="round 3, upload of client 5"),
        Form(send_mask=True, send_frozen=True, label="round 9, download of client 1"),
    ]
    generator = torch.Generator().manual_seed(3)

    def below(limit: int) -> int:
        return int(torch.randint(limit, (1,), generator=generator))

    model = plain()
    model = model._replace(params=rounded(model.params, torch.bfloat16, str))
    whole = [pack(model, form) for form in forms]
    refused = peak = 0
    tracemalloc.start()
    for index in range(1000):
        form, data = forms[index % 4], bytearray(whole[index % 4])
        match index // 4 % 5:
            case 0:
                del data[below(len(data)) :]
            case 1:
                data[below(len(data))] ^= 1 << below(8)
            case 2:
                data += bytes(1 + below(100))
            case 3:  # lengths of up to 256 TB
                data[8 + below(HEADER - 8)] ^= 1 + below(255)
            case _:
                data = bytearray(whole[(index + 1) % 4])
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        said = outcome(partial(unpack, bytes(data), model, form))
        refused += isinstance(said, str) and said.startswith(f"{form.label}: corrupt message: ")
        peak = max(peak, tracemalloc.get_traced_memory()[1] - before)
    tracemalloc.stop()
    assert refused == 1000
    assert peak < 300_000  # a model has 12,000 bytes


def test_a_message_is_for_one_receiver() -> None:
    """One for another client, round, model or mask is refused, although its lengths are right."""
    model, form = plain(), Form(label="round 1, upload of client 2")
    data = pack(model, form)
    unpack(data, model, form)
    turned = {name: mask.flip(0) for name, mask in model.mask.items()}
    others = {"fc.weight": model.params["fc.weight"].reshape(50, 60), "fc.bias": model.params["fc.bias"]}
    for held, expected in [
        (model, form._replace(label="round 1, upload of client 3")),
        (model._replace(mask=turned), form),
        (model._replace(params=others, mask={"fc.weight": model.mask["fc.weight"].reshape(50, 60)}), form),
    ]:
        with pytest.raises(RunError, match="checksum is wrong"):
            unpack(data, held, expected)


def test_a_message_claims_no_memory() -> None:
    """A forged message that promises ever more positions is refused before any are taken."""
    from fedsparse.core.ledger import messages

    model, form = plain(), Form(send_mask=True)
    known = messages._known(model, form)
    data = bytearray(pack(model, form))
    data[HEADER : HEADER + 8] = bytes([1, 255, 255, 255, 255, 255, 255, 31])
    tracemalloc.start()
    with pytest.raises(RunError, match="a number without end"):
        unpack(sealed(bytes(data), known), model, form)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


@example("float16", 65504.0)
@given(st.sampled_from(["float16", "bfloat16"]), st.floats(width=32, allow_nan=False))
def test_values_are_rounded_once(kind: str, value: float) -> None:
    """To the nearest, idempotent; a finite value never becomes infinite."""
    tensors = {"w": torch.tensor([value])}
    once = outcome(lambda: rounded(tensors, TYPES[kind], lambda: "round 2, upload of client 7"))
    if isinstance(once, str):
        assert abs(value) > 65504 or kind == "bfloat16"
        assert once.startswith("round 2, upload of client 7: 'w' holds ")
        assert "ledger.values" in once
        return
    assert torch.equal(once["w"], tensors["w"].to(TYPES[kind]).to(torch.float32))
    assert torch.equal(rounded(once, TYPES[kind], str)["w"], once["w"])
    assert once["w"].isfinite().item() or not tensors["w"].isfinite().item()


def test_integers_are_never_rounded() -> None:
    counter = {"steps": torch.tensor(2**24 + 1), "on": torch.tensor([True])}
    got = rounded(counter, torch.float16, str)
    assert all(torch.equal(got[name], value) for name, value in counter.items())


def ledger(**options: object) -> tuple[Ledger, Message]:
    model = plain()
    made = Ledger(model.params, model.buffers, {"fc.weight": 3000.0}, encode=True, **options)  # type: ignore[arg-type]
    return made, model


def test_two_byte_values_are_charged_as_such() -> None:
    """Counters keep their 8 bytes."""
    whole, model = ledger()
    half, _ = ledger(values=torch.float16)
    sizes = []
    for one in (whole, half):
        one.begin_round(model.params, model.buffers, model.mask, {})
        sizes.append(one.download(1).size)
    assert sizes[0] - sizes[1] == 2 * (int(model.mask["fc.weight"].sum()) + 60)


def test_a_seed_stands_for_the_first_mask() -> None:
    """8 bytes at first contact while the mask is the one that was drawn; then masks are sent."""
    drawn = []

    def masks(key: int) -> Tensors:
        drawn.append(key)
        return {name: mask.clone() for name, mask in plain().mask.items()}

    one, model = ledger(seed=Seed(-5, masks))
    one.begin_round(model.params, model.buffers, model.mask, {})
    first = one.download(1)
    assert drawn == [-5, -5]  # held against the mask, and drawn by the client
    bare = first.size - 8
    one.end_round()
    one.begin_round(model.params, model.buffers, model.mask, {})
    assert one.download(1).size == bare
    assert one.download(2).size == bare + 8
    resumed, _ = ledger(seed=Seed(-5, masks))
    resumed.load_state(one.state())
    resumed.begin_round(model.params, model.buffers, model.mask, {})
    assert resumed.download(3).size == bare + 8
    moved = {"fc.weight": model.mask["fc.weight"].clone()}
    at = moved["fc.weight"].nonzero()[0]
    moved["fc.weight"][at[0], at[1]] = False
    resumed.begin_round(model.params, model.buffers, moved, {})
    assert resumed.download(4).size > bare + 300
    other, _ = ledger(seed=Seed(-5, masks))
    other.begin_round(model.params, model.buffers, moved, {})  # not what the seed draws
    assert other.download(1).size > bare + 300


def test_who_missed_rounds_gets_the_whole_mask() -> None:
    """One round behind: the changed position; two behind: the mask; never there: the mask."""
    one, model = ledger()
    masks = [{"fc.weight": model.mask["fc.weight"].clone()} for _ in range(4)]
    for index, mask in enumerate(masks):
        mask["fc.weight"].view(-1)[: index * 3] ^= True
    here = [[1, 2], [1], [1, 2, 3], [3, 2]]
    sizes = []
    for mask, clients in zip(masks, here, strict=True):
        one.begin_round(model.params, model.buffers, mask, {})
        live = 4 * int(mask["fc.weight"].sum())
        rest = HEADER + live + 4 * 60 + 8
        sizes.append([one.download(client).size - rest for client in clients])
        one.end_round()
    whole, step = 1 + 3000 // 8, 1 + 1 + 3  # a bitmap; a tag, a count and three gaps
    assert sizes[0] == [whole, whole]
    assert sizes[1] == [step]
    assert sizes[2] == [step, whole, whole]
    assert sizes[3] == [step, step]


def test_frozen_values_that_changed_are_sent_again() -> None:
    """A policy that freezes the same weights anew, at other values, tells every client."""
    one, model = ledger()
    frozen = {"fc.weight": model.mask["fc.weight"].clone()}
    frozen["fc.weight"][10:] = False
    params = model.params
    sizes = []
    for change in (0.0, 0.0, 1.0, 1.0):
        moved = {n: torch.where(frozen[n], p + change, p) if n in frozen else p for n, p in params.items()}
        one.begin_round(moved, model.buffers, model.mask, {n: f.clone() for n, f in frozen.items()})
        sizes.append(one.download(1).size)
        one.end_round()
    still = 4 * int(frozen["fc.weight"].sum())
    assert sizes[1] == sizes[3] < sizes[2] - still


def test_what_goes_beside_the_model() -> None:
    """Twins of parameters where they train, others whole; a message each, charged and decoded."""
    one, model = ledger()
    one.begin_round(model.params, model.buffers, model.mask, {})
    live = int(model.mask["fc.weight"].sum())
    before = one.round.download_bytes
    tensors = {"control/fc.weight": torch.ones(60, 50), "number": torch.tensor(2.5)}
    got = one.beside(tensors, "download", 1)
    assert one.round.download_bytes - before == HEADER + 4 * live + 4
    assert torch.equal(got["control/fc.weight"], model.mask["fc.weight"].float())
    assert got["number"].item() == 2.5
    whole = one.beside({"fc.weight": torch.ones(60, 50)}, "upload", 1, whole=True)
    assert one.round.upload_bytes == HEADER + 4 * 3000
    assert one.metrics()["upload_other_bytes"] == HEADER + 4 * 3000
    assert bool((whole["fc.weight"] == 1).all())
    assert one.beside({}, "upload", 1) == {}
