"""Which kernel attends fastest on a GPU, and what does S²-Attn lose beside it? Forward + backward, TFLOP/s. (B5)

    python benchmarks/attention_kernels.py --save                        # 8k, 32k, 100k tokens; G 2048, 8192
    python benchmarks/attention_kernels.py --heads 32 --kv-heads 8       # Llama 3
    python benchmarks/attention_kernels.py --document 12000              # packed rows, of documents of 12,000 tokens

Side by side on the same tensors, in turn, medians over the rounds:

- ours with each backend that can run (the choice of ``auto`` is marked);
- ``original``: the data movement of LongLoRA's published flash path (stack, regroup, gather, attend, scatter, regroup),
  corrected in its bounds, with torch's variable-length kernel;
- ``rolled``: a correct roll-and-reshape S²-Attn with torch's own choice of a kernel;
- ``split``: the same segments on halves that are tensors of their own, gradients too: what the kernel alone takes;
- ``full``: dense attention by torch.

Goals: with the same kernel (``varlen``) ours is ≥ 1.3 × as fast as original at G 2048, ≥ 1.08 × at G 8192; ``auto``
≥ 0.95 of split. Ours, original and rolled are first checked against the definition on a short row. Operations:
7 · 2 · d a query-key pair and head (2 products forward, 5 backward), of the pairs of the causal half.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from attention import full_attention, random_row, rolled_attention
from figures import as_table, documents_of, machine, save, verdict
from torch.nn.attention.varlen import varlen_attn

from longlora.attention import Shape, available_backends, choose_backend, s2_attention
from longlora.attention._function import SegmentedAttention
from longlora.attention.reference import reference_attention
from longlora.attention.selection import BACKENDS
from longlora.segments import SegmentPlan, plan_segments

Tensors = list[torch.Tensor]
Attention = Callable[..., torch.Tensor | Tensors]
GOALS = {2048: 1.3, 8192: 1.08}
LEAST_OF_SPLIT = 0.95
TOLERANCE = 0.02


def varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor, longest: int) -> torch.Tensor:
    """torch's variable-length attention, causal, under whichever name this version gives the argument."""
    try:
        return varlen_attn(q, k, v, bounds, bounds, longest, longest, window_size=(-1, 0))
    except TypeError:
        return varlen_attn(q, k, v, bounds, bounds, longest, longest, is_causal=True)


def original_movement(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: SegmentPlan) -> torch.Tensor:
    """S²-Attn with the copies of the published code around one variable-length call. q, k, v (T, H, d), no GQA.

    q, k, v are stacked, regrouped so that the halves of the heads are two batch entries, and gathered by the indices
    of unpadded tokens; the output goes the same way back.
    """
    tokens, heads, head_dim = q.shape
    stacked = torch.stack([q, k, v], dim=1)  # (T, 3, H, d)
    halves = stacked.view(tokens, 3, 2, heads // 2, head_dim).permute(2, 0, 1, 3, 4)
    rows = halves.reshape(2 * tokens, 3, heads // 2, head_dim)
    indices = torch.arange(2 * tokens, device=q.device)
    unpadded = rows.index_select(0, indices)
    bounds = torch.cat([plan.straight, plan.shifted[1:] + tokens])
    out = varlen(*unpadded.unbind(1), bounds, max(plan.max_straight, plan.max_shifted))
    padded = torch.zeros_like(out).index_copy(0, indices, out)
    return padded.view(2, tokens, heads // 2, head_dim).transpose(0, 1).reshape(tokens, heads, head_dim)


def split_attention(*halves: torch.Tensor, plan: SegmentPlan, backend: str) -> Tensors:
    """q, k, v of the straight half of the heads and then of the shifted one, (T, H/2, d) each → both outputs."""
    both = zip((halves[:3], halves[3:]), (plan.straight_segments, plan.shifted_segments), strict=True)
    scale = halves[0].shape[-1] ** -0.5
    return [
        SegmentedAttention.apply(*row, plan_of(segments, plan), scale, BACKENDS[backend], None)
        for row, segments in both
    ]


def split_row(row: Tensors, grad: torch.Tensor) -> tuple[Tensors, Tensors]:
    """The halves of q, k, v as leaves, and those of the output's gradient."""
    halves = [[t.detach().tensor_split(2, dim=1)[half].contiguous() for t in (*row, grad)] for half in range(2)]
    return [t.requires_grad_() for *leaves, _ in halves for t in leaves], [half[-1] for half in halves]


def plan_of(segments: object, plan: SegmentPlan) -> SegmentPlan:
    """A plan in which all heads attend inside these segments."""
    bounds, longest, runs = segments  # type: ignore[misc]
    return SegmentPlan(plan.document_lengths, plan.group_size, bounds, bounds, longest, longest, runs, runs)


def contenders(plan: SegmentPlan, group_size: int, options: argparse.Namespace) -> dict[str, Attention]:
    available = available_backends(options.device, options.dtype, options.head_dim)
    others = ("sdpa",) if plan.uniform else ("sdpa", "cudnn")
    names = [name for name, reason in available.items() if reason is None and name not in others]
    made: dict[str, Attention] = {name: partial(s2_attention, plan=plan, backend=name) for name in names}
    if options.heads == options.kv_heads:
        made["original"] = partial(original_movement, plan=plan)
        if plan.tokens % group_size == 0 and len(plan.document_lengths) == 1:
            made["rolled"] = partial(rolled_attention, group_size=group_size)
    return made


def check(options: argparse.Namespace) -> None:
    """Every contender gives what the definition gives, outputs and gradients, or the benchmark stops."""
    tokens, group_size = 2048, 512
    *row, grad = random_row(tokens, options.heads, options.kv_heads, options.head_dim, options)
    documents = documents_of(tokens, options.document and 700)  # longer than a group and not a multiple of it
    plan = plan_segments(documents, group_size).to(options.device)
    exact_row = [t.detach().float().requires_grad_() for t in row]
    exact = reference_attention(*exact_row, documents, group_size)
    wanted = [exact.detach(), *torch.autograd.grad(exact, exact_row, grad.float())]
    for name, attention in contenders(plan, group_size, options).items():
        out = attention(*row)
        for part, x, right in zip(
            ("out", "dq", "dk", "dv"), [out.detach(), *torch.autograd.grad(out, row, grad)], wanted, strict=True
        ):
            error = float((x.float() - right).norm() / right.norm())
            if not error <= TOLERANCE:
                raise SystemExit(f"{name}: {part} differs from the definition by {error:.3g}")
            print(f"checked {name} {part}: {error:.2e}")


def milliseconds(attention: Attention, row: Tensors, grad: torch.Tensor | Tensors) -> tuple[float, float]:
    """(forward, backward) by CUDA events."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
    events[0].record()
    out = attention(*row)
    events[1].record()
    torch.autograd.grad(out, row, grad)
    events[2].record()
    events[2].synchronize()
    return events[0].elapsed_time(events[1]), events[1].elapsed_time(events[2])


def pairs(plan: SegmentPlan) -> float:
    """Query-key pairs a head, both halves' mean, the causal half of them."""
    return sum(float(bounds.double().diff().square().sum()) for bounds in (plan.straight, plan.shifted)) / 4


def measure(tokens: int, group_size: int, options: argparse.Namespace) -> list[dict[str, object]]:
    *row, grad = random_row(tokens, options.heads, options.kv_heads, options.head_dim, options)
    plan = plan_segments(documents_of(tokens, options.document), group_size).to(options.device)
    shape = Shape.of(row[0], row[1])
    chosen = choose_backend(shape, plan)
    print(f"{tokens} tokens, G {group_size}: auto is {chosen}", flush=True)
    runs: dict[str, Any] = {name: (made, row, grad) for name, made in contenders(plan, group_size, options).items()}
    runs["split"] = (partial(split_attention, plan=plan, backend=chosen.name), *split_row(row, grad))
    if tokens <= options.longest_full and not options.document:
        runs["full"] = (full_attention, row, grad)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for number in range(1 + options.rounds):
        for name, run in runs.items():
            measured = milliseconds(*run)
            if number:
                times[name].append(measured)
    total = {name: statistics.median(f + b for f, b in measured) for name, measured in times.items()}
    rows = []
    for name, measured in times.items():
        counted = tokens**2 / 2 if name == "full" else pairs(plan)
        work = 2 * options.head_dim * options.heads * counted / 1e9
        forward, backward = (statistics.median(column) for column in zip(*measured, strict=True))
        spread = statistics.stdev(f + b for f, b in measured) / total[name]
        rows.append(
            {
                "tokens": tokens,
                "group_size": group_size,
                "contender": name + (" (auto)" if name == chosen.name else ""),
                "ms": round(total[name], 2),
                "spread": f"{spread:.1%}",
                "forward TFLOP/s": round(2 * work / forward),
                "backward TFLOP/s": round(5 * work / backward),
                "auto is faster by": round(total[name] / total[chosen.name], 3),
                "varlen is faster by": round(total[name] / total["varlen"], 3),
                "verdict": judged(name, total, chosen.name, group_size, spread),
            }
        )
    return rows


def judged(name: str, total: dict[str, float], chosen: str, group_size: int, spread: float) -> str:
    if name == "original" and group_size in GOALS:
        return verdict(total[name] / total["varlen"], GOALS[group_size], spread)
    if name == "split":
        return verdict(total[name] / total[chosen], LEAST_OF_SPLIT, spread)
    return ""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=lambda s: [int(n) for n in s.split(",")], default=[8192, 32768, 98304])
    parser.add_argument("--group-sizes", type=lambda s: [int(n) for n in s.split(",")], default=[2048, 8192])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, help="default: as many as heads")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--document", type=int, help="tokens of each document of a row; default: the whole row is one")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--longest-full", type=int, default=32768, help="tokens up to which dense attention is timed")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/<date>-attention-kernels-….md")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA device; benchmarks/attention.py compares on the CPU")
    options.device, options.dtype = "cuda", torch.bfloat16
    options.kv_heads = options.kv_heads or options.heads
    return options


def main() -> int:
    """0 if no goal is missed."""
    options = parse()
    check(options)
    refused = {name: why for name, why in available_backends("cuda", options.dtype, options.head_dim).items() if why}
    facts = machine(
        "cuda", heads=f"{options.heads}/{options.kv_heads} x {options.head_dim}", rounds=options.rounds, refused=refused
    )
    rows = [
        row
        for tokens in options.lengths
        for group_size in options.group_sizes
        if group_size < tokens
        for row in measure(tokens, group_size, options)
    ]
    print(as_table(rows))
    if options.save:
        name = f"attention-kernels-{options.heads}-{options.kv_heads}" + "-packed" * bool(options.document)
        print(f"written to {save(name, 'S²-Attn kernels, forward + backward', facts, rows)}")
    return 1 if any(row["verdict"] == "FAIL" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
