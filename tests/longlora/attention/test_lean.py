"""What S²-Attn costs, counted exactly: operations of the attention calls, and bytes written besides.

Operations are those of the attention operators' matrix products as torch counts them, without a discount for the
causal half: forward 2 products and backward 5 over all l² pairs of a segment, 2·d operations a pair and product.
"""

from math import prod
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from longlora.attention import s2_attention
from longlora.segments import plan_segments

counts_operations = pytest.mark.skipif(
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu not in flop_registry,
    reason="this torch's FlopCounterMode does not count the CPU's attention operator (2.11)",
)


def attend(tokens: int, heads: int, kv_heads: int, head_dim: int, plan: Any) -> None:
    q, k, v = (torch.randn(tokens, n, head_dim, requires_grad=True) for n in (heads, kv_heads, kv_heads))
    s2_attention(q, k, v, plan).backward(torch.randn(tokens, heads, head_dim))


def counted_pairs(heads: int, kv_heads: int, head_dim: int, plan: Any) -> float:
    """Query-key pairs per head, from the operations counted in a forward and a backward pass (without running them)."""
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        attend(plan.tokens, heads, kv_heads, head_dim, plan)
    return counter.get_total_flops() / ((2 + 5) * 2 * head_dim * heads)


@counts_operations
@pytest.mark.parametrize(
    ("tokens", "group_size", "heads", "kv_heads", "head_dim"),
    [(16384, 4096, 32, 32, 128), (32768, 8192, 32, 8, 128), (98304, 8192, 64, 8, 128), (65536, 2048, 28, 4, 128)],
)
def test_operations_of_a_document_are_those_of_the_formula(
    tokens: int, group_size: int, heads: int, kv_heads: int, head_dim: int
) -> None:
    """N·G − G²/4 pairs: straight heads N·G, shifted heads N·G − G²/2 because their first and last groups are halves."""
    pairs = counted_pairs(heads, kv_heads, head_dim, plan_segments([tokens], group_size))
    assert pairs == tokens * group_size - group_size**2 / 4


@counts_operations
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (9, 3), (71, 1)])
def test_operations_of_a_packed_row_are_summed_over_its_segments(heads: int, kv_heads: int) -> None:
    plan = plan_segments([37, 5, 64, 16, 23], 16)
    straight, shifted = (int((bounds.diff() ** 2).sum()) for bounds in (plan.straight, plan.shifted))
    pairs = counted_pairs(heads, kv_heads, 8, plan)
    assert pairs * heads == pytest.approx((heads // 2) * straight + (heads - heads // 2) * shifted, rel=1e-12)


@counts_operations
def test_operations_of_full_attention_are_those_of_the_documents() -> None:
    assert counted_pairs(8, 2, 8, plan_segments([40, 24], None)) == 40**2 + 24**2


class Written(TorchDispatchMode):
    """Bytes written by each operator that is neither an attention call nor a view nor an allocation."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        alias = func._schema.returns[0].alias_info
        is_view = alias is not None and not alias.is_write
        if not (is_view or name.startswith(("empty", "_scaled_dot_product_flash_attention_for_cpu"))):
            self.bytes[name] = self.bytes.get(name, 0) + result.numel() * result.element_size()
        return result


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 2), (28, 4), (6, 3), (4, 1), (9, 3), (71, 1)])
@pytest.mark.parametrize(("documents", "group_size"), [([64], 16), ([37, 5, 64, 16, 23], 16), ([50, 14], None)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_each_result_is_written_once_and_nothing_else(
    documents: list[int], group_size: int | None, heads: int, kv_heads: int, dtype: torch.dtype
) -> None:
    """Beyond the attention calls: one write of the output and of each gradient, also where a half cuts a kv group."""
    plan = plan_segments(documents, group_size)
    shapes = [(plan.tokens, n, 8) for n in (heads, kv_heads, kv_heads)]
    q, k, v = (torch.randn(shape).to(dtype).requires_grad_() for shape in shapes)
    with Written() as forward:
        out = s2_attention(q, k, v, plan)
    grad_out = torch.randn_like(out)
    with Written() as backward:
        gradients = torch.autograd.grad(out, (q, k, v), grad_out)
    assert forward.bytes == {"copy_": prod(shapes[0]) * dtype.itemsize}
    is_cut = not plan.full and heads // 2 % (heads // kv_heads) > 0
    cut = 2 * prod((plan.tokens, 8)) * dtype.itemsize * is_cut
    total = sum(gradient.numel() for gradient in gradients) * dtype.itemsize
    assert backward.bytes == {"copy_": total - cut} | ({"add": cut} if is_cut else {})


@pytest.mark.parametrize(
    ("documents", "calls"),
    [([16384], 1 + 3), ([16384 + 100], 2 + 3), ([16384 + 1500], 2 + 3), ([1000, 1500, 1000], 3)],
)
def test_a_long_document_takes_few_calls(documents: list[int], calls: int) -> None:
    plan = plan_segments(documents, 2048)
    assert len({plan.straight_runs, plan.shifted_runs}) == (1 if plan.full else 2)
    runs = plan.straight_runs if plan.full else plan.straight_runs + plan.shifted_runs
    assert len(runs) == calls
