"""Every contract of fedsparse, held against this method; and what it does."""

import pytest
import torch
from fedsparse import Budget, Layer, Sums
from fedsparse.testing import Contract, checks

from fedsparse_rlr import RobustMean


@pytest.mark.parametrize("check", checks("rlr"), ids=str)
def test_contract(check: Contract) -> None:
    check()


def test_a_step_without_agreement_is_reversed() -> None:
    mask, budget = {"w": torch.ones(1, 2, dtype=torch.bool)}, Budget((Layer("w", (1, 2)),), "uniform", 0.0)
    held = {"w": torch.tensor([[1.0, 1.0]])}
    part, weight = RobustMean(threshold=1.0), torch.tensor(1.0)
    sums: Sums = {}
    for update in ([2.0, 4.0], [2.0, 0.0]):
        given = part.contribute({"w": torch.tensor([update])}, mask, held, weight, False)
        sums = {name: value + sums.get(name, 0) for name, value in given.items()}
    made = part.aggregate(sums, held, mask, {}, budget, {})
    assert made.params["w"].tolist() == [[2.0, 0.0]]  # the mean is (2, 2); on the second they disagree
