"""Every backend against the oracle: outputs and all gradients, fp32 and bf16, on rows of random documents.

varlen, cudnn and flash run here on emulated kernels: that checks all but the kernels; test_gpu.py has those.
"""

import random
from functools import cache

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from longlora.attention import cudnn, flash, sdpa, varlen
from longlora.attention._function import Backend, SegmentedAttention
from longlora.attention.reference import reference_attention, reference_mask
from longlora.segments import plan_segments

HEADS = [(8, 8), (8, 2), (6, 3), (4, 1), (28, 4), (9, 3), (71, 1), (1, 1)]
HEAD_DIM = 8
GROUP_SIZE = 8


@pytest.fixture(params=["sdpa", "sdpa elsewhere", "varlen", "cudnn", "flash"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    if request.param == "sdpa elsewhere":
        monkeypatch.setattr(sdpa, "_is_fused", lambda q: False)
        return sdpa
    if request.param in ("varlen", "cudnn", "flash"):
        request.getfixturevalue(f"emulated_{request.param}")
    return {"sdpa": sdpa, "varlen": varlen, "cudnn": cudnn, "flash": flash}[request.param]


def random_documents(seed: int) -> list[int]:
    """Every length from 1 to 3G + 1 once, in random order."""
    lengths = list(range(1, 3 * GROUP_SIZE + 2))
    random.Random(seed).shuffle(lengths)
    return lengths


def random_row(tokens: int, heads: int, kv_heads: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(heads)
    shapes = [(tokens, n, HEAD_DIM) for n in (heads, kv_heads, kv_heads, heads)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def with_gradients(attend, q, k, v, grad_out) -> list[torch.Tensor]:
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]


def masked_sdpa(q, k, v, documents: list[int]) -> torch.Tensor:
    """torch's own attention at the precision of q, given the oracle's mask."""
    heads = q.shape[1]
    halves = [reference_mask(documents, GROUP_SIZE, shifted) for shifted in (False, True)]
    mask = torch.stack([halves[head >= heads // 2] for head in range(heads)])
    row = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))
    return scaled_dot_product_attention(*row, attn_mask=mask.unsqueeze(0), enable_gqa=True)[0].transpose(0, 1)


@cache
def judged(heads: int, kv_heads: int, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor], list[float]]:
    """A row, what it should give (out, dq, dk, dv in double precision), and how far torch's own attention is off."""
    documents = random_documents(seed=heads)
    row = random_row(sum(documents), heads, kv_heads, dtype)
    exact = with_gradients(
        lambda q, k, v: reference_attention(q, k, v, documents, GROUP_SIZE), *(t.double() for t in row)
    )
    torchs = with_gradients(lambda q, k, v: masked_sdpa(q, k, v, documents), *row)
    return row, exact, [distance(x, wanted) for x, wanted in zip(torchs, exact, strict=True)]


def distance(x: torch.Tensor, exact: torch.Tensor) -> float:
    return (x.double() - exact).norm().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_equals_reference(backend: Backend, heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    """The root-mean-square error of output and gradients is at most twice that of torch's own masked attention."""
    plan = plan_segments(random_documents(seed=heads), GROUP_SIZE)
    row, exact, torchs_distances = judged(heads, kv_heads, dtype)
    ours = with_gradients(lambda q, k, v: SegmentedAttention.apply(q, k, v, plan, HEAD_DIM**-0.5, backend, None), *row)
    for name, x, wanted, torchs in zip(("out", "dq", "dk", "dv"), ours, exact, torchs_distances, strict=True):
        assert x.dtype == dtype
        assert distance(x, wanted) <= 2 * torchs, name


@pytest.mark.parametrize("length", range(1, 3 * GROUP_SIZE + 2))
def test_each_length_alone_equals_reference_in_double_precision(length: int) -> None:
    row = random_row(length, 6, 3, torch.float64)
    plan = plan_segments([length], GROUP_SIZE)
    ours = with_gradients(lambda q, k, v: SegmentedAttention.apply(q, k, v, plan, 0.5, sdpa, None), *row)
    exact = with_gradients(lambda q, k, v: reference_attention(q, k, v, [length], GROUP_SIZE, scale=0.5), *row)
    torch.testing.assert_close(
        ours, exact, rtol=1e-6, atol=1e-6
    )  # the operator's exponential is good to single precision


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("document_lengths", [[4, 8, 2], [30, 5]])
def test_writes_every_element_it_allocates(
    backend: Backend, heads: int, kv_heads: int, document_lengths: list[int]
) -> None:
    """With memory that is NaN until written, no NaN comes out."""
    row = random_row(sum(document_lengths), heads, kv_heads, torch.float32)
    plan = plan_segments(document_lengths, GROUP_SIZE)
    torch.use_deterministic_algorithms(True)  # also fills torch.empty with NaN
    try:
        assert torch.empty(3).isnan().all()
        results = with_gradients(lambda q, k, v: SegmentedAttention.apply(q, k, v, plan, 1.0, backend, None), *row)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(result.isfinite().all() for result in results)


def test_reads_strided_heads_as_a_fused_projection_leaves_them(backend: Backend) -> None:
    """GPT-NeoX hands over q, k, v as interleaved views of one tensor, and a sum's gradient is one number expanded."""
    fused = torch.randn(21, 4, 3 * HEAD_DIM, generator=torch.Generator().manual_seed(0), requires_grad=True)
    plan = plan_segments([21], GROUP_SIZE)
    out = SegmentedAttention.apply(*fused.chunk(3, dim=-1), plan, 1.0, backend, None)
    wanted = reference_attention(*fused.chunk(3, dim=-1), [21], GROUP_SIZE, scale=1.0)
    torch.testing.assert_close(out, wanted)
    gradients = [torch.autograd.grad(x.sum(), fused)[0] for x in (out, wanted)]
    torch.testing.assert_close(*gradients)
