"""Do runs differ in how they use a long context? Their newest checkpoints on the same blocks of held-out text.

    python benchmarks/context_use.py ~/longlora/s2-then-full ~/longlora/full-attention ~/longlora/s2-alone --save

Each run is one line a context: the loss on the blocks, and its paired difference to the shortest context with a 95 %
interval, as in `evaluation/context_use.json`. Train the runs on equal data for equally many steps, differing in
`attention` alone (`attention.group_size=null` for full attention, `attention.full_last` for the finish), and the
difference between lines is what S²-Attn costs in use of context.
"""

import argparse
import os
import sys
import time
from typing import Any

import torch
from figures import machine, save
from rich.console import Console
from upath import UPath

from pipeline.config import ConfigError
from pipeline.evaluation import context_use_of
from pipeline.evaluation_report import context_table
from pipeline.run_config import run_config


def main() -> int:
    options = parse()
    runs = [UPath(os.path.abspath(os.path.expanduser(run)) if "://" not in run else run) for run in options.runs]
    try:
        report = compare(runs, options.blocks)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    Console().print(context_table(report["rows"], report["blocks"], report["block_tokens"]))
    if options.save:
        facts = machine(
            "cuda" if torch.cuda.is_available() else "cpu",
            blocks=report["blocks"],
            block_tokens=report["block_tokens"],
        )
        print(f"written to {save('context-use', 'Loss with more context, on the same blocks', facts, report['rows'])}")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder: <run.storage>/<run.name>")
    parser.add_argument("--blocks", type=int, default=200, help="target blocks of 256 tokens (default: 200)")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/<date>-context-use.json")
    return parser.parse_args()


def compare(runs: list[UPath], blocks: int) -> dict[str, Any]:
    """The rows of all runs, on the same blocks; ConfigError if the runs do not have the same ones."""
    measured_on = {}
    for run in runs:
        config = run_config(run)
        tests = (
            config.data.validation,
            config.model.tokenizer_source,
            config.evaluation.lengths,
            config.context.length,
        )
        measured_on[str(run)] = tests
        if tests != measured_on[str(runs[0])]:
            raise ConfigError(
                f"{run}: held-out documents, tokenizer, evaluation.lengths or context.length differ from those of "
                f"{runs[0]}: compare runs that agree in them"
            )
    reports = []
    for run in runs:
        started = time.monotonic()
        reports.append(context_use_of(run, blocks))
        print(f"{run.name}: {time.monotonic() - started:.0f} s", flush=True)
    return {**reports[0], "rows": [row for report in reports for row in report["rows"]]}


if __name__ == "__main__":
    sys.exit(main())
