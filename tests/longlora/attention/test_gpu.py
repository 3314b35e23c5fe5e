"""The CUDA backends with their real kernels against the oracle, where there is a GPU."""

import pytest
import torch

from longlora.attention import available_backends, choose_backend, s2_attention
from longlora.attention.reference import reference_attention
from longlora.segments import plan_segments

pytestmark = pytest.mark.gpu

DOCUMENTS = [1, 64, 300, 65, 129, 513]
GROUP_SIZE = 128
HEAD_DIM = 64


@pytest.fixture(params=["flash", "varlen", "sdpa"])
def backend(request: pytest.FixtureRequest) -> str:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    refusal = available_backends("cuda", torch.bfloat16, HEAD_DIM)[request.param]
    if refusal is not None:
        pytest.skip(f"{request.param}: {refusal}")
    return request.param


def with_gradients(attend, q, k, v, grad_out) -> list[torch.Tensor]:
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]


@pytest.mark.parametrize("group_size", [GROUP_SIZE, None])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 2), (6, 3), (4, 1), (28, 4), (9, 3), (71, 1)])
def test_equals_reference_in_bf16(backend: str, heads: int, kv_heads: int, group_size: int | None) -> None:
    """The root-mean-square error is at most twice that of the definition itself computed in bf16."""
    generator = torch.Generator("cuda").manual_seed(heads)
    shapes = [(sum(DOCUMENTS), n, HEAD_DIM) for n in (heads, kv_heads, kv_heads, heads)]
    row = [torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16) for shape in shapes]
    plan = plan_segments(DOCUMENTS, group_size).to("cuda")

    def defined(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return reference_attention(q, k, v, DOCUMENTS, group_size)

    exact = with_gradients(defined, *(t.double() for t in row))
    lowered = with_gradients(defined, *row)
    ours = with_gradients(lambda q, k, v: s2_attention(q, k, v, plan, backend=backend), *row)
    for name, x, own, wanted in zip(("out", "dq", "dk", "dv"), ours, lowered, exact, strict=True):
        assert (x.double() - wanted).norm() <= 2 * (own.double() - wanted).norm(), name


def test_fp32_falls_back_to_sdpa() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    assert choose_backend("cuda", torch.float32, HEAD_DIM).name == "sdpa"


def test_writes_every_element_it_allocates(backend: str) -> None:
    q, k, v = (torch.randn(sum(DOCUMENTS), n, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for n in (6, 3, 3))
    plan = plan_segments(DOCUMENTS, GROUP_SIZE).to("cuda")
    torch.use_deterministic_algorithms(True, warn_only=True)  # also fills torch.empty with NaN
    try:
        assert torch.empty(3, device="cuda").isnan().all()
        results = with_gradients(lambda *t: s2_attention(*t, plan, backend=backend), q, k, v, torch.ones_like(q))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(result.isfinite().all() for result in results)
