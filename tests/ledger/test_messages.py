"""Messages: bit-exact round trips, sizes to the byte, the documents' worked examples."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fedsparse.core.errors import RunError
from fedsparse.core.ledger import (
    HEADER,
    Form,
    Message,
    MessageSize,
    deliver,
    measure,
    message_size,
    pack,
    unpack,
)

CIFAR10_NET = {
    "conv1": (6, 3, 5, 5),
    "conv2": (16, 6, 5, 5),
    "fc1": (120, 6400),
    "fc2": (84, 120),
    "fc3": (10, 84),
}
CIFAR10_BUDGET = {"conv1": 103, "conv2": 492, "fc1": 153438, "fc2": 2126, "fc3": 240}


def first(shape: tuple[int, ...], size: int) -> torch.Tensor:
    """The first `size` positions."""
    return (torch.arange(math.prod(shape)) < size).reshape(shape)


def random_model(density: float, freezing: float, seed: int = 0) -> Message:
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator)

    shapes = {
        "conv.weight": (5, 3, 3, 3),
        "bn.weight": (5,),
        "scalar": (),
        "fc.weight": (40, 20),
        "fc.bias": (40,),
    }
    params = {name: rand(*shape) - 0.5 for name, shape in shapes.items()}
    params["fc.bias"] = params["fc.bias"].to(torch.bfloat16)
    mask = {name: rand(*shapes[name]) < density for name in ("conv.weight", "fc.weight")}
    frozen = {name: (rand(*shapes[name]) < freezing) & mask[name] for name in mask}
    frozen["bn.weight"] = rand(5) < freezing
    for name in mask:
        params[name] *= mask[name]
    buffers = {"mean": rand(5), "steps": torch.tensor(2**40 + seed), "flag": torch.tensor([True, False])}
    return Message(params, buffers, mask, frozen)


@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("freezing", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("send_mask", [True, False])
@pytest.mark.parametrize("send_frozen", [True, False])
@pytest.mark.parametrize("with_reference", [True, False])
def test_round_trip(
    density: float, freezing: float, send_mask: bool, send_frozen: bool, with_reference: bool
) -> None:
    """What a message leaves out the receiver has; together they are the model, bit for bit."""
    model = random_model(density, freezing)
    model.params["fc.weight"][model.mask["fc.weight"].nonzero()[:1].unbind(1)] = -0.0  # its sign survives
    reference = random_model(density, freezing, 1).mask if with_reference else None
    form = Form(send_mask, send_frozen, reference)
    size = message_size(model, form)
    data = pack(model, form)
    assert size == len(data)
    deliver(model, size, form)

    other = random_model(0.3, 0.3, 7)
    params = {
        name: torch.where(model.frozen[name], model.params[name], param) if name in model.frozen else param
        for name, param in other.params.items()
    }
    held = Message(
        other.params if send_frozen else params,
        other.buffers,
        other.mask if send_mask else model.mask,
        other.frozen if send_frozen else model.frozen,
    )
    got = unpack(data, held, form)
    for left, right in zip(got, model, strict=True):
        assert left.keys() == right.keys()
        for name in right:
            assert left[name].dtype == right[name].dtype
            assert torch.equal(left[name], right[name])
            if right[name].dtype == torch.float32 and name in model.mask:
                at = model.mask[name]
                assert torch.equal(left[name][at].view(torch.int32), right[name][at].view(torch.int32))


def test_sections() -> None:
    """Each section's size by hand."""
    mask = {"w": first((10, 10), 40)}
    frozen = {"w": first((10, 10), 30), "g": torch.tensor([True, True, False])}
    params = {"w": torch.ones(10, 10), "g": torch.ones(3), "half": torch.ones(4, dtype=torch.float16)}
    buffers = {"mean": torch.ones(3), "steps": torch.tensor(5)}
    size = measure(Message(params, buffers, mask, frozen))
    # bitmaps of 100 and of the 40 active positions; of three flags the bitmap, too
    assert size == MessageSize(
        values=40, frozen_values=128, dense=12, buffers=20, mask=14, frozen_mask=(1 + 5) + (1 + 1)
    )
    assert size.total() == HEADER + 72
    assert size.total(send_mask=True) == HEADER + 86
    assert size.total(send_frozen=True) == HEADER + 208
    assert size.total(send_mask=True, send_frozen=True) == HEADER + 222


def test_nan_and_strides_survive() -> None:
    """Values are copied as bits, in row-major order of any memory format."""
    weight = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    weight[0, 0, 0, 0] = math.nan
    mask = {"w": weight > -0.5}
    mask["w"][0, 0, 0, 0] = True
    plain = Message({"w": weight}, {}, mask, {})
    last = Message({"w": nn.Parameter(weight.to(memory_format=torch.channels_last))}, {}, mask, {})
    assert pack(last) == pack(plain)
    deliver(last, message_size(last))


def test_nothing_to_send() -> None:
    """No parameters, a header."""
    empty = Message({}, {}, {}, {})
    assert len(pack(empty, Form(True, True))) == message_size(empty, Form(True, True)) == HEADER


def test_corrupt_messages_raise() -> None:
    """A message of any other length is refused; so is a wrong claim about its length."""
    model = random_model(0.5, 0.5)
    data = pack(model, Form(True, True))
    for wrong in (data[:-1], data[:10], b"", data + b"\0"):
        with pytest.raises(RunError, match="corrupt message"):
            unpack(wrong, model, Form(True, True))
    with pytest.raises(RunError, match=f"{len(data)} bytes was charged as {len(data) + 1}"):
        deliver(model, len(data) + 1, Form(True, True))


def test_pffdst_worked_example_bits() -> None:
    """PFFDST document, worked examples 10.2 and 10.6: 24 bytes of values, 2 of bitmap; the tag adds one."""
    params = {"w": torch.tensor([0.9, 0.1, 0.2, 0.4, 0.275, 0.3, -0.7, 0.0, 0.5, -0.185, 0.0, 0.08])}
    frozen = {"w": torch.zeros(12, dtype=torch.bool)}
    frozen["w"][[0, 3, 5, 6]] = True
    mask = {"w": frozen["w"].clone()}
    mask["w"][[1, 2, 4, 8, 9, 11]] = True
    model = Message(params, {}, mask, frozen)
    assert len(pack(model)) == HEADER + 24
    assert len(pack(model, Form(True))) == HEADER + 24 + 1 + 2
    # first contact: the four frozen values, and which of the ten active positions they are
    assert len(pack(model, Form(True, True))) == HEADER + 27 + 4 * 4 + 1 + 2
    assert measure(model) == MessageSize(24, 16, 0, 0, 3, 3)


def test_feddst_worked_example_cost() -> None:
    """FedDST document, worked example 10.7: CIFAR10Net at S = 0.8 sends 626,540 bytes per direction."""
    params = {f"{name}.weight": torch.ones(shape) for name, shape in CIFAR10_NET.items()}
    params |= {f"{name}.bias": torch.ones(shape[0]) for name, shape in CIFAR10_NET.items()}
    mask = {f"{name}.weight": first(shape, CIFAR10_BUDGET[name]) for name, shape in CIFAR10_NET.items()}
    size = measure(Message(params, {}, mask, {}))
    assert (size.values, size.dense, size.buffers) == (4 * 156399, 4 * 236, 0)
    assert size.total() - HEADER == 626_540


def test_feddst_invariant_15() -> None:
    """FedDST document, invariant 15: 4·|M| + 4·Σβ + mask bytes, the sum of the serialized sizes."""
    generator = torch.Generator().manual_seed(5)
    params = {"w": torch.randn(50, 40, generator=generator), "b": torch.randn(50, generator=generator)}
    mask = {"w": torch.rand(50, 40, generator=generator) < 0.2}
    active = int(mask["w"].sum())
    model = Message(params, {}, mask, {})
    bitmap = 1 + 2000 // 8
    assert message_size(model, Form(True)) == HEADER + 4 * active + 4 * 50 + bitmap
    serialized = len(params["w"][mask["w"]].numpy().tobytes()) + len(params["b"].numpy().tobytes())
    assert len(pack(model)) == HEADER + serialized
    assert len(pack(model, Form(True))) == HEADER + serialized + bitmap


def half_b() -> tuple[Message, list[Message]]:
    """A server in PFFDST's half B and what two clients made of it."""
    server = random_model(0.5, 0.5)
    generator = torch.Generator().manual_seed(9)

    def trained(name: str, param: torch.Tensor) -> torch.Tensor:
        step = torch.randn(param.shape, generator=generator).to(param.dtype)
        still = server.frozen.get(name, torch.zeros_like(param, dtype=torch.bool))
        step = step.masked_fill(still | ~server.mask.get(name, ~still | still), 0)
        return param + step

    return server, [
        server._replace(params={name: trained(name, p) for name, p in server.params.items()})
        for _ in range(2)
    ]


def test_pffdst_invariant_8() -> None:
    """PFFDST document, invariant 8: no frozen value is uploaded, and the aggregate is bitwise the same."""
    server, clients = half_b()
    for client in clients:
        scrambled = {
            name: torch.where(server.frozen[name], math.pi, param) if name in server.frozen else param
            for name, param in client.params.items()
        }
        assert pack(client._replace(params=scrambled)) == pack(client)
    received = [unpack(pack(client), server).params for client in clients]
    for name in server.params:
        mixed, rebuilt = (0.75 * a[name] + 0.25 * b[name] for a, b in ([c.params for c in clients], received))
        assert torch.equal(mixed, rebuilt)
        if name in server.frozen:
            still = server.frozen[name]
            assert torch.equal(received[0][name][still], server.params[name][still])


def batch_norms() -> nn.ModuleList:
    """The twenty BatchNorms of ResNet-18."""
    return nn.ModuleList(nn.BatchNorm2d(width) for width in (64, 128, 256, 512) for _ in range(5))


def test_pffdst_norm_bytes() -> None:
    """PFFDST document, 5.2: BatchNorm of ResNet-18 takes 76,960 bytes, 19,200 less with its scales frozen."""
    norms = batch_norms()
    params, buffers = dict(norms.named_parameters()), dict(norms.named_buffers())
    assert message_size(Message(params, buffers, {}, {})) - HEADER == 76_960
    frozen = {
        name: torch.ones_like(p, dtype=torch.bool) for name, p in params.items() if name.endswith("weight")
    }
    assert message_size(Message(params, buffers, {}, frozen)) - HEADER == 76_960 - 4 * 4800


def test_pffdst_invariant_16() -> None:
    """PFFDST document, invariant 16: a half-B upload is 4·|G| + norm' + 4·Σβ; after the header."""
    norms = batch_norms()
    params = {"fc.weight": torch.ones(10, 512), "fc.bias": torch.ones(10), **dict(norms.named_parameters())}
    mask = {"fc.weight": first((10, 512), 980)}
    frozen = {"fc.weight": first((10, 512), 500)}
    frozen |= {
        name: torch.ones(p.shape, dtype=torch.bool)
        for name, p in norms.named_parameters()
        if name.endswith("weight")
    }
    model = Message(params, dict(norms.named_buffers()), mask, frozen)
    size = HEADER + 4 * 480 + (76_960 - 4 * 4800) + 4 * 10
    assert len(pack(model)) == message_size(model) == size
