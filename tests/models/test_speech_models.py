"""The speech ResNet-18: published counts, what reaches which weights, and purity under vmap."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn.functional import cross_entropy

from fedsparse.core.errors import ConfigError
from fedsparse.core.ledger.flops import forward_macs
from fedsparse.core.models import MODELS

WAVES, SPECTRA = (1, 1, 8000), (1, 40, 101)


def build(shape: tuple[int, int, int], classes: int = 35, **settings: object) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = MODELS["resnet18-speech"](**settings).build(shape, classes)
    return model


@pytest.mark.parametrize("shape", [WAVES, (1, 1, 16_000), SPECTRA])
def test_published_counts(shape: tuple[int, int, int]) -> None:
    """SparsyFed document 7.2 and 3: 11,188,195 parameters, 11,178,560 prunable, 3,136 in the stem."""
    model = build(shape)
    layers = {name: p.numel() for name, p in model.named_parameters() if p.ndim > 1}
    assert sum(p.numel() for p in model.parameters()) == 11_188_195
    assert sum(layers.values()) == 11_178_560
    assert len(layers) == 21
    assert layers["stem.weight"] == 3_136
    assert layers["fc.weight"] == 512 * 35
    assert sum(b.numel() for b in model.buffers()) == 9_620


def test_all_but_the_stem_is_resnet18() -> None:
    speech, image = build(WAVES), MODELS["resnet18"]().build((1, 32, 32), 35)
    shapes = [{n: tuple(p.shape) for n, p in m.named_parameters()} for m in (speech, image)]
    assert shapes[0].pop("stem.weight") == (64, 1, 7, 7)
    assert shapes[1].pop("stem.weight") == (64, 1, 3, 3)
    assert list(shapes[0].items()) == list(shapes[1].items())


@pytest.mark.parametrize(
    ("shape", "stem", "pooled", "last"),
    [
        (WAVES, (1, 4000), (1, 2000), (1, 250)),
        (SPECTRA, (20, 51), (10, 26), (2, 4)),
    ],
)
def test_time_is_halved_five_times(
    shape: tuple[int, int, int], stem: tuple[int, int], pooled: tuple[int, int], last: tuple[int, int]
) -> None:
    model = build(shape).eval()
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_children():
        module.register_forward_hook(
            lambda _m, _i, out, name=name: shapes.update({name: tuple(out.shape[2:])})
        )
    assert model(torch.randn(1, *shape)).shape == (1, 35)
    assert (shapes["stem_norm"], shapes["stage1_block1_norm1"], shapes["stage4_block2_norm2"]) == (
        stem,
        pooled,
        last,
    )


def test_stem_is_convolution_norm_relu_pool() -> None:
    model = build((1, 1, 64)).eval()
    seen: list[Tensor] = []
    model.get_submodule("stage1_block1_conv1").register_forward_pre_hook(
        lambda _m, given: seen.append(given[0])
    )
    x = torch.randn(2, 1, 1, 64)
    model(x)
    y = nn.functional.conv2d(x, model.get_parameter("stem.weight"), stride=2, padding=3)
    y = nn.functional.max_pool2d(model.get_submodule("stem_norm")(y).relu(), 3, stride=2, padding=1)
    torch.testing.assert_close(seen[0], y)


def test_of_a_waveform_only_the_middle_row_of_kernels_gets_a_gradient() -> None:
    """SparsyFed document 7.2: 2/3 of every 3x3 kernel and 6/7 of the stem receive none."""
    model = build((1, 1, 128))
    cross_entropy(model(torch.randn(2, 1, 1, 128)), torch.tensor([3, 5])).backward()
    for name, p in model.named_parameters():
        if p.ndim == 4 and p.shape[2] > 1:
            assert p.grad is not None
            rows = p.grad.abs().sum(dim=(0, 1, 3)) > 0
            assert rows.nonzero().flatten().tolist() == [p.shape[2] // 2], name


def test_macs_of_the_stem_are_counted() -> None:
    macs = forward_macs(build(WAVES), WAVES, [])
    assert macs["stem.weight"] == 3_136 * 4000
    assert macs["fc.weight"] == 512 * 35


@pytest.mark.parametrize(
    ("shape", "norm"), [((1, 1, 64), "batch"), ((1, 1, 64), "group"), ((1, 8, 40), "batch")]
)
def test_pure_and_equal_under_vmap(shape: tuple[int, int, int], norm: str) -> None:
    model = build(shape, 5, norm=norm).double().requires_grad_(False)  # rounding would hide behind the norms
    params = {n: torch.stack([p, p + 0.01 * torch.randn_like(p)]) for n, p in model.named_parameters()}
    buffers = {n: torch.stack([b, b.clone()]) for n, b in model.named_buffers()}
    before = {n: b.clone() for n, b in model.named_buffers()}
    inputs, targets = torch.randn(2, 3, *shape, dtype=torch.float64), torch.randint(0, 5, (2, 3))

    def step(p: dict[str, Tensor], b: dict[str, Tensor], x: Tensor, y: Tensor) -> tuple[object, object]:
        def loss(p: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            own = {n: t.clone() for n, t in b.items()}
            return cross_entropy(functional_call(model, {**p, **own}, (x,)), y), own

        return grad_and_value(loss, has_aux=True)(p)

    stacked = vmap(step)(params, buffers, inputs, targets)
    for k in range(2):
        alone = step(
            {n: t[k] for n, t in params.items()}, {n: t[k] for n, t in buffers.items()}, inputs[k], targets[k]
        )
        of_client = torch.utils._pytree.tree_map(lambda t, k=k: t[k], stacked)
        # float64 sums in another order, through 18 layers of normalisation
        torch.testing.assert_close(of_client, alone, rtol=1e-6, atol=1e-9)
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())


def test_a_batch_of_one_clip_trains_at_the_smallest_width() -> None:
    model = build((1, 1, 33), 2)
    assert model(torch.randn(1, 1, 1, 33)).shape == (1, 2)
    with pytest.raises(
        ConfigError, match="33 or more wide, the data set's are 32x32; use resnet18"
    ) as caught:
        build((3, 32, 32))
    assert [problem.path for problem in caught.value.problems] == ["task.model"]


def test_group_normalisation_has_no_buffers() -> None:
    assert not list(build(SPECTRA, norm="group", groups=4).buffers())
