"""Is S²-Attn as fast as its operation count promises? Forward + backward, against full attention and roll-and-reshape.

    python benchmarks/attention.py                       # CPU: 4k to 32k tokens, G = N/4 and G = 2048
    python benchmarks/attention.py --device cuda --dtype bfloat16 --heads 32 --head-dim 128 --lengths 8192,32768,98304

Three contenders run side by side, in turn, on the same tensors; the table gives medians over the rounds:
full attention (torch's), a correct roll-and-reshape S²-Attn (below), and ``longlora.attention``. Bounds: from 16k
tokens on, the time gain over full attention is at least 0.8 of the gain in operations; and ours is not slower than
rolling. Both forms of S²-Attn are first checked against the definition on a small case.

On the CPU torch's operator computes the whole of the 512 keys at the diagonal, 256 pairs a query too many on average:
a quarter of the work at G = 2048, next to nothing for full attention, so that a share of about 0.82 is to be expected
there. The process runs with the allocator settings of a training worker (``keep_memory``).
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable

import torch
from figures import as_table, machine, save
from torch.nn.functional import scaled_dot_product_attention

from longlora.attention import Shape, choose_backend, s2_attention
from longlora.attention.reference import reference_attention
from longlora.segments import SegmentPlan, plan_segments

LEAST_SHARE, FROM_TOKENS = 0.8, 16384
Row = dict[str, float | int | str]
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def full_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Dense causal attention over the row, (T, H, d)."""
    row = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))
    return scaled_dot_product_attention(*row, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


def rolled_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group_size: int) -> torch.Tensor:
    """S²-Attn as it is usually written: roll half the heads by G/2, reshape into groups, attend, roll back.

    The roll carries the first G/2 tokens into the last group, behind the row's last G/2, where the beginning of the
    row would see its end: that group is attended in two halves. q, k, v (T, H, d), one document, G dividing T, no GQA.
    """
    tokens, heads, head_dim = q.shape
    straight = heads // 2

    def grouped(t: torch.Tensor) -> torch.Tensor:
        rolled = torch.cat([t[:, :straight], t[:, straight:].roll(-group_size // 2, dims=0)], dim=1)
        return rolled.view(tokens // group_size, group_size, heads, head_dim).transpose(1, 2)

    def halves(t: torch.Tensor) -> torch.Tensor:
        return t.transpose(1, 2).reshape(2, group_size // 2, heads - straight, head_dim).transpose(1, 2)

    groups = [grouped(t) for t in (q, k, v)]
    attended = scaled_dot_product_attention(*(t[:-1] for t in groups), is_causal=True)
    last_straight = scaled_dot_product_attention(*(t[-1:, :straight] for t in groups), is_causal=True)
    last_shifted = scaled_dot_product_attention(*(halves(t[-1:, straight:]) for t in groups), is_causal=True)
    last_shifted = last_shifted.transpose(1, 2).reshape(1, group_size, heads - straight, head_dim).transpose(1, 2)
    out = torch.cat([attended, torch.cat([last_straight, last_shifted], dim=1)]).transpose(1, 2)
    out = out.reshape(tokens, heads, head_dim)
    return torch.cat([out[:, :straight], out[:, straight:].roll(group_size // 2, dims=0)], dim=1)


def gain_in_operations(plan: SegmentPlan) -> float:
    """Query-key pairs of full attention over those of the plan, both halves of the heads together."""
    pairs = sum(float(bounds.double().diff().square().sum()) for bounds in (plan.straight, plan.shifted)) / 2
    return plan.tokens**2 / pairs


def random_row(
    tokens: int, heads: int, kv_heads: int, head_dim: int, options: argparse.Namespace
) -> list[torch.Tensor]:
    """q, k, v as leaves, and a gradient of the output."""
    generator = torch.Generator(options.device).manual_seed(0)
    shapes = [(tokens, n, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
    q, k, v, grad = (torch.randn(s, generator=generator, device=options.device, dtype=options.dtype) for s in shapes)
    return [q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad]


def check(options: argparse.Namespace) -> None:
    """Ours and the rolled version give what the definition gives, outputs and gradients, or the benchmark stops."""
    tokens, group_size = 512, 128
    q, k, v, grad = random_row(tokens, 4, 4, options.head_dim, options)
    plan = plan_segments([tokens], group_size).to(options.device)
    contenders: dict[str, Attention] = {
        "ours": lambda q, k, v: s2_attention(q, k, v, plan),
        "rolled": lambda q, k, v: rolled_attention(q, k, v, group_size),
    }
    exact = reference_attention(q, k, v, [tokens], group_size)
    wanted = [exact, *torch.autograd.grad(exact, (q, k, v), grad)]
    tolerance = 1e-4 if options.dtype == torch.float32 else 5e-2
    for attention in contenders.values():
        out = attention(q, k, v)
        results = [out, *torch.autograd.grad(out, (q, k, v), grad)]
        torch.testing.assert_close(results, wanted, rtol=tolerance, atol=tolerance)


def seconds(attention: Attention, row: list[torch.Tensor], repeats: int) -> tuple[float, float]:
    """One forward and backward pass, the mean of ``repeats``: by the clock, and of processor time."""
    q, k, v, grad = row
    synchronize = torch.cuda.synchronize if q.device.type == "cuda" else lambda: None
    synchronize()
    clock, processor = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        torch.autograd.grad(attention(q, k, v), (q, k, v), grad)
    synchronize()
    return (time.perf_counter() - clock) / repeats, (time.process_time() - processor) / repeats


def measure(tokens: int, group_size: int, options: argparse.Namespace) -> Row:
    """Interleaved rounds, after one for warming up, as a row of the table.

    In a round each contender runs for about as long as the slowest, so that they share a busy machine's noise alike.
    """
    row = random_row(tokens, options.heads, options.kv_heads, options.head_dim, options)
    plan = plan_segments([tokens], group_size).to(options.device)
    contenders: dict[str, Attention] = {
        "ours": lambda q, k, v: s2_attention(q, k, v, plan),
        "full": full_attention,
    }
    if options.heads == options.kv_heads:
        contenders["rolled"] = lambda q, k, v: rolled_attention(q, k, v, group_size)
    warm = {name: seconds(attention, row, 1)[0] for name, attention in contenders.items()}
    repeats = {name: max(1, round(max(warm.values()) / elapsed)) for name, elapsed in warm.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for _ in range(options.rounds):
        for name, attention in contenders.items():
            times[name].append(seconds(attention, row, repeats[name]))
    return {"tokens": tokens, "group_size": group_size, **judge(times, gain_in_operations(plan), tokens)}


def judge(times: dict[str, list[tuple[float, float]]], flop_gain: float, tokens: int) -> Row:
    """Medians over the rounds, gains, and whether the bounds hold. ``cpu_share`` is ``share`` by processor time."""
    clock = {name: statistics.median(wall for wall, _ in values) for name, values in times.items()}
    processor = {name: statistics.median(cpu for _, cpu in values) for name, values in times.items()}
    time_gain = clock["full"] / clock["ours"]
    over_rolled = clock["rolled"] / clock["ours"] if "rolled" in clock else float("nan")
    passed = (time_gain >= LEAST_SHARE * flop_gain or tokens < FROM_TOKENS) and not over_rolled < 1
    spread = {name: max(values)[0] - min(values)[0] for name, values in times.items()}
    return {
        **{f"{name}_seconds": f"{clock[name]:.3f} ± {spread[name] / 2:.3f}" for name in times},
        "flop_gain": round(flop_gain, 2),
        "time_gain": round(time_gain, 2),
        "share": round(time_gain / flop_gain, 3),
        "cpu_share": round(processor["full"] / processor["ours"] / flop_gain, 3),
        "gain_over_rolled": round(over_rolled, 3),
        "verdict": "PASS" if passed else "FAIL",
    }


def keep_memory() -> None:
    """Starts the process anew with the allocator settings of a training worker: glibc reads them at the start only."""
    from pipeline.session import KEEP_MEMORY  # not at the top: on a GPU machine longlora/ may be all there is

    if not KEEP_MEMORY.keys() <= os.environ.keys():
        os.execve(sys.executable, sys.orig_argv, {**KEEP_MEMORY, **os.environ})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.float32)
    parser.add_argument("--lengths", type=lambda s: [int(n) for n in s.split(",")], default=[4096, 8192, 16384, 32768])
    parser.add_argument("--group-sizes", type=lambda s: [int(n) for n in s.split(",")], help="default: N/4 and 2048")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, help="default: as many as heads")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/<date>-attention-….json and .md")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device on this machine")
    options.kv_heads = options.kv_heads or options.heads
    return options


def main() -> int:
    """0 if every row passes."""
    options = parse()
    if options.device == "cpu":
        keep_memory()
    torch.set_num_threads(options.threads)
    check(options)
    shape = Shape(torch.device(options.device), options.dtype, options.heads, options.kv_heads, options.head_dim)
    facts = machine(
        options.device,
        backend=str(choose_backend(shape, plan_segments([4096], 1024), "auto")),
        heads=f"{options.heads}/{options.kv_heads} x {options.head_dim}",
        dtype=str(options.dtype).removeprefix("torch."),
        rounds=options.rounds,
    )
    rows: list[Row] = []
    print("\n".join(f"{name}: {value}" for name, value in facts.items()))
    for tokens in options.lengths:
        for group_size in options.group_sizes or sorted({tokens // 4, 2048}):
            rows.append(measure(tokens, group_size, options))
            print(rows[-1], flush=True)
    print(as_table(rows))
    if options.save:
        name = f"attention-{options.device}-{facts['dtype']}"
        print(f"written to {save(name, 'S²-Attn, forward + backward', facts, rows)}")
    return 0 if all(row["verdict"] == "PASS" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
