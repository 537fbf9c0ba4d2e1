"""Models: the published parameter counts to the unit, and that each works as a pure function under vmap."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn.functional import cross_entropy

from fedsparse.core.errors import ConfigError
from fedsparse.core.models import MODELS, CustomModel

torch.set_num_threads(1)

MNIST, CIFAR, DIGITS = (1, 28, 28), (3, 32, 32), (1, 8, 8)


def build(name: str, shape: tuple[int, int, int], classes: int = 10, **settings: object) -> nn.Module:
    architecture = MODELS[name](**settings)
    torch.manual_seed(0)
    model: nn.Module = architecture.build(shape, classes)
    return model


def weights(model: nn.Module) -> dict[str, int]:
    """Prunable weights of each layer."""
    return {name: p.numel() for name, p in model.named_parameters() if p.ndim > 1}


@pytest.mark.parametrize(
    ("name", "shape", "classes", "layers", "total"),
    [
        ("lenet", MNIST, 10, [250, 5000, 256000, 500], 261_840),
        ("lenet", CIFAR, 10, [450, 2400, 768000, 10080, 840], 782_006),
        ("lenet", CIFAR, 100, [450, 2400, 768000, 12000], 783_092),
        ("conv2", MNIST, 62, [800, 51200, 6422528, 126976], 6_603_710),
    ],
)
def test_published_small_networks(
    name: str, shape: tuple[int, int, int], classes: int, layers: list[int], total: int
) -> None:
    model = build(name, shape, classes)
    assert list(weights(model).values()) == layers
    assert sum(p.numel() for p in model.parameters()) == total
    assert not list(model.buffers())


def test_lenet_names_and_shapes() -> None:
    shapes = {name: tuple(p.shape) for name, p in build("lenet", CIFAR).named_parameters() if p.ndim > 1}
    assert shapes == {
        "conv1.weight": (6, 3, 5, 5),
        "conv2.weight": (16, 6, 5, 5),
        "fc1.weight": (120, 6400),
        "fc2.weight": (84, 120),
        "fc3.weight": (10, 84),
    }


def test_lenet_computes_convolution_pooling_relu() -> None:
    model = build("lenet", MNIST)
    p = dict(model.named_parameters())
    x = torch.randn(3, *MNIST)
    y = x
    for conv in ("conv1", "conv2"):
        y = nn.functional.conv2d(y, p[f"{conv}.weight"], p[f"{conv}.bias"])
        y = nn.functional.max_pool2d(y, 3, 1).relu()
    y = nn.functional.linear(y.flatten(1), p["fc1.weight"], p["fc1.bias"]).relu()
    y = nn.functional.linear(y, p["fc2.weight"], p["fc2.bias"])
    torch.testing.assert_close(model(x), y)
    doubled = build("lenet", MNIST, double_softmax=True)
    torch.testing.assert_close(doubled(x), y.softmax(1))


@pytest.mark.parametrize(
    ("classes", "prunable", "total"), [(10, 11_164_352, 11_173_962), (100, 11_210_432, 11_220_132)]
)
def test_published_resnet18(classes: int, prunable: int, total: int) -> None:
    model = build("resnet18", CIFAR, classes)
    layers = weights(model)
    assert len(layers) == 21
    assert sum(layers.values()) == prunable
    assert sum(p.numel() for p in model.parameters()) == total
    assert sum(b.numel() for b in model.buffers()) == 9_620
    assert layers["stem.weight"] == 1_728
    assert layers["fc.weight"] == 512 * classes
    assert [n for n in layers.values() if n == 36_864] == [36_864] * 4
    for stage, first, other, shortcut in (
        (2, 73_728, 147_456, 8_192),
        (3, 294_912, 589_824, 32_768),
        (4, 1_179_648, 2_359_296, 131_072),
    ):
        own = {name: n for name, n in layers.items() if name.startswith(f"stage{stage}_")}
        assert list(own.values()) == [first, other, shortcut, other, other]
        assert own[f"stage{stage}_block1_shortcut.weight"] == shortcut


def test_resnet18_halves_the_image_three_times() -> None:
    model = build("resnet18", CIFAR)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_children():
        module.register_forward_hook(lambda _m, _i, out, name=name: shapes.update({name: tuple(out.shape)}))
    model(torch.randn(2, *CIFAR))
    assert shapes["stem_norm"] == (2, 64, 32, 32)
    assert shapes["stage1_block2_norm2"] == (2, 64, 32, 32)
    assert shapes["stage2_block2_norm2"] == (2, 128, 16, 16)
    assert shapes["stage3_block2_norm2"] == (2, 256, 8, 8)
    assert shapes["stage4_block1_shortcut_norm"] == shapes["stage4_block2_norm2"] == (2, 512, 4, 4)


def test_resnet18_adds_the_block_to_its_shortcut() -> None:
    model = build("resnet18", (1, 8, 8)).eval()
    with torch.no_grad():  # blocks without a convolution pass their input on: only stem and shortcuts act
        for name, p in model.named_parameters():
            if "_conv2" in name:
                p.zero_()
    layer = dict(model.named_children())
    x = torch.randn(2, 1, 8, 8)
    y = layer["stem_norm"](layer["stem"](x)).relu()
    for stage in (2, 3, 4):
        y = layer[f"stage{stage}_block1_shortcut_norm"](layer[f"stage{stage}_block1_shortcut"](y)).relu()
    torch.testing.assert_close(model(x), layer["fc"](y.mean((2, 3))))


def test_group_normalisation_has_the_same_parameters_and_no_buffers() -> None:
    group = build("resnet18", CIFAR, norm="group", groups=4)
    batch = build("resnet18", CIFAR)
    assert [(n, p.shape) for n, p in group.named_parameters()] == [
        (n, p.shape) for n, p in batch.named_parameters()
    ]
    assert not list(group.buffers())
    assert group.get_submodule("stem_norm").num_groups == 4


CASES = [
    ("lenet", MNIST, {}),
    ("lenet", CIFAR, {}),
    ("lenet", CIFAR, {"double_softmax": True}),
    ("resnet18", (3, 16, 16), {}),
    ("resnet18", (3, 16, 16), {"norm": "group"}),
    ("mlp", DIGITS, {}),
    ("mlp", DIGITS, {"hidden": ()}),
    ("cnn", DIGITS, {}),
    ("cnn", CIFAR, {"widths": (8, 8, 8), "hidden": 16}),
]


@pytest.mark.parametrize(("name", "shape", "settings"), CASES)
def test_models_are_pure_functions_and_agree_under_vmap(
    name: str, shape: tuple[int, int, int], settings: dict[str, object]
) -> None:
    model = build(name, shape, **settings).double()  # rounding would hide behind batch normalisation
    model.requires_grad_(False)
    clients, batch = 2, 4
    params = {n: torch.stack([p, p + 0.01 * torch.randn_like(p)]) for n, p in model.named_parameters()}
    buffers = {n: torch.stack([b, b.clone()]) for n, b in model.named_buffers()}
    before = {n: b.clone() for n, b in model.named_buffers()}
    inputs = torch.randn(clients, batch, *shape, dtype=torch.float64)
    targets = torch.randint(0, 10, (clients, batch))

    def step(p: dict[str, Tensor], b: dict[str, Tensor], x: Tensor, y: Tensor) -> tuple[object, object]:
        def loss(p: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            own = {n: t.clone() for n, t in b.items()}
            out = functional_call(model, {**p, **own}, (x,))
            assert out.shape == (batch, 10)
            return cross_entropy(out, y), own

        return grad_and_value(loss, has_aux=True)(p)

    stacked = vmap(step)(params, buffers, inputs, targets)
    for k in range(clients):
        one = {n: t[k] for n, t in params.items()}, {n: t[k] for n, t in buffers.items()}
        alone = step(*one, inputs[k], targets[k])
        of_client = torch.utils._pytree.tree_map(lambda t, k=k: t[k], stacked)
        torch.testing.assert_close(of_client, alone, rtol=1e-6, atol=1e-9)
        gradients, (_, after) = alone
        assert all(bool((g != 0).any()) for n, g in gradients.items() if n.startswith("fc"))
        for n in after:
            assert not torch.equal(after[n], one[1][n])  # statistics moved, for this client
    for n, b in model.named_buffers():
        assert torch.equal(b, before[n])  # and not in the template


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (4, 9, 17)])
def test_resnet18_takes_other_sizes(norm: str, shape: tuple[int, int, int]) -> None:
    assert build("resnet18", shape, 7, norm=norm)(torch.randn(2, *shape)).shape == (2, 7)


def test_simple_models_take_other_sizes() -> None:
    for shape in (DIGITS, MNIST, CIFAR, (2, 5, 9)):
        for name in ("cnn", "mlp"):
            assert build(name, shape, 3)(torch.randn(2, *shape)).shape == (2, 3)
    assert list(weights(build("cnn", DIGITS))) == ["conv1.weight", "conv2.weight", "fc1.weight", "fc2.weight"]
    assert weights(build("cnn", DIGITS))["fc1.weight"] == 64 * 2 * 2 * 128


@pytest.mark.parametrize(
    ("name", "shape", "hint"),
    [
        ("lenet", DIGITS, "use cnn or mlp"),
        ("lenet", (3, 28, 28), "use cnn or mlp"),
        ("conv2", CIFAR, "use cnn or mlp"),
        ("resnet18", (3, 7, 32), "use cnn or mlp"),
        ("cnn", (1, 3, 8), "use fewer convolutions"),
    ],
)
def test_inputs_that_do_not_fit_are_one_readable_error(
    name: str, shape: tuple[int, int, int], hint: str
) -> None:
    with pytest.raises(ConfigError, match=hint) as caught:
        build(name, shape)
    assert [problem.path for problem in caught.value.problems] == ["task.model"]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("mlp", {"hidden": (0,)}),
        ("cnn", {"widths": ()}),
        ("resnet18", {"groups": 3}),
        ("resnet18", {"norm": "layer"}),
        ("lenet", {"width": 3}),
    ],
)
def test_settings_out_of_range_are_refused(name: str, settings: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        MODELS[name](**settings)


def test_every_setting_is_described() -> None:
    for model in (*MODELS.values(), CustomModel):
        assert model.summary()
        assert all(field.description for field in model.model_fields.values())


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "example_nets.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Sequential):\n"
        "    def __init__(self, input_shape, classes, width=4):\n"
        "        c, h, w = input_shape\n"
        "        super().__init__(nn.Flatten(), nn.Linear(c * h * w, width), nn.Linear(width, classes))\n"
        "def linear(units):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, units))\n"
        "def broken():\n"
        "    raise OSError('no such\\nfile')\n"
        "def nothing():\n"
        "    return 3\n"
        "constant = 3\n"
    )
    (tmp_path / "example_broken.py").write_text("def")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("nets")
def test_custom_model_is_given_what_it_asks_for() -> None:
    model = CustomModel(target="example_nets:Net", width=6).build(DIGITS, 10)
    assert [tuple(p.shape) for p in model.parameters()] == [(6, 64), (6,), (10, 6), (10,)]
    assert CustomModel(target="example_nets:Net", classes=3).build(DIGITS, 10)[2].out_features == 3
    assert CustomModel(target="example_nets:linear", units=10).build(DIGITS, 10)[1].out_features == 10
    assert CustomModel(target="torch.nn:Flatten").build(DIGITS, 10)(torch.zeros(2, 3, 4)).shape == (2, 12)


@pytest.mark.usefixtures("nets")
@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("no_such_module:Net", "cannot import 'no_such_module': ModuleNotFoundError"),
        ("example_broken:Net", "cannot import 'example_broken': SyntaxError"),
        ("example_nets:Nut", "module 'example_nets' has no 'Nut'"),
        ("example_nets:constant", "example_nets:constant is not callable"),
        ("example_nets:linear", r"example_nets:linear\(\) failed: TypeError: .*units"),
        ("example_nets:broken", r"example_nets:broken\(\) failed: OSError: no such file"),
        ("example_nets:nothing", "example_nets:nothing returned int, not a torch.nn.Module"),
    ],
)
def test_custom_model_errors_are_one_line_at_the_setting(target: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^task.model: {message}") as caught:
        CustomModel(target=target).build(DIGITS, 10)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("target", ["nets", ":Net", "nets:", "nets:a b", "./nets.py:Net"])
def test_custom_model_wants_module_and_callable(target: str) -> None:
    with pytest.raises(ValidationError):
        CustomModel(target=target)
