"""Budgets against the tables of the FedDST and PFFDST method documents, and exactness of every rule."""

import math
from fractions import Fraction

import pytest

from fedsparse.core.budget import ALLOCATIONS, Budget, Layer, erdos_renyi, scaled, scaled_raw, uniform
from fedsparse.core.schedule import share


def layers(*shapes, biases=()):
    biases = biases or [shape[0] for shape in shapes]
    return tuple(Layer(f"l{i}", shape, b) for i, (shape, b) in enumerate(zip(shapes, biases, strict=True)))


MNIST = layers((10, 1, 5, 5), (20, 10, 5, 5), (50, 5120), (10, 50))
CIFAR10 = layers((6, 3, 5, 5), (16, 6, 5, 5), (120, 6400), (84, 120), (10, 84))
CIFAR100 = layers((6, 3, 5, 5), (16, 6, 5, 5), (120, 6400), (100, 120))
CONV2 = layers((32, 1, 5, 5), (64, 32, 5, 5), (2048, 3136), (62, 2048))


def resnet18(classes):
    shapes = [(64, 3, 3, 3)] + [(64, 64, 3, 3)] * 4
    for wide in (128, 256, 512):
        narrow = wide // 2
        shapes += [(wide, narrow, 3, 3)] + [(wide, wide, 3, 3)] * 3 + [(wide, narrow, 1, 1)]
    return layers(*shapes, (classes, 512), biases=[0] * len(shapes) + [classes])


@pytest.mark.parametrize(
    ("net", "sparsity", "counts", "total"),
    [
        (MNIST, 0.5, [138, 2478, 128021, 280], 130917),
        (MNIST, 0.8, [65, 953, 51204, 143], 52365),
        (MNIST, 0.9, [41, 445, 25599, 97], 26182),
        (CIFAR10, 0.5, [235, 1213, 383943, 5140, 469], 391000),
        (CIFAR10, 0.8, [103, 492, 153438, 2126, 240], 156399),
        (CIFAR10, 0.802, [102, 487, 151901, 2106, 239], 154835),
        (CIFAR10, 0.85, [81, 371, 115020, 1624, 202], 117298),
        (CIFAR10, 0.9, [59, 251, 76602, 1122, 164], 78198),
        (CIFAR100, 0.5, [235, 1213, 383987, 6108], 391543),
        (CIFAR100, 0.505, [233, 1201, 380146, 6049], 387629),
        (CIFAR100, 0.8, [103, 492, 153508, 2514], 156617),
        (CONV2, 0.8, [201, 10291, 1283265, 26983], 1320740),
    ],
)
def test_scaled_reproduces_the_feddst_table(net, sparsity, counts, total):
    """FedDST document 7.1, invariant 2; PFFDST document section 7 (CIFAR10Net)."""
    assert scaled(net, sparsity) == counts
    assert sum(counts) == total


def test_uniform_and_er_variants_of_the_scaled_rule():
    """FedDST document 7.1, the last two rows; the ER row leaves a layer above its size before clipping."""
    assert scaled(CIFAR10, 0.5, "uniform") == [228, 1208, 384060, 5082, 425]
    assert scaled_raw(MNIST, 0.5, "er") == [273, 2834, 127532, 280]
    clipped = scaled(MNIST, 0.5, "er")
    assert clipped[0] == 250
    # the surplus of the clipped layer goes to the others: the total over m = weights + biases is kept
    assert sum(clipped) == pytest.approx(0.5 * (261750 + 90), abs=len(MNIST))  # a floor a layer


def test_layer_sparsities_of_cifar10net():
    """FedDST document 7.1: s_l at S = 0.8."""
    expected = [0.773017, 0.796333, 0.800242, 0.790760, 0.716776]
    for layer, count, sparsity in zip(CIFAR10, scaled(CIFAR10, 0.8), expected, strict=True):
        size = layer.weights + layer.biases
        assert 0 <= (1 - sparsity) * size - count < 1 + 1e-6 * size  # a floor, of six published digits


@pytest.mark.parametrize(
    ("classes", "sparsity", "total"),
    [
        (10, 0.9, 1116426),
        (10, 0.925, 837316),
        (10, 0.95, 558206),
        (10, 0.98, 223271),
        (10, 0.99, 111635),
        (100, 0.9, 1121044),
        (100, 0.95, 560518),
        (100, 0.98, 224203),
        (100, 0.99, 112096),
    ],
)
def test_resnet18_totals(classes, sparsity, total):
    """PFFDST document section 7."""
    assert sum(scaled(resnet18(classes), sparsity)) == total


def test_resnet18_layers():
    """PFFDST document section 7: some layers at 0.9 and 0.95."""
    at_90, at_95 = scaled(resnet18(10), 0.9), scaled(resnet18(10), 0.95)
    assert (at_90[0], at_90[1], at_90[5], at_90[6], at_90[9]) == (237, 3779, 7495, 14871, 987)
    assert (at_90[11], at_90[16], at_90[-1]) == (59007, 235092, 980)
    assert (at_95[0], at_95[1], at_95[16], at_95[19], at_95[-1]) == (154, 1941, 117080, 7182, 749)
    assert scaled(resnet18(100), 0.9)[-1] == 5643
    assert scaled(resnet18(100), 0.95)[-1] == 3107


@pytest.mark.parametrize(
    ("classes", "s", "window_a", "half_a", "final", "swapped", "grown"),
    [
        (10, 0.9, 837316, 558206, 1116426, 279098, 837316),
        (10, 0.95, 418649, 279099, 558206, 139544, 418653),
        (10, 0.98, 167454, 111635, 223271, 55813, 167451),
        (10, 0.99, 83724, 55814, 111635, 27902, 83719),
        (100, 0.9, 840779, 560518, 1121044, 280250, 840772),
    ],
)
def test_paper_variant_totals(classes, s, window_a, half_a, final, swapped, grown):
    """PFFDST document section 7: K(s1-f), K(s1), K(s2), Σq, Σg."""
    net, s1, f = resnet18(classes), (1 + s) / 2, (1 - s) / 4
    assert [sum(scaled(net, x)) for x in (s1 - f, s1, s)] == [window_a, half_a, final]
    # the table truncates binary fractions as the code does; the document's fix takes the exact floor
    assert sum(int(f * layer.weights) for layer in net) == swapped
    assert sum(int(((1 - s1) + f) * layer.weights) for layer in net) == grown
    exact = (1 - Fraction(str(s))) / 4
    for layer in net:
        assert share(layer.weights, f) == math.floor(exact * layer.weights)
        assert share(layer.weights, (1 - s1) + f) == math.floor(3 * exact * layer.weights)


def test_worked_example_two_linear_layers():
    """FedDST document 10.1."""
    pair = layers((4, 6), (3, 4))
    assert scaled(pair, 0.5) == [12, 9]
    assert scaled(pair, 0.75) == [4, 6]
    single = layers((3, 4), biases=[0])
    assert scaled(single, 0.5) == [6]
    assert scaled(single, 0.75) == [3]


def test_very_high_sparsity_clips_to_one_weight_and_solves_again():
    """FedDST document 3.0: MNISTNet at 0.99 leaves conv2 at -12; the fix clips and re-solves."""
    assert scaled_raw(MNIST, 0.99) == [19, -12, 2554, 56]
    counts = scaled(MNIST, 0.99)
    assert counts[1] == 1
    assert all(1 <= count <= layer.weights for count, layer in zip(counts, MNIST, strict=True))
    assert sum(counts) == pytest.approx(0.01 * 261840, abs=len(MNIST))  # a floor a layer


def test_swap_counts_forgive_binary_fractions():
    """PFFDST document 3.3: (1-0.9)/2·768000 is 38400, not 38399."""
    assert int((1 - 0.9) / 2 * 768000) == 38399
    assert share(768000, (1 - 0.9) / 2) == 38400
    assert [share(layer.weights, (1 - 0.9) / 2) for layer in CIFAR10] == [22, 120, 38400, 504, 42]


@pytest.mark.parametrize("allocation", [a for a in ALLOCATIONS if not a.startswith("scaled")])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.8, 0.9, 0.98, 0.99])
@pytest.mark.parametrize(
    "net", [MNIST, CIFAR10, CONV2, resnet18(10)], ids=["mnist", "cifar", "conv2", "resnet"]
)
def test_totals_are_exact_to_the_unit(allocation, sparsity, net):
    budget = Budget(net, allocation, sparsity)
    assert budget.total == round((1 - sparsity) * budget.weights)


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_sparsity_zero_is_dense(allocation):
    assert Budget(CIFAR10, allocation, 0.0).total == 781770


@pytest.mark.parametrize("allocation", [a for a in ALLOCATIONS if a != "global"])
@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.999])
def test_counts_stay_within_tiny_layers(allocation, sparsity):
    tiny = layers((2, 3), (1, 2), (40, 50), (5, 1))
    counts = Budget(tiny, allocation, sparsity).counts
    assert all(1 <= counts[layer.name] <= layer.weights for layer in tiny)


def test_erk_is_proportional_to_its_factor_where_not_clipped():
    """RigL section 3: density ∝ (o+i+kh+kw)/(o·i·kh·kw), so counts are ∝ o+i+kh+kw."""
    counts = erdos_renyi(CIFAR10, 0.8, "erk")
    factors = [sum(layer.shape) for layer in CIFAR10]
    dense = [count == layer.weights for count, layer in zip(counts, CIFAR10, strict=True)]
    assert dense == [False, False, False, False, True]
    scale = counts[2] / factors[2]
    for count, factor, full in zip(counts, factors, dense, strict=True):
        assert full or abs(count - scale * factor) < 1.01  # each is rounded to a unit


def test_uniform_density_differs_by_less_than_a_weight():
    for layer, count in zip(CIFAR10, uniform(CIFAR10, 0.83), strict=True):
        assert abs(count - 0.17 * layer.weights) < 1
