"""What does logging cost a step? The time that a worker's steps wait for the run's log, over the time of the steps.

    python benchmarks/logging_cost.py                                     # the quickstart's model on two workers
    python benchmarks/logging_cost.py tracking.uri=http://127.0.0.1:9     # MLflow is down

The loop is that of a run, in workers of Ray Train, with validation and checkpoints left out. In the first worker, which
speaks for all, each call to the run's log is timed, and each answer of it that is waited for: the step's record, and
whether a checkpoint is asked for, an answer that comes from the process that writes the ledger and feeds MLflow. The
other workers wait for the first one in the same exchange, not in addition. That process also uses CPU time, told beside
the ratio, most of it once, to import MLflow: it delays a step only where no CPU is idle.
Bound: 1 % of the steps' time.
"""

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import psutil
import ray
import torch
from figures import as_table, machine, save
from ray.train.torch import TorchConfig
from ray.train.v2.api.config import RunConfig, ScalingConfig
from ray.train.v2.torch.torch_trainer import TorchTrainer

from pipeline import train_loop
from pipeline.assignment import Assignment
from pipeline.config import Config, ConfigError, load_config
from pipeline.packs import Packs, check_enough
from pipeline.prepare import prepare, wanted_packs
from pipeline.session import ray_session, uses_gpu
from pipeline.storage import storage_root
from pipeline.system_metrics import sampling
from pipeline.train_driver import start_run_log
from pipeline.train_loop import Worker

BOUND = 0.01
WARM_UP = 3
"""First steps, which are not counted: what is loaded and compiled in them makes them long."""


class Timed:
    """The handle of the run's log, with the time that its caller spends in calls added up."""

    def __init__(self, run_log: Any) -> None:
        self.run_log, self.seconds = run_log, 0.0

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=lambda *values: self.timed(getattr(self.run_log, method).remote, *values))

    def timed(self, call: Any, *values: Any) -> Any:
        start = time.perf_counter()
        try:
            return call(*values)
        finally:
            self.seconds += time.perf_counter() - start


def steps_of_a_run(settings: dict[str, Any]) -> list[dict[str, float]]:
    """What each worker runs. Returns the first one's seconds of each step, and of those in waiting for the log."""
    run_log = settings["assignment"].run_log
    timed = Timed(run_log)
    worker = Worker(replace(settings["assignment"], run_log=timed))
    worker.restore()
    train_loop.ray = SimpleNamespace(get=lambda answer: timed.timed(ray.get, answer))  # type: ignore[attr-defined]
    rows = []
    with sampling(run_log, worker.attempt):
        for step in range(worker.config.optimization.steps):
            timed.seconds, start = 0.0, time.perf_counter()
            worker.tell("step", worker.attempt, worker.train_step(step))
            rows.append({"seconds": time.perf_counter() - start, "waited": timed.seconds})
    train_loop.ray = ray  # type: ignore[attr-defined]
    worker.close()
    return rows


def measure(config: Config) -> tuple[list[dict[str, float]], float]:
    """The steps after the warm-up, and the CPU seconds of the log's process, over all of the run."""
    wanted = wanted_packs(config)
    with ray_session(config):
        packs = prepare(config, wanted)
        check_enough(Packs.open(packs.train), config.optimization.global_batch)
        folder, gpu = storage_root(config) / config.run.name, uses_gpu(config)
        run_log = start_run_log(config, folder)
        assignment = Assignment(
            config=config.model_dump(mode="json"),
            run_folder=str(folder),
            train_packs=str(packs.train),
            validation_packs=None,
            base_fingerprint="not compared",
            run_log=run_log,
        )
        resources = {"CPU": config.workers.cpus, **({"GPU": 1} if gpu else {}), **config.workers.resources}
        trainer = TorchTrainer(
            steps_of_a_run,
            train_loop_config={"assignment": assignment},
            torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
            scaling_config=ScalingConfig(num_workers=config.workers.max, use_gpu=gpu, resources_per_worker=resources),
            run_config=RunConfig(storage_path=str(folder / "ray")),
        )
        rows = trainer.fit().return_value
        undelivered = ray.get(run_log.close.remote("FINISHED"))
        if undelivered:
            print(undelivered)
        return rows[WARM_UP:], cpu_seconds_of_the_log()


def cpu_seconds_of_the_log() -> float:
    """Of the process of this driver's RunLog, since it was started."""
    ours = {child.pid for child in psutil.Process().children(recursive=True)}
    running = [process for process in psutil.process_iter(["cmdline"]) if process.pid in ours]
    # One that has ended has no command line.
    [log] = [process for process in running if "".join(process.info["cmdline"] or ()).startswith("ray::RunLog")]
    used = log.cpu_times()
    return used.user + used.system


def judge(rows: list[dict[str, float]]) -> tuple[float, str]:
    """The share of the steps' time that they wait for the log, and whether the bound holds."""
    ratio = sum(row["waited"] for row in rows) / sum(row["seconds"] for row in rows)
    return ratio, "PASS" if ratio <= BOUND else "FAIL"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", metavar="FILE", help="YAML file (default: configs/quickstart.yaml)")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/<date>-logging-cost.json and .md")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    return parser.parse_args()


def main() -> int:
    """0 if the bound holds."""
    options = parse()
    with tempfile.TemporaryDirectory() as scratch:
        ours = [
            *(f"run.storage={scratch}", "run.name=logging-cost", "evaluation.every_steps=null"),
            *("optimization.warmup_steps=0", f"optimization.steps={options.steps}"),
        ]
        try:
            config = load_config(options.config, [*ours, *options.overrides])
            rows, cpu_seconds = measure(config)
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    ratio, verdict = judge(rows)
    facts = machine(
        "cuda" if torch.cuda.is_available() else "cpu",
        model=config.model.base or "random",
        tokens=config.context.length,
        workers=config.workers.max,
        tracking=config.tracking.uri or "a SQLite file",
        cpu_seconds_of_the_log=round(cpu_seconds, 1),
        median_wait_ms=round(1000 * statistics.median(row["waited"] for row in rows), 2),
        ratio=round(ratio, 5),
        bound=BOUND,
        verdict=verdict,
    )
    print("\n".join(f"{name}: {value}" for name, value in facts.items()))
    table = [
        {
            "step": number + WARM_UP,
            "seconds": f"{row['seconds']:.3f}",
            "waited_ms": f"{1000 * row['waited']:.2f}",
            "share": f"{row['waited'] / row['seconds']:.5f}",
        }
        for number, row in enumerate(rows)
    ]
    print(as_table(table))
    if options.save:
        title = "Time that steps wait for the run's log, over the time of the steps"
        print(f"written to {save('logging-cost', title, facts, table)}")
    return 0 if verdict == "PASS" else 1


if __name__ == "__main__":
    sys.exit(main())
