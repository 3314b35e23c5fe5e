"""Do workers get even shares of the work, where rows of packed documents cost a·N + b·Σl²? Counted, nothing is timed.

    python benchmarks/balance.py --save       # half a minute on a quiet core
    python benchmarks/balance.py --steps 20 --sigma 1.0

N is a row's tokens, and Σl² runs over the segments inside which it attends: documents without a group size, at most G
tokens each with one, so that Σl² ≤ N·G. The coefficients are those of `longlora/flops.py` for the shapes of Llama 2 7B:
a = 4 operations for each of the 6.476·10⁹ frozen weights of its layers, b = 7 products of 2·D operations a pair in 32
layers. Adapters and output layer are left out: they cost the same for every token and would even rows out.

Documents have log-normal lengths, with a median of 550 tokens ("web") or 5400 ("long"). They are packed in windows as a
run packs them (documents longer than a row are cut), ordered as a run orders them, and each step's 64 rows go to eight
workers, which wait for each other once a step (ZeRO-2). Two contenders, on the same steps, both with eight rows each:

    ours       `pipeline.order.even_shares`: the most expensive row that is left to the worker with the least work
    in order   `pipeline.order.share`: the first eight to the first worker, whatever they cost

Ratio: the most expensive worker's cost over the mean of all, the part of a step by which the others wait. Limit: 1.
Goal: the mean over the steps is at most 1.02 for ours at G ≤ 8192. Nothing is promised for full attention.
Everything is exact and seeded: there is no noise.

Rows differ because packing puts the longest documents of a window together first, in rows that attend up to G tokens
back, and leaves rows of short documents that attend a few hundred back; at G = 2048 all reach almost as little. The
last row of a window is short: it costs less than any other, and steps that hold one make the 95th percentiles.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from figures import Row, as_table, machine, save, verdict
from transformers import LlamaConfig, LlamaModel

from longlora.flops import document_pairs, linear_operations, pair_operations
from pipeline.order import even_shares, positions_of_step, sequences_at, share
from pipeline.packing import WINDOW_TOKENS, pack

GOAL, GOAL_UP_TO = 1.02, 8192
WORLD_SIZE, GLOBAL_BATCH, SEED = 8, 64, 0
MEDIANS = {"web": 550, "long": 5400}
CONTEXTS = (32768, 102400)
GROUP_SIZES = (2048, 8192, None)
LLAMA_2_7B = LlamaConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
)
Costs = npt.NDArray[np.float64]


def packed_rows(median: int, sigma: float, context: int, rows: int) -> list[list[int]]:
    """At least `rows` rows of document lengths, from windows of documents packed as `pipeline/unit_work.py` does."""
    random = np.random.default_rng(SEED)
    packed: list[list[int]] = []
    while len(packed) < rows:
        window, tokens = [], 0
        while tokens < WINDOW_TOKENS:
            window.append(max(2, round(random.lognormal(np.log(median), sigma))))  # shorter ones are skipped
            tokens += window[-1]
        packed += [[piece.length for piece in pieces] for pieces in pack(window, context)]
    return packed


@lru_cache(maxsize=1)
def operations_of_a_token() -> float:
    """Of the frozen matrices of Llama 2 7B's layers, forward and backward."""
    with torch.device("meta"):
        return linear_operations(LlamaModel(LLAMA_2_7B).requires_grad_(False), LLAMA_2_7B)


def cost(documents: Sequence[int], group_size: int | None) -> float:
    """Operations of a row: documents do not attend to each other, so theirs add up."""
    pairs = sum(document_pairs(length, group_size) for length in documents)
    attention = pair_operations(LLAMA_2_7B) * pairs * 7 / 2 * LLAMA_2_7B.num_hidden_layers
    return operations_of_a_token() * sum(documents) + attention


def in_order(costs: Costs, world_size: int) -> Costs:
    """Each worker's cost where all take the next rows of the step; costs: of its rows, in the order of the run."""
    offsets = (share(len(costs), world_size, rank) for rank in range(world_size))
    return np.array([costs[part.start : part.stop].sum() for part in offsets])


def ours(costs: Costs, world_size: int) -> Costs:
    """Each worker's cost under our assignment."""
    return np.array([costs[offsets].sum() for offsets in even_shares(costs.tolist(), world_size)])


def unevenness(workers: Costs) -> float:
    """Cost of the most expensive worker over the mean."""
    return float(workers.max() / workers.mean())


def compare(costs: Costs, steps: int, world_size: int = WORLD_SIZE, batch: int = GLOBAL_BATCH) -> dict[str, Costs]:
    """Unevenness of every step under both assignments; costs: of all rows of the packs."""
    ratios: dict[str, list[float]] = {"ours": [], "in order": []}
    for step in range(steps):
        rows = costs[sequences_at(positions_of_step(step, batch), SEED, len(costs))]
        ratios["ours"].append(unevenness(ours(rows, world_size)))
        ratios["in order"].append(unevenness(in_order(rows, world_size)))
    return {name: np.array(values) for name, values in ratios.items()}


def judge(ratios: Costs, group_size: int | None) -> str:
    """Whether our assignment is even enough; nothing is promised above a group size of GOAL_UP_TO."""
    if group_size is None or group_size > GOAL_UP_TO:
        return "no goal"
    return verdict(GOAL / float(ratios.mean()), 1.0, spread=0.0)


def measure(documents: str, sigma: float, context: int, steps: int) -> list[Row]:
    """A row of the table for each group size."""
    packed = packed_rows(MEDIANS[documents], sigma, context, steps * GLOBAL_BATCH)
    table = []
    for group_size in GROUP_SIZES:
        costs = np.array([cost(row, group_size) for row in packed])
        ratios = compare(costs, steps)
        told = {
            f"{name} {what}": f"{value:.4f}"
            for name, values in ratios.items()
            for what, value in (("mean", values.mean()), ("p95", np.quantile(values, 0.95)))
        }
        shape = {"documents": documents, "context": context, "G": group_size or "none"}
        spread = {"spread of rows": f"{costs.std() / costs.mean():.4f}"}
        table.append({**shape, **spread, **told, "verdict": judge(ratios["ours"], group_size)})
    return table


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument(
        "--sigma", type=float, default=1.2, help="of the logarithm of a length: 1.2 is a mean of 2 medians"
    )
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/<date>-balance.json and .md")
    return parser.parse_args()


def main() -> int:
    """0 if the goal holds wherever there is one."""
    options = parse()
    table = [
        row
        for documents in MEDIANS
        for context in CONTEXTS
        for row in measure(documents, options.sigma, context, options.steps)
    ]
    facts = machine(
        "cpu",
        model="shapes of Llama 2 7B",
        workers=WORLD_SIZE,
        global_batch=GLOBAL_BATCH,
        steps=options.steps,
        sigma=options.sigma,
        operations_a_token=f"{operations_of_a_token():.4g}",
        goal=GOAL,
        limit=1,
    )
    print("\n".join(f"{name}: {value}" for name, value in facts.items()))
    print(as_table(table))
    if options.save:
        title = "Cost of the most expensive worker over the mean, a step"
        print(f"written to {save('balance', title, facts, table)}")
    return 0 if all(row["verdict"] != "FAIL" for row in table) else 1


if __name__ == "__main__":
    sys.exit(main())
