"""What does S²-Attn compute and move? Counted exactly, at the size of a 7B model and 100k tokens. (B1, B2)

    python benchmarks/counts.py --save

Nothing is computed: tensors are on the meta device, and operators are counted as they are called. Operations: the
attention calls of forward and backward, against the formula N·G − G²/4 pairs a head and against full attention. Bytes:
what operators other than attention write, in activations U (tokens × hidden size × 2 bytes), beside the attention calls
themselves. Contenders: this project's backends (flash-attn's calls are played by functions that allocate as they do),
roll-and-reshape, and the data movement of the published code. Goals: operations 1.000 of the formula; bytes 0 with
flash-attn, 4 U (the output and three gradients, once) with torch's dense operators, at most 10 U with its
variable-length one.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import attention
import torch
from attention_kernels import original_movement
from figures import as_table, machine, save
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from longlora.attention import flash
from longlora.attention._function import SegmentedAttention
from longlora.attention.selection import BACKENDS
from longlora.flops import attention_pairs
from longlora.segments import SegmentPlan, plan_segments

HEADS, HEAD_DIM = 32, 128
GOALS = {"flash": 0, "cudnn": 4, "sdpa": 4, "varlen": 10}
COUNTS_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu in flop_registry
ATTENTION, ALLOCATIONS = ("attn", "attention"), ("empty", "new_empty")

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class Written(TorchDispatchMode):
    """Bytes written by operators that are neither attention, nor a view, nor an allocation."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        returned = func._schema.returns
        alias = returned[0].alias_info if returned else None
        is_view = alias is not None and not alias.is_write
        if not is_view and not name.startswith(ALLOCATIONS) and not any(part in name for part in ATTENTION):
            tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return result


@contextmanager
def flash_played() -> Iterator[None]:
    """flash-attn's extension, which takes no tensors without memory: it writes into what it is given."""

    def forward(q: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
        return None, q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32), None, q.new_empty(2)

    real = flash._extension
    flash._extension = lambda: SimpleNamespace(varlen_fwd=forward, varlen_bwd=lambda *unused: None)
    try:
        yield
    finally:
        flash._extension = real


def contenders(plan: SegmentPlan, group_size: int) -> dict[str, Attention]:
    def ours(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return SegmentedAttention.apply(q, k, v, plan, HEAD_DIM**-0.5, BACKENDS[name], None)

    made: dict[str, Attention] = {name: partial(ours, name) for name in GOALS}
    if plan.tokens % group_size == 0:
        made["rolled"] = partial(rolled, group_size=group_size)
    made["original"] = partial(original_movement, plan=plan)
    return made


def rolled(q: Tensor, k: Tensor, v: Tensor, group_size: int) -> Tensor:
    """Roll-and-reshape around a fused operator; without memory torch would choose one that writes the scores."""
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with patch.object(
        attention, "scaled_dot_product_attention", lambda q, k, v, is_causal: fused(q, k, v, 0.0, is_causal)[0]
    ):
        return attention.rolled_attention(q, k, v, group_size)


def row_of(tokens: int, kv_heads: int) -> list[Tensor]:
    """q, k, v as leaves, and a gradient of the output, without memory."""
    make = partial(torch.empty, dtype=torch.bfloat16, device="meta")
    q, k, v = (make(tokens, n, HEAD_DIM).requires_grad_() for n in (HEADS, kv_heads, kv_heads))
    return [q, k, v, make(tokens, HEADS, HEAD_DIM)]


def moved(attend: Attention, tokens: int, kv_heads: int = HEADS) -> float:
    """Bytes written beside the attention calls in forward and backward, in U."""
    *row, grad = row_of(tokens, kv_heads)
    with flash_played(), Written() as written:
        out = attend(*row)
        torch.autograd.grad(out, row, grad)
    return written.bytes / (tokens * HEADS * HEAD_DIM * 2)


def pairs_counted(plan: SegmentPlan) -> float:
    """Pairs a head in the attention calls, forward and backward: torch counts 2 + 5 products over all of them."""
    *row, grad = row_of(plan.tokens, HEADS)
    with FlopCounterMode(display=False) as counter:
        out = contenders(plan, 2)["sdpa"](*row)
        torch.autograd.grad(out, row, grad)
    return counter.get_total_flops() / ((2 + 5) * 2 * HEAD_DIM * HEADS)


def operations(tokens: int, group_size: int) -> dict[str, Any]:
    plan = plan_segments([tokens], group_size).to("meta")
    counted, formula = pairs_counted(plan), tokens * group_size - group_size**2 / 4
    return {
        "tokens": tokens,
        "group_size": group_size,
        "pairs a head": f"{counted:.4g}",
        "of the formula": counted / formula,
        "of the code's own count": counted / (2 * attention_pairs(plan)),
        "full attention over it": round(tokens**2 / counted, 2),
        "verdict": "PASS" if counted == formula else "FAIL",
    }


def traffic(tokens: int, group_size: int) -> list[dict[str, Any]]:
    plan = plan_segments([tokens], group_size).to("meta")
    rows = []
    for name, attend in contenders(plan, group_size).items():
        written = moved(attend, tokens)
        judged = ("PASS" if written <= GOALS[name] else "FAIL") if name in GOALS else ""
        row = {"tokens": tokens, "group_size": group_size, "contender": name, "U written": round(written, 3)}
        rows.append(row | {"goal": GOALS.get(name, ""), "verdict": judged})
    return rows


def main() -> int:
    """0 if every goal is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/<date>-counts-….md")
    options = parser.parse_args()
    counted = [operations(n, g) for n in (8192, 32768, 98304, 102400) for g in (2048, 8192) if g < n]
    written = [row for g in (2048, 8192) for row in traffic(98304, g)]
    print(as_table(counted), as_table(written), sep="\n\n")
    if options.save:
        facts = machine("cpu", heads=f"{HEADS} x {HEAD_DIM}", dtype="bfloat16")
        print(f"written to {save('counts-operations', 'Operations of S²-Attn', facts, counted)}")
        print(f"written to {save('counts-bytes', 'Bytes that S²-Attn moves', facts, written)}")
    return 1 if any(row["verdict"] == "FAIL" for row in [*counted, *written]) else 0


if __name__ == "__main__":
    sys.exit(main())
