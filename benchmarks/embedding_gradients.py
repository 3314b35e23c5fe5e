"""What do gradients of trained embeddings cost between workers? All rows, against those that a step has touched. (B17)

    python benchmarks/embedding_gradients.py --save

Two processes over gloo, random gradients with the rows that tokens drawn from Zipf's law (exponent 1) touch, 64 columns
of fp32. Contenders: DeepSpeed's dense reduction, and `pipeline.embedding_rows`. First the sums of both are compared.
Goals, in bytes of the dense reduction's: at most 1.2 × the share of touched rows; where more than half of the rows are
touched, all are sent, and at most 1.01 (the byte a row that the workers agree by is 1/256 of a row here). Seconds are
reported, not judged: this is one machine, and the network is what the bytes are for. What training embeddings and norms
costs on a GPU is in benchmarks/step.py (contenders auto and lora).
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from figures import as_table, machine, save
from torch import Tensor, nn

from pipeline.embedding_rows import DENSE_FROM, TouchedRows

COLUMNS, WORLD, GOAL, DENSE_GOAL = 64, 2, 1.2, 1.01
Reduce = Callable[[Tensor], None]


class Sent:
    """Bytes given to all-reduces."""

    def __init__(self) -> None:
        self.bytes = 0
        self._all_reduce = dist.all_reduce
        dist.all_reduce = self._counting

    def _counting(self, tensor: Tensor, *arguments: Any, **keywords: Any) -> Any:
        self.bytes += tensor.numel() * tensor.element_size()
        return self._all_reduce(tensor, *arguments, **keywords)


def dense(gradient: Tensor) -> None:
    gradient.div_(WORLD)
    dist.all_reduce(gradient)


def touched(rows: int) -> Reduce:
    """The reduction that the engine puts in the place of DeepSpeed's, alone."""
    parameter = nn.Parameter(torch.empty(rows, COLUMNS))
    zero = SimpleNamespace(get_param_id=lambda parameter: 0, average_tensor=None)
    reduction = TouchedRows(zero, parameter)

    def reduce(gradient: Tensor) -> None:
        reduction._reduce(gradient, gradient.dtype)

    return reduce


def gradient_of(rows: int, tokens: int, rank: int) -> Tensor:
    """Flat, with the rows that this worker's share of the tokens touches."""
    generator = torch.Generator().manual_seed(rank)
    weights = 1 / torch.arange(1, rows + 1, dtype=torch.float64)
    ids = torch.multinomial(weights, tokens // WORLD, replacement=True, generator=generator)
    gradient = torch.zeros(rows, COLUMNS)
    gradient.index_add_(0, ids, torch.randn(len(ids), COLUMNS, generator=generator))
    return gradient.view(-1)


def rank_main(rank: int, folder: str, cases: list[tuple[int, int]], rounds: int) -> None:
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=WORLD)
    torch.set_num_threads(1)
    sent, told = Sent(), []
    for rows, tokens in cases:
        ways = {"dense": dense, "touched": touched(rows)}
        start = gradient_of(rows, tokens, rank)
        results = {name: start.clone() for name in ways}
        for name, way in ways.items():
            way(results[name])
        torch.testing.assert_close(results["touched"], results["dense"])
        union = int(results["dense"].view(rows, COLUMNS).any(dim=1).sum())
        case: dict[str, Any] = {"vocabulary": rows, "tokens": tokens, "rows touched": union}
        for name, way in ways.items():
            seconds = []
            for _ in range(rounds):
                gradient = start.clone()
                dist.barrier()
                sent.bytes, began = 0, time.perf_counter()
                way(gradient)
                seconds.append(time.perf_counter() - began)
            case |= {f"{name} MB": sent.bytes / 1e6, f"{name} ms": round(statistics.median(seconds) * 1e3, 1)}
        told.append(case)
    if rank == 0:
        (Path(folder) / "told.json").write_text(json.dumps(told))
    dist.destroy_process_group()


def judge(case: dict[str, Any]) -> dict[str, Any]:
    share = case["rows touched"] / case["vocabulary"]
    of_dense = case["touched MB"] / case["dense MB"]
    passed = of_dense <= (DENSE_GOAL if share > DENSE_FROM else GOAL * share)
    row = {**case, "share of rows": round(share, 3), "share of bytes": round(of_dense, 3)}
    return row | {"verdict": "PASS" if passed else "FAIL"}


def main() -> int:
    """0 if the goal is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/<date>-embedding-gradients.md")
    options = parser.parse_args()
    cases = [(rows, tokens) for rows in (32000, 128256) for tokens in (32768, 102400, 1048576)]
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(rank_main, (folder, cases, options.rounds), nprocs=WORLD)
        rows = [judge(case) for case in json.loads((Path(folder) / "told.json").read_text())]
    print(as_table(rows))
    if options.save:
        facts = machine("cpu", workers=WORLD, columns=COLUMNS)
        print(f"written to {save('embedding-gradients', 'Gradients of embeddings between workers', facts, rows)}")
    return 0 if all(row["verdict"] == "PASS" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
