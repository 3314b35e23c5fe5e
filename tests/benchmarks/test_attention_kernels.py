"""The contender that tells what the kernel alone takes computes the same attention."""

import torch

from benchmarks.attention_kernels import split_attention, split_row
from longlora.attention.reference import reference_attention
from longlora.segments import plan_segments


def test_split_halves_attend_as_the_whole_does() -> None:
    *row, grad = (torch.randn(64, 4, 8, generator=torch.Generator().manual_seed(n)) for n in range(4))
    row = [t.requires_grad_() for t in row]
    leaves, gradients = split_row(row, grad)
    halves = split_attention(*leaves, plan=plan_segments([40, 24], 16), backend="sdpa")
    exact = reference_attention(*row, [40, 24], 16)
    torch.testing.assert_close(torch.cat(halves, dim=1), exact)
    found = torch.autograd.grad(halves, leaves, gradients)
    for number, wanted in enumerate(torch.autograd.grad(exact, row, grad)):
        torch.testing.assert_close(torch.cat([found[number], found[number + 3]], dim=1), wanted)
