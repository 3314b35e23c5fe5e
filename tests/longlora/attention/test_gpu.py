"""The CUDA backends with their real kernels against the oracle, where there is a GPU."""

import pytest
import torch

from longlora.attention import Shape, available_backends, choose_backend, s2_attention
from longlora.attention.reference import reference_attention
from longlora.segments import plan_segments

pytestmark = pytest.mark.gpu

DOCUMENTS = [1, 64, 300, 65, 129, 513]
ONE_DOCUMENT = [640]  # for cuDNN, which takes no packed rows
GROUP_SIZE = 128
HEAD_DIM = 64


@pytest.fixture(params=["flash", "cudnn", "varlen", "sdpa"])
def backend(request: pytest.FixtureRequest) -> str:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    refusal = available_backends("cuda", torch.bfloat16, HEAD_DIM)[request.param]
    if refusal is not None:
        pytest.skip(f"{request.param}: {refusal}")
    return request.param


def documents_for(backend: str) -> list[int]:
    return ONE_DOCUMENT if backend == "cudnn" else DOCUMENTS


def with_gradients(attend, q, k, v, grad_out) -> list[torch.Tensor]:
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]


@pytest.mark.parametrize("group_size", [GROUP_SIZE, None])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 2), (6, 3), (4, 1), (28, 4), (9, 3), (71, 1)])
def test_equals_reference_in_bf16(backend: str, heads: int, kv_heads: int, group_size: int | None) -> None:
    """The root-mean-square error is at most twice that of the definition itself computed in bf16."""
    documents = documents_for(backend)
    generator = torch.Generator("cuda").manual_seed(heads)
    shapes = [(sum(documents), n, HEAD_DIM) for n in (heads, kv_heads, kv_heads, heads)]
    row = [torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16) for shape in shapes]
    group_size = group_size and 2 * group_size if backend == "cudnn" else group_size
    plan = plan_segments(documents, group_size).to("cuda")

    def defined(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return reference_attention(q, k, v, documents, group_size)

    exact = with_gradients(defined, *(t.double() for t in row))
    lowered = with_gradients(defined, *row)
    ours = with_gradients(lambda q, k, v: s2_attention(q, k, v, plan, backend=backend), *row)
    for name, x, own, wanted in zip(("out", "dq", "dk", "dv"), ours, lowered, exact, strict=True):
        assert (x.double() - wanted).norm() <= 2 * (own.double() - wanted).norm(), name


def test_fp32_falls_back_to_sdpa() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    shape = Shape(torch.device("cuda"), torch.float32, 8, 8, HEAD_DIM)
    assert choose_backend(shape, plan_segments(DOCUMENTS, GROUP_SIZE)).name == "sdpa"


def test_writes_every_element_it_allocates(backend: str) -> None:
    if backend == "cudnn":
        pytest.skip("cudnn is not deterministic, and memory is filled with NaN in deterministic mode alone")
    q, k, v = (torch.randn(sum(DOCUMENTS), n, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for n in (6, 3, 3))
    plan = plan_segments(DOCUMENTS, GROUP_SIZE).to("cuda")
    torch.use_deterministic_algorithms(True, warn_only=True)  # also fills torch.empty with NaN
    try:
        assert torch.empty(3, device="cuda").isnan().all()
        results = with_gradients(lambda *t: s2_attention(*t, plan, backend=backend), q, k, v, torch.ones_like(q))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(result.isfinite().all() for result in results)


def test_the_choice_is_checked_and_timed() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    shape = Shape(torch.device("cuda"), torch.bfloat16, 8, 2, HEAD_DIM)
    alone, packed = plan_segments([8192], 2048), plan_segments([4000, 4192], 2048)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        choices = [choose_backend(shape, plan) for plan in (alone, packed)]
    for choice in choices:
        assert choice.name != "sdpa"
        assert not any("differs from the definition" in reason for reason in choice.refused.values())
    assert {"cudnn", "varlen"} <= choices[0].timed.keys()
    assert choices[1].refused["cudnn"] == "is for rows of one document"
