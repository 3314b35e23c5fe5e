"""Sums of many micro-batches' gradients are as good as one in fp32, rounded once."""

import pytest
import torch
from torch import nn

from pipeline.gradient_sums import GradientSums


@pytest.mark.parametrize("micro_batches", [2, 64])
def test_the_sum_is_that_of_fp32_rounded_once(micro_batches: int) -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(32, 32, dtype=torch.bfloat16))
    rows = torch.randn(micro_batches, 32, 32, dtype=torch.bfloat16)
    sums = GradientSums([weight], micro_batches)
    for row in rows:
        (weight * row).sum().backward()
        sums.add()
    assert weight.grad is not None
    assert torch.equal(weight.grad, rows.float().sum(0).bfloat16())


@pytest.mark.parametrize(("micro_batches", "least", "most"), [(8, 0.003, 0.005), (64, 0.007, 0.012)])
def test_what_autograd_would_lose(micro_batches: int, least: float, most: float) -> None:
    """The error that the sums are for, over the norm of the gradient: 0.4 % of 8 micro-batches, 1 % of 64."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(256, 256, dtype=torch.bfloat16))
    rows = torch.randn(micro_batches, 256, 256, dtype=torch.bfloat16)
    for row in rows:
        (weight * row).sum().backward()
    assert weight.grad is not None
    exact = rows.float().sum(0)
    assert least < float((weight.grad.float() - exact).norm() / exact.norm()) < most


def test_a_parameter_that_the_last_micro_batch_does_not_touch_keeps_its_sum() -> None:
    one, other = (nn.Parameter(torch.zeros(2, dtype=torch.bfloat16)) for _ in range(2))
    sums = GradientSums([one, other], 2)
    (one.sum() + 3 * other.sum()).backward()
    sums.add()
    one.sum().backward()
    sums.add()
    assert one.grad is not None and other.grad is not None
    assert (one.grad.tolist(), other.grad.tolist()) == ([2, 2], [3, 3])


@pytest.mark.parametrize(("dtype", "micro_batches"), [(torch.float32, 3), (torch.bfloat16, 1)])
def test_what_needs_no_sum_is_left_alone(dtype: torch.dtype, micro_batches: int) -> None:
    weight = nn.Parameter(torch.zeros(2, dtype=dtype))
    sums = GradientSums([weight], micro_batches)
    weight.sum().backward()
    held = weight.grad
    sums.add()
    assert weight.grad is held
