"""What do the output layer and the loss cost, in time and memory? Naive, in chunks, and fused. (B8)

    python benchmarks/head_loss.py --save                                     # GPU, bf16, 32k and 128k vocabularies
    python benchmarks/head_loss.py --device cpu --hidden 256 --vocabularies 32000 --lengths 2048,8192

Contenders: ``naive`` forms all logits (transformers' way); ``chunks`` is `summed_cross_entropy` without Liger;
``fused`` with it. Frozen head: the gradient goes to the hidden states alone. Limit: 4·V·D operations a token.
Goals: memory ≤ 0.1 × naive (from 32k tokens); on a GPU fused ≤ 2.5 × the limit at 790 TFLOP/s, and ≤ 1.5 GiB beside
what the hidden states and their gradient take. Each loss and gradient is first compared with the naive one in double
precision.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from figures import as_table, machine, save
from torch import Tensor, nn

from longlora.fused import can_fuse_head
from longlora.live_bytes import LiveBytes
from longlora.loss import summed_cross_entropy

Loss = Callable[[Tensor, nn.Linear, Tensor], Tensor]
PEAK_RATE = 790e12
MEMORY_SHARE, TIME_FACTOR, EXTRA_GIB = 0.1, 2.5, 1.5


def naive(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden).float(), targets, reduction="sum")


def peak_bytes(device: str, function: Callable[[], Any]) -> float:
    """Bytes at the peak above what was there before: allocated on a GPU, of living tensors on the CPU."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    with LiveBytes() as live:
        function()
    return live.peak


def contenders(head: nn.Linear, device: str) -> dict[str, Loss]:
    made: dict[str, Loss] = {"naive": naive, "chunks": partial(summed_cross_entropy, fuse=False)}
    if can_fuse_head(head, torch.device(device)):
        made["fused"] = summed_cross_entropy
    return made


def problem(tokens: int, hidden: int, vocabulary: int, options: argparse.Namespace) -> tuple[Tensor, nn.Linear, Tensor]:
    generator = torch.Generator(options.device).manual_seed(0)
    make = partial(torch.randn, generator=generator, device=options.device, dtype=options.dtype)
    head = nn.Linear(hidden, vocabulary, bias=False, device="meta")
    head.weight = nn.Parameter(make(vocabulary, hidden) * hidden**-0.5, requires_grad=False)
    targets = torch.randint(vocabulary, (tokens,), generator=generator, device=options.device)
    return make(tokens, hidden).requires_grad_(), head, targets


def check(options: argparse.Namespace) -> None:
    hidden, head, targets = problem(1000, options.hidden, 4096, options)
    exact_head = nn.Linear(1, 1, bias=False)
    exact_head.weight = nn.Parameter(head.weight.double(), requires_grad=False)
    exact_hidden = hidden.detach().double().requires_grad_()
    exact = F.cross_entropy(F.linear(exact_hidden, exact_head.weight), targets, reduction="sum")
    (wanted,) = torch.autograd.grad(exact, exact_hidden)
    exact = exact.detach()
    for name, loss in contenders(head, options.device).items():
        value = loss(hidden, head, targets)
        (gradient,) = torch.autograd.grad(value, hidden)
        value = value.detach()
        error = float((gradient.double() - wanted).norm() / wanted.norm())
        print(f"checked {name}: loss off by {float((value.double() - exact) / exact):.1e}, gradient by {error:.1e}")
        if not (abs(float(value.double() / exact) - 1) < 1e-3 and error < 1e-2):
            raise SystemExit(f"{name} gives another loss or gradient than the definition")


def measure(tokens: int, vocabulary: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    hidden, head, targets = problem(tokens, options.hidden, vocabulary, options)
    synchronize = torch.cuda.synchronize if options.device == "cuda" else lambda: None

    def run(loss: Loss) -> None:
        torch.autograd.grad(loss(hidden, head, targets), hidden)
        synchronize()

    size = options.dtype.itemsize
    made = contenders(head, options.device)
    if tokens * vocabulary * (2 * size + 8) > options.naive_gib * 2**30:
        del made["naive"]
    peaks, times = {}, {name: [] for name in made}
    for name, loss in made.items():
        run(loss)
        peaks[name] = peak_bytes(options.device, partial(run, loss))
    for _ in range(options.rounds):
        for name, loss in made.items():
            start = time.perf_counter()
            run(loss)
            times[name].append(time.perf_counter() - start)
    # What naive takes where it does not fit: logits in both precisions and their gradients.
    of_naive = peaks.get("naive", tokens * vocabulary * (2 * size + 8))
    limit = 4 * vocabulary * options.hidden * tokens / PEAK_RATE
    rows = []
    for name, peak in peaks.items():
        seconds = statistics.median(times[name])
        extra = (peak - tokens * options.hidden * size) / 2**30  # the gradient of the hidden states is the result
        row = {"tokens": tokens, "vocabulary": vocabulary, "contender": name, "ms": round(seconds * 1e3, 2)}
        row |= {"peak GiB": round(peak / 2**30, 3), "of naive": round(peak / of_naive, 3), "extra GiB": round(extra, 3)}
        if options.device == "cuda":
            row["over limit"] = round(seconds / limit, 2)
        rows.append(row | {"verdict": judged(name, row)})
    return rows


def judged(name: str, row: dict[str, Any]) -> str:
    if name == "naive":
        return ""
    passed = row["of naive"] <= MEMORY_SHARE or row["tokens"] < 32768
    if name == "fused":
        passed = passed and row["over limit"] <= TIME_FACTOR and row["extra GiB"] <= EXTRA_GIB
    return "PASS" if passed else "FAIL"


def parse() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(n) for n in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--lengths", type=numbers, default=[8192, 32768, 102400])
    parser.add_argument("--vocabularies", type=numbers, default=[32000, 128256])
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--naive-gib", type=float, default=60, help="memory up to which the naive loss is run")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/<date>-head-loss-….md")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device on this machine: --device cpu compares on the CPU")
    options.dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    return options


def main() -> int:
    """0 if no goal is missed."""
    options = parse()
    check(options)
    facts = machine(options.device, hidden=options.hidden, rounds=options.rounds)
    rows = [row for v in options.vocabularies for tokens in options.lengths for row in measure(tokens, v, options)]
    print(as_table(rows))
    if options.save:
        print(f"written to {save(f'head-loss-{options.device}', 'Output layer and loss', facts, rows)}")
    return 1 if any(row["verdict"] == "FAIL" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
