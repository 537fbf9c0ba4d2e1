"""Powers of magnitudes: the way that the host takes and torch's agree."""

import pytest
import torch

from fedsparse.core.powers import power


@pytest.mark.parametrize("exponent", [0.25, 0.5, 0.1])
def test_a_power_is_torchs_to_the_last_bit_or_the_one_before(exponent):
    values = torch.cat([torch.zeros(3), torch.rand(500), 1e-20 * torch.rand(50), 1e10 * torch.rand(50)])
    before = values.clone()
    found = power(values, torch.tensor(exponent))
    exact = values.double().pow(torch.tensor(exponent).double())
    assert torch.equal(values, before)
    assert torch.equal(found[:3], torch.zeros(3))
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), exact, rtol=2 * torch.finfo(torch.float32).eps, atol=0)


def test_under_vmap_it_is_the_same_to_the_last_bit():
    values, exponent = torch.rand(4, 6), torch.tensor(0.25)
    stacked = torch.vmap(power, in_dims=(0, None))(values, exponent)
    assert torch.allclose(stacked, power(values, exponent), rtol=2 * torch.finfo(torch.float32).eps, atol=0)


def test_nan_stays_nan():
    assert power(torch.tensor([float("nan"), 1.0]), torch.tensor(0.25)).isnan().tolist() == [True, False]
