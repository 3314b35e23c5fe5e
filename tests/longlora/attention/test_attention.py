"""s2_attention from outside: what may influence what, which backend runs, what is refused."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from longlora.attention import Shape, available_backends, choose_backend, s2_attention
from longlora.segments import plan_segments

DOCUMENTS = [5, 9, 3, 13]
TOKENS = sum(DOCUMENTS)


def row(tokens: int = TOKENS, heads: int = 6, kv_heads: int = 3, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, n, 8, generator=generator) for n in (heads, kv_heads, kv_heads)]


@pytest.mark.parametrize("token", range(TOKENS))
def test_a_token_influences_only_its_own_document_from_itself_on(token: int) -> None:
    plan = plan_segments(DOCUMENTS, 4)
    before = row()
    after = [t.clone() for t in before]
    for t, other in zip(after, row(seed=1), strict=True):
        t[token] = other[token]
    changed = (s2_attention(*before, plan) != s2_attention(*after, plan)).flatten(1).any(dim=1).nonzero().flatten()
    ends = [sum(DOCUMENTS[: i + 1]) for i in range(len(DOCUMENTS))]
    end = next(end for end in ends if token < end)
    assert changed.min() == token and changed.max() < end


def test_a_document_does_not_depend_on_what_it_is_packed_with() -> None:
    packed = row()
    out = s2_attention(*packed, plan_segments(DOCUMENTS, 4)).split(DOCUMENTS)
    alone = zip(*(t.split(DOCUMENTS) for t in packed), strict=True)
    for length, whole, (q, k, v) in zip(DOCUMENTS, out, alone, strict=True):
        torch.testing.assert_close(whole, s2_attention(q, k, v, plan_segments([length], 4)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("group_size", [None, 30, 32])
def test_equals_dense_attention_within_one_group(group_size: int | None) -> None:
    q, k, v = row()
    out = s2_attention(q, k, v, plan_segments([TOKENS], group_size))
    dense = scaled_dot_product_attention(
        *(t.transpose(0, 1).unsqueeze(0) for t in (q, k, v)), is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(out, dense[0].transpose(0, 1))


def test_accepts_vectors_that_are_not_contiguous_and_lowers_under_autocast() -> None:
    q, k, v = row()
    plan = plan_segments(DOCUMENTS, 4)
    wanted = s2_attention(q, k, v, plan)
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    torch.testing.assert_close(s2_attention(*turned, plan), wanted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lowered = s2_attention(q, k.bfloat16(), v, plan)
    assert lowered.dtype == torch.bfloat16
    torch.testing.assert_close(lowered.float(), wanted, rtol=0.02, atol=0.02)


CPU = Shape(torch.device("cpu"), torch.float32, 4, 2, 64)


def test_the_choice_of_a_backend_says_why_others_were_refused() -> None:
    choice = choose_backend(CPU, plan_segments(DOCUMENTS, 4))
    assert choice.name == "sdpa"
    assert choice.refused["varlen"] == "needs a CUDA device, not cpu"
    assert str(choice) == "sdpa (cudnn, flash, varlen: needs a CUDA device, not cpu)"
    assert available_backends("cpu", torch.float32, 64)["sdpa"] is None
    assert available_backends("cuda", torch.float32, 64)["varlen"] == "needs bfloat16 or float16, not float32"
    assert "multiple of 8 and at most 256, not 20" in str(available_backends("cuda", torch.bfloat16, 20)["varlen"])


def test_a_backend_asked_for_by_name_runs_or_says_why_not() -> None:
    assert choose_backend(CPU, plan_segments(DOCUMENTS, 4), "sdpa").refused == {}
    with pytest.raises(ValueError, match=r"^attention backend 'varlen' cannot run here: needs a CUDA device, not cpu$"):
        s2_attention(*row(), plan_segments(DOCUMENTS, 4), backend="varlen")
    with pytest.raises(ValueError, match=r"^attention backend is 'fast': it must be auto, cudnn, flash, varlen, sdpa$"):
        s2_attention(*row(), plan_segments(DOCUMENTS, 4), backend="fast")


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        (row(heads=5), "with Hkv dividing H"),
        ([*row()[:2], row(kv_heads=6)[1]], "with Hkv dividing H"),
        ([t.unsqueeze(0) for t in row()], "must be .T, H, d."),
        (row(tokens=TOKENS - 1), "q has 29 tokens and the plan 30"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(tensors: list[torch.Tensor], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        s2_attention(*tensors, plan_segments(DOCUMENTS, 4))


def test_a_plan_on_another_device_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the plan is on meta and q on cpu: call plan\.to"):
        s2_attention(*row(), plan_segments(DOCUMENTS, 4).to("meta"))
