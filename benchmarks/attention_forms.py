"""What do other ways to write S²-Attn cost, in time and in memory? Forward + backward on the CPU. (B4)

    python benchmarks/attention_forms.py --save        # 16k tokens, G = 2048: two minutes on two quiet cores, 8 GB

Three contenders, in turn, on the same tensors, after each has been compared with the definition on a short row:

- ``ours``: `longlora.attention`;
- ``rolled``: half the heads rolled by G/2, groups by reshaping, torch's fused operator, rolled back;
- ``original``: as the authors publish it without flash attention, with the scores of each group in memory; corrected in
  its last group, where the beginning of the row would see its end.

Ratio 1: time of rolled over ours. Goal: at least 1.10. Limit: 1 + the time of the copies.
Ratio 2: time of original over ours. Goal: at least 3.
Ratio 3: peak memory of ours over rolled. Goal: at most 0.7.

Memory is what the process holds at its peak (VmHWM) beyond the tensors given and before the pass; each contender has a
process of its own, for a process keeps what another contender gave back. Linux only. All run with the allocator
settings of a training worker.
"""

import argparse
import math
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from attention import Attention, keep_memory, random_row, rolled_attention, seconds
from figures import as_table, machine, save, verdict

from longlora.attention import s2_attention
from longlora.attention.reference import reference_attention
from longlora.segments import plan_segments

OVER_ROLLED, OVER_ORIGINAL, SHARE_OF_MEMORY = 1.10, 3.0, 0.7


def original_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group_size: int) -> torch.Tensor:
    """Roll, reshape, scores, mask, softmax, roll back; q, k, v (T, H, d), one document, G dividing T, no GQA."""
    tokens, heads, head_dim = q.shape
    straight = heads // 2

    def grouped(t: torch.Tensor) -> torch.Tensor:
        rolled = torch.cat([t[:, :straight], t[:, straight:].roll(-group_size // 2, dims=0)], dim=1)
        return rolled.view(tokens // group_size, group_size, heads, head_dim).transpose(1, 2)

    q, k, v = (grouped(t) for t in (q, k, v))
    causal = torch.full((group_size, group_size), -math.inf, dtype=q.dtype).triu(1)
    scores = q @ k.transpose(2, 3) / math.sqrt(head_dim) + causal
    without_leak(scores[-1, straight:])
    out = (torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v).transpose(1, 2)
    out = out.reshape(tokens, heads, head_dim)
    return torch.cat([out[:, :straight], out[:, straight:].roll(group_size // 2, dims=0)], dim=1)


def without_leak(scores: torch.Tensor) -> None:
    """Parts the last shifted group, (heads, G, G), where the beginning of the row, rolled there, would see its end."""
    half = scores.shape[-1] // 2
    scores[:, half:, :half] = -math.inf


def contenders(tokens: int, group_size: int) -> dict[str, Attention]:
    plan = plan_segments([tokens], group_size)
    return {
        "ours": lambda q, k, v: s2_attention(q, k, v, plan),
        "rolled": partial(rolled_attention, group_size=group_size),
        "original": partial(original_attention, group_size=group_size),
    }


def check(options: argparse.Namespace) -> None:
    """Each gives what the definition gives, outputs and gradients, or the benchmark stops."""
    tokens, group_size = 512, 128
    q, k, v, grad = random_row(tokens, 4, 4, options.head_dim, options)
    exact = reference_attention(q, k, v, [tokens], group_size)
    wanted = [exact, *torch.autograd.grad(exact, (q, k, v), grad)]
    for attention in contenders(tokens, group_size).values():
        out = attention(q, k, v)
        results = [out, *torch.autograd.grad(out, (q, k, v), grad)]
        torch.testing.assert_close(results, wanted, rtol=1e-4, atol=1e-4)


def measure(tokens: int, group_size: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row of the table for each contender; the first round warms up."""
    forms = contenders(tokens, group_size)
    memory = {name: peak_in_process_of_its_own(name, tokens, group_size, options) for name in forms}
    row = random_row(tokens, options.heads, options.heads, options.head_dim, options)
    times: dict[str, list[float]] = {name: [] for name in forms}
    for number in range(1 + options.rounds):
        for name, attention in forms.items():
            elapsed, _ = seconds(attention, row, 1)
            if number:
                times[name].append(elapsed)
    shape = {"tokens": tokens, "group_size": group_size}
    table = []
    for name, values in times.items():
        slower = [other / own for other, own in zip(values, times["ours"], strict=True)]
        ratio, share = statistics.median(slower), memory["ours"] / memory[name]
        spread = statistics.median(abs(one - ratio) for one in slower) / ratio
        told = {
            "contender": name,
            "seconds": f"{statistics.median(values):.3f}",
            "peak MiB": round(memory[name] / 2**20),
            "time over ours": f"{ratio:.3f} ± {spread:.1%}",
            "memory of ours": round(share, 3),
        }
        table.append(shape | told | {"verdict": judge(name, ratio, share, spread)})
    return table


def judge(name: str, slower: float, share: float, spread: float) -> str:
    """Verdicts on time and memory. spread: of the rounds, median absolute deviation, relative."""
    if name == "rolled":
        return f"time {verdict(slower, OVER_ROLLED, spread)}, memory {verdict(SHARE_OF_MEMORY / share, 1.0, 0.0)}"
    return f"time {verdict(slower, OVER_ORIGINAL, spread)}" if name == "original" else ""


def peak_in_process_of_its_own(name: str, tokens: int, group_size: int, options: argparse.Namespace) -> int:
    """Bytes; see `peak`."""
    sizes = ["--tokens", str(tokens), "--group-sizes", str(group_size)]
    shape = ["--heads", str(options.heads), "--head-dim", str(options.head_dim)]
    command = [sys.executable, __file__, "--peak-of", name, *sizes, *shape]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def peak(name: str, options: argparse.Namespace) -> int:
    """Bytes that one pass adds to this process at its peak."""
    row = random_row(options.tokens, options.heads, options.heads, options.head_dim, options)
    [group_size] = options.group_sizes
    small = random_row(512, options.heads, options.heads, options.head_dim, options)
    seconds(contenders(512, 128)[name], small, 1)  # loads what is loaded at the first use
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    before = resident("VmRSS")
    seconds(contenders(options.tokens, group_size)[name], row, 1)
    return resident("VmHWM") - before


def resident(key: str) -> int:
    """Bytes of this process's memory by /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--group-sizes", type=lambda s: [int(n) for n in s.split(",")], default=[2048])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/<date>-attention-forms.json, .md")
    parser.add_argument("--peak-of", choices=list(contenders(512, 128)), help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.device, options.dtype = "cpu", torch.float32
    return options


def main() -> int:
    """0 if no goal is missed."""
    options = parse()
    keep_memory()
    if options.peak_of:
        print(peak(options.peak_of, options))
        return 0
    check(options)
    facts = machine("cpu", heads=f"{options.heads} x {options.head_dim}", dtype="float32", rounds=options.rounds)
    rows = [row for group_size in options.group_sizes for row in measure(options.tokens, group_size, options)]
    print(as_table(rows))
    if options.save:
        print(f"written to {save('attention-forms', 'Three forms of S²-Attn, forward + backward', facts, rows)}")
    return 1 if any("FAIL" in row["verdict"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
