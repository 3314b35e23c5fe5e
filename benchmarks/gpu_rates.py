"""What do large products and copies reach on this GPU? The rates that `plan` reckons with.

    python benchmarks/gpu_rates.py --save        # some seconds

Products of two 8192 × 8192 matrices of random numbers in bf16, 2·8192³ operations each; copies of 8 GB inside the
card, read and written bytes counted; copies of 1 GB to pinned host memory and back. The median of each, first of half a
second after a pause, then of `--seconds`, when the card has warmed up. The product is compared with fp32 first. There
is no goal: `pipeline/gpus.py` holds the later ones of an H200 and an H100.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from figures import as_table, machine, save

SIZE = 8192
SHORT = 0.5


def check(a: torch.Tensor, b: torch.Tensor, product: torch.Tensor) -> None:
    exact = a.float() @ b.float()
    error = float((torch.mm(a, b, out=product).float() - exact).norm() / exact.norm())
    print(f"checked: a product in bf16 differs from fp32 by {error:.1e}")
    if not error < 1e-2:
        raise SystemExit("products in bf16 are wrong")


def seconds_each(work: Callable[[], object], seconds: float) -> float:
    """Median over as many as fit into `seconds`, by CUDA events."""
    work()
    torch.cuda.synchronize()
    taken, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        work()
        events[1].record()
        events[1].synchronize()
        taken.append(events[0].elapsed_time(events[1]) / 1e3)
    return statistics.median(taken)


def cases() -> dict[str, tuple[Callable[[], object], float, str]]:
    """By name: the work, what it counts for, and the unit."""
    a, b = (torch.randn(SIZE, SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(a)
    check(a, b, product)
    source = torch.empty(8_000_000_000, dtype=torch.uint8, device="cuda")
    copy = torch.empty_like(source)
    part, host = source[: 10**9], torch.empty(10**9, dtype=torch.uint8, pin_memory=True)
    return {
        "product": (lambda: torch.mm(a, b, out=product), 2 * SIZE**3 / 1e12, "TFLOP/s"),
        "copy": (lambda: copy.copy_(source), 2 * len(source) / 1e12, "TB/s"),
        "to the host": (lambda: host.copy_(part, non_blocking=True), len(part) / 1e9, "GB/s"),
        "from the host": (lambda: part.copy_(host, non_blocking=True), len(part) / 1e9, "GB/s"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each rate")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/<date>-gpu-rates-<name>.md")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA device")
    rows = []
    for name, (work, count, unit) in cases().items():
        time.sleep(SHORT)
        short, long = (count / seconds_each(work, seconds) for seconds in (SHORT, options.seconds))
        rows.append({"what": name, "unit": unit, "at first": round(short, 2), "later": round(long, 2)})
    print(as_table(rows))
    if options.save:
        short_name = torch.cuda.get_device_name().lower().replace("nvidia ", "").split()[0]
        print(f"written to {save(f'gpu-rates-{short_name}', 'Rates of a GPU', machine('cuda'), rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
