"""How long does a run stand still when a worker or a node is lost, and where does the time go?

    python benchmarks/recovery.py --save              # about half an hour on two quiet cores
    python benchmarks/recovery.py --rounds 1 --questions worker node

Three questions, each against a cold start of the same run in the same round, on packs that are there:

    worker     a worker is killed: seconds to the next step, at most 1.15 × a cold start of the training stage
    node       a node of a cluster is switched off: each phase; detect and schedule at most 30 s together, and from the
               start of a worker's process to its first step at most 1.15 × the same of a cold start
    position   resuming at step 10,000 takes at most 1.2 × as long as at step 10

A cold start of the training stage counts from the moment when the driver turns to training: not the start of Python, of
Ray, or of the driver's own imports. The table has the whole command beside it.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
import transformers
from figures import as_table, machine, save
from spot_cluster import SLOT, DisturbedRun, SpotCluster, send, workers_of
from upath import UPath

from pipeline.config import load_config
from pipeline.ledger import StepRecord, read_ledger
from pipeline.timeline import recoveries

WORKER_BOUND, NODE_BOUND_S, PROCESS_BOUND, POSITION_BOUND = 1.15, 30.0, 1.15, 1.2
FAR = 10_000
QUESTIONS = ("worker", "node", "position")
ONE_LAYER = {
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


@dataclass
class Figures:
    """Seconds, a value a round."""

    command: list[float] = field(default_factory=list)
    """Command → first step of a run that starts for the first time."""
    cold: list[float] = field(default_factory=list)
    """Driver turns to training → first step."""
    cold_process: list[float] = field(default_factory=list)
    """Start of the last worker's process → first step, of the same start."""
    worker: list[float] = field(default_factory=list)
    """Worker killed → next step."""
    node: list[dict[str, float]] = field(default_factory=list)
    """Node killed: each phase, and from the start of the last worker's process to the next step."""


def quickstart(scratch: Path, name: str, workers: int, **more: Any) -> DisturbedRun:
    """The quickstart's model at 1024 tokens, as long as it takes."""
    overrides = [f"{key.replace('__', '.')}={value}" for key, value in more.items()]
    return made(scratch, name, workers, [
        *("context.length=1024", "attention.group_size=256", "evaluation.lengths=[]", "optimization.global_batch=4"),
        *("optimization.steps=100000", "checkpoint.every_steps=5", *overrides),
    ])  # fmt: skip


def one_layer(scratch: Path, name: str, steps: int) -> DisturbedRun:
    """A model so small that it gets to step 10,000 in minutes."""
    return made(scratch, name, 1, [
        *(f"model.architecture={ONE_LAYER}", "model.base=null", "model.tokenizer=examples/tiny-llama"),
        *("context.length=32", "attention.group_size=16", "evaluation.lengths=[]", "optimization.global_batch=1"),
        *(f"optimization.steps={steps}", "checkpoint.every_steps=1000", "optimization.warmup_steps=1"),
        "run.allow_config_change=[optimization.steps]",
    ])  # fmt: skip


def made(scratch: Path, name: str, workers: int, overrides: list[str]) -> DisturbedRun:
    common = [
        *(f"run.name={name}", f"run.storage={scratch}/runs", f"tracking.uri=sqlite:///{scratch}/mlflow.db"),
        *("evaluation.every_steps=null", f"workers.min={workers}", f"workers.max={workers}", "workers.max_failures=-1"),
    ]
    config = load_config(None, [*common, *overrides])
    path = scratch / f"{name}.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    return DisturbedRun(path, UPath(scratch) / "runs" / name)


def cold_start(run: DisturbedRun, figures: Figures, workers: int) -> None:
    """Starts a new run; adds the seconds to its first step."""
    began = time.time()
    run.start()
    run.wait_for("the first step", lambda: run.trains(workers))
    process = last_process()
    lines = run.newest()[1]
    first = next(line.time for line in lines if isinstance(line, StepRecord))
    figures.command.append(first - began)
    figures.cold.append(first - next(line.time for line in lines if line.event == "driver"))
    figures.cold_process.append(first - process)


def last_process() -> float:
    """When the youngest worker's process started."""
    return max(process.create_time() for process in workers_of())


def next_step(run: DisturbedRun, since_attempt: int, workers: int) -> float:
    """When the first step of the attempt after `since_attempt` was done, which is waited for."""
    run.wait_for("the next step", lambda: run.attempt() > since_attempt and run.trains(workers))
    return next(line.time for line in run.newest()[1] if isinstance(line, StepRecord))


def worker_rounds(scratch: Path, rounds: int) -> Figures:
    """Cold starts on two workers, and a killed worker after each."""
    figures = Figures()
    for number in range(rounds):
        run = quickstart(scratch, f"worker-{number}", 2)
        cold_start(run, figures, 2)
        run.wait_for("a checkpoint", lambda run=run: bool(run.events("checkpoint")))
        attempt, killed = run.attempt(), time.time()
        send(workers_of()[:1], psutil.signal.SIGKILL)
        figures.worker.append(next_step(run, attempt, 2) - killed)
        run.kill_driver()
        print(f"worker: cold {figures.cold[-1]:.1f} s, after a kill {figures.worker[-1]:.1f} s", flush=True)
    return figures


def node_rounds(scratch: Path, rounds: int) -> Figures:
    """A cold start on one worker of a cluster; then, again and again, a node comes and one of the two is lost."""
    figures = Figures()
    with SpotCluster() as cluster:
        cluster.add()
        run = quickstart(scratch, "node", 1, workers__max=2, workers__resources=SLOT, workers__resize_interval_s=2)
        run.environment["RAY_ADDRESS"] = cluster.address
        cold_start(run, figures, 1)
        for _ in range(rounds):
            cluster.add()
            run.wait_for("two workers", lambda: run.trains(2, 3))
            attempt, killed = run.attempt(), time.time()
            cluster.remove(cluster.nodes[0])
            first = next_step(run, attempt, 1)
            phases = recoveries([line for _, line in read_ledger(run.folder)])[-1]
            figures.node.append(
                {
                    "detect": first - killed - phases.schedule - phases.restore - phases.first_step,
                    "schedule": phases.schedule,
                    "restore": phases.restore,
                    "first step": phases.first_step,
                    "all": first - killed,
                    "process start → first step": first - last_process(),
                }
            )
            print(
                "node: " + ", ".join(f"{name} {seconds:.1f}" for name, seconds in figures.node[-1].items()), flush=True
            )
        run.kill_driver()
    return figures


def position_rounds(scratch: Path, rounds: int) -> list[dict[str, float]]:
    """Seconds from the driver's turn to training to the first step, resumed at step 10 and at step 10,000 in turns."""
    trained = {}
    for step in (10, FAR):
        run = one_layer(scratch, f"to-{step}", step)
        run.start()
        run.finish(timeout_s=3600)
        trained[step] = run.folder
    print(f"position: trained {FAR:,} steps", flush=True)
    rows = []
    for number in range(rounds):
        row = {}
        for step, folder in sorted(trained.items(), reverse=bool(number % 2)):
            run = one_layer(scratch, f"from-{step}-{number}", 2 * FAR)
            shutil.copytree(folder, run.folder)
            run.start()
            run.wait_for("the next step", lambda run=run: run.attempt() > 1 and run.trains(1))
            lines = run.newest()[1]
            first = next(line for line in lines if isinstance(line, StepRecord))
            if first.step != step:
                raise RuntimeError(f"resumed at step {first.step} instead of {step}")
            row[str(step)] = first.time - next(line.time for line in lines if line.event == "driver")
            run.kill_driver()
        rows.append(row)
        print(f"position: {row}", flush=True)
    return rows


def quantiles(values: Sequence[float]) -> tuple[float, float]:
    """p50 and p95."""
    return float(np.percentile(values, 50)), float(np.percentile(values, 95))


def judge(on_workers: Figures, on_nodes: Figures, positions: list[dict[str, float]]) -> list[dict[str, Any]]:
    """A row for each bound of what was measured."""
    median = statistics.median
    checks: list[tuple[str, float, float]] = []
    if on_workers.worker:
        killed = median(on_workers.worker) / median(on_workers.cold)
        checks.append(("worker killed → next step ÷ cold start of the training stage", killed, WORKER_BOUND))
    if on_nodes.node:
        scheduled = quantiles([row["detect"] + row["schedule"] for row in on_nodes.node])[1]
        again = median(row["process start → first step"] for row in on_nodes.node) / median(on_nodes.cold_process)
        checks.append(("node lost: detect + schedule, p95, seconds", scheduled, NODE_BOUND_S))
        checks.append(("node lost: process start → first step ÷ cold", again, PROCESS_BOUND))
    if positions:
        far = median(row[str(FAR)] / row["10"] for row in positions)
        checks.append((f"resume at step {FAR:,} ÷ at step 10", far, POSITION_BOUND))
    return [
        {"what": what, "measured": f"{value:.2f}", "bound": bound, "verdict": "PASS" if value <= bound else "FAIL"}
        for what, value, bound in checks
    ]


def phases(on_workers: Figures, on_nodes: Figures, positions: list[dict[str, float]]) -> dict[str, str]:
    """p50 and p95 of everything that was timed, for the head of the report."""
    timed = {
        "command → first step": on_workers.command,
        "training stage → first step, two workers": on_workers.cold,
        "worker killed → next step": on_workers.worker,
        **{f"node lost: {name}": [row[name] for row in on_nodes.node] for name in (on_nodes.node or [{}])[0]},
        "resume at step 10": [row["10"] for row in positions],
        f"resume at step {FAR:,}": [row[str(FAR)] for row in positions],
    }
    return {
        f"{name} (s)": f"p50 {quantiles(values)[0]:.1f}, p95 {quantiles(values)[1]:.1f}, of {len(values)}"
        for name, values in timed.items()
        if values
    }


def main() -> int:
    """0 if every bound holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--questions", nargs="+", choices=QUESTIONS, default=list(QUESTIONS))
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/<date>-recovery.json and .md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="recovery-") as folder:
        scratch, asked = Path(folder), options.questions
        on_workers = worker_rounds(scratch, options.rounds) if "worker" in asked else Figures()
        on_nodes = node_rounds(scratch, 2 * options.rounds) if "node" in asked else Figures()
        positions = position_rounds(scratch, options.rounds) if "position" in asked else []
    timed = phases(on_workers, on_nodes, positions)
    facts = machine("cpu", ray=ray.__version__, transformers=transformers.__version__, **timed)
    rows = judge(on_workers, on_nodes, positions)
    print("\n".join(f"{name}: {value}" for name, value in facts.items()))
    print(as_table(rows))
    if options.save:
        name = "-".join(["recovery", *(asked if len(asked) < len(QUESTIONS) else [])])
        print(f"written to {save(name, 'Recovery: workers, nodes, and the position in a run', facts, rows)}")
    return 0 if all(row["verdict"] == "PASS" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
