"""Is the worker's loop thin? Its steps against those of a bare DeepSpeed loop on the same batches, in the same workers.

    python benchmarks/loop.py                                             # the quickstart's model on two workers
    python benchmarks/loop.py --config configs/llama2-7b-32k-8xa100.yaml run.storage=/shared/benchmark

Both loops run in workers of Ray Train, each with its own engine, and take turns of some steps. Ours is what a run does
in a step: the feed, hashes of the tokens, exchange of the losses over the workers, ledger and MLflow. The bare loop has
its batches in memory, and does what DeepSpeed's examples do: `engine(…)`, `engine.backward(loss)`, `engine.step()`.
Bound: the median of the turns' ratios is at most 1.03.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import deepspeed
import ray
import torch
import torch.distributed as dist
from figures import as_table, machine, save
from ray.train.torch import TorchConfig
from ray.train.v2.api.config import RunConfig, ScalingConfig
from ray.train.v2.torch.torch_trainer import TorchTrainer

from longlora.segments import plan_segments
from pipeline.assignment import Assignment
from pipeline.capacity import check_resources
from pipeline.config import Config, ConfigError, load_config
from pipeline.engine import deepspeed_config, partitioned_loading
from pipeline.feed import Feed
from pipeline.models import build_model
from pipeline.optimizer import build_optimizer
from pipeline.packs import Packs, check_enough
from pipeline.prepare import prepare, wanted_packs
from pipeline.session import ray_session, uses_gpu
from pipeline.storage import storage_root
from pipeline.train_driver import start_run_log
from pipeline.train_loop import Worker

BOUND = 1.03


class BareLoop:
    """A DeepSpeed loop without anything around it."""

    def __init__(self, config: Config, micro_steps: int) -> None:
        partitioning = partitioned_loading(config)
        model = build_model(config)
        self.engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=[parameter for parameter in model.parameters() if parameter.requires_grad],
            optimizer=build_optimizer(model, config),
            config=deepspeed_config(config) | {"gradient_accumulation_steps": micro_steps},
            dist_init_required=False,
        )
        del partitioning
        self.group_size = config.attention.group_size

    def step(self, batches: list[Any]) -> None:
        for batch in batches:
            plan = plan_segments(batch.document_lengths, self.group_size).to(self.engine.device)
            summed = self.engine(
                input_ids=batch.input_ids, position_ids=batch.position_ids, targets=batch.targets, segment_plan=plan
            )
            self.engine.backward(summed / batch.target_tokens)
            self.engine.step()


def compare(settings: dict[str, Any]) -> list[dict[str, float]]:
    """What each worker runs. Returns seconds a step of both loops, a row for each round after the first."""
    assignment, turn = settings["assignment"], settings["turn"]
    worker = Worker(assignment)
    worker.restore()
    optimization = worker.config.optimization
    order = (worker.config.run.seed, optimization.global_batch, optimization.micro_batch)
    with Feed(worker.packs, *order, worker.world_size, worker.rank, worker.row_cost) as feed:
        batches = [[batch.to(worker.engine.device) for batch in feed.step(step)] for step in range(optimization.steps)]
    bare = BareLoop(worker.config, len(batches[0]))

    def ours(steps: range) -> None:
        for step in steps:
            worker.tell("step", worker.attempt, worker.train_step(step))
        if worker.rank == 0:
            ray.get(assignment.run_log.sync.remote())

    def theirs(steps: range) -> None:
        for step in steps:
            bare.step(batches[step])

    rounds = []
    for start in range(0, optimization.steps, turn):
        loops: list[tuple[str, Callable[[range], None]]] = [("ours", ours), ("bare", theirs)]
        if start // turn % 2:
            loops.reverse()
        rounds.append({name: seconds(loop, range(start, start + turn)) / turn for name, loop in loops})
    worker.close()
    return rounds[1:]


def seconds(loop: Callable[[range], None], steps: range) -> float:
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    dist.barrier()
    synchronize()
    start = time.perf_counter()
    loop(steps)
    synchronize()
    return time.perf_counter() - start


def measure(config: Config, turn: int) -> list[dict[str, float]]:
    """The rounds of both loops in workers of Ray Train."""
    wanted = wanted_packs(config)
    with ray_session(config):
        check_resources(config)
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
        print(f"timing {config.optimization.steps} steps of each loop, in turns of {turn}", flush=True)
        resources = {"CPU": config.workers.cpus, **({"GPU": 1} if gpu else {}), **config.workers.resources}
        trainer = TorchTrainer(
            compare,
            train_loop_config={"assignment": assignment, "turn": turn},
            torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
            scaling_config=ScalingConfig(num_workers=config.workers.max, use_gpu=gpu, resources_per_worker=resources),
            run_config=RunConfig(storage_path=str(folder / "ray")),
        )
        return trainer.fit().return_value


def judge(rounds: list[dict[str, float]]) -> tuple[float, str]:
    """The median of the rounds' ratios, and whether the bound holds."""
    ratio = statistics.median(row["ours"] / row["bare"] for row in rounds)
    return ratio, "PASS" if ratio <= BOUND else "FAIL"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", metavar="FILE", help="YAML file (default: configs/quickstart.yaml)")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--turn", type=int, default=3, help="steps that a loop makes before the other has its turn")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/<date>-loop.json and .md")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    return parser.parse_args()


def main() -> int:
    """0 if the bound holds."""
    options = parse()
    with tempfile.TemporaryDirectory() as scratch:
        ours = [
            *(f"run.storage={scratch}", "run.name=loop", "attention.full_last=0.0", "evaluation.every_steps=null"),
            *("optimization.warmup_steps=0", f"optimization.steps={(options.rounds + 1) * options.turn}"),
        ]
        try:
            config = load_config(options.config, [*ours, *options.overrides])
            rounds = measure(config, options.turn)
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    ratio, verdict = judge(rounds)
    facts = machine(
        "cuda" if torch.cuda.is_available() else "cpu",
        model=config.model.base or "random",
        tokens=config.context.length,
        workers=config.workers.max,
        zero_stage=config.workers.zero_stage,
        ratio=round(ratio, 4),
        bound=BOUND,
        verdict=verdict,
    )
    print("\n".join(f"{name}: {value}" for name, value in facts.items()))
    table = [
        {
            "ours_seconds": f"{row['ours']:.3f}",
            "bare_seconds": f"{row['bare']:.3f}",
            "ratio": f"{row['ours'] / row['bare']:.4f}",
        }
        for row in rounds
    ]
    print(as_table(table))
    if options.save:
        print(f"written to {save('loop', 'Step time of the loop over that of a bare DeepSpeed loop', facts, table)}")
    return 0 if verdict == "PASS" else 1


if __name__ == "__main__":
    sys.exit(main())
