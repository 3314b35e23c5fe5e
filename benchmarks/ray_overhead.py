"""Does Ray Train cost a step anything, and do two workers train twice as fast as one?

    python benchmarks/ray_overhead.py --save        # about a quarter of an hour on two quiet cores

The loop is always the same: the quickstart's model in the project's TrainingEngine (DeepSpeed ZeRO-2, gloo), random
tokens, four rows a step, a thread a worker, the losses exchanged over the workers. It is started in five ways, each
anew in every round, in an order that turns round with each:

    torchrun   two workers of `python -m torch.distributed.run`, with two rows each and nothing of Ray on the machine
    ray        two workers of Ray Train's TorchTrainer, in a Ray of its own, as `pipeline/session.py` starts it
    one        one worker of Ray Train, with all four rows
    alone      the same worker under torchrun
    apart      two processes with two rows each that exchange nothing: what the machine itself gives for two workers

A start's step time is the median over its steps after the first ones, in which processes of Ray still start beside it,
on the slower worker; a ratio is the median over the rounds. Losses are compared first: torchrun, ray, one and
alone must agree to 10⁻⁵, step by step; and the processes must have the same priority.

Ratio 1: ray over torchrun, step time. Goal: at most 1.03. Limit: 1 where Ray's own processes have cores of their own.
Where the workers fill the machine these take their time from them: their share is measured, the machine's busy time
less the workers' (in which Ray's threads count as theirs), and with it the ratio to be expected of workers that never
wait. One over alone is the ratio with a core free.
Ratio 2: one over ray, step time (both train the same rows). Goal: at least 1.8. Limit: 2, or what `apart` reaches.
Seconds from the command to the end of the first step stand beside them; no goal is set for them.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.config import REPOSITORY, load_config, parse_config
from pipeline.session import TRAIN_SETTINGS, ray_session, worker_environment

OVERHEAD_GOAL, SCALING_GOAL, TOLERANCE = 1.03, 1.8, 1e-5
ROWS = 4
CONTENDERS = ("torchrun", "ray", "one", "alone", "apart")
CHECKED_STEPS = 5
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
Round = dict[str, dict[str, Any]]


def work(settings: dict[str, Any]) -> None:
    """What each worker runs, whoever started it. Its losses and seconds go into a file."""
    import numpy as np
    import torch
    import torch.distributed as dist

    sys.modules.setdefault("mlflow", None)  # DeepSpeed's autotuner would import it, as in pipeline/train_worker.py
    from pipeline.engine import TrainingEngine
    from pipeline.feed import collate
    from pipeline.models import build_model
    from pipeline.optimizer import build_optimizer
    from pipeline.order import share
    from pipeline.packs import Row

    torch.set_num_threads(1)
    config = parse_config(settings["config"])
    torch.manual_seed(config.run.seed)
    model = build_model(config)
    engine = TrainingEngine(model, build_optimizer(model, config), config)
    length, group_size = config.context.length, config.attention.group_size
    rank, [first, last] = dist.get_rank(), settings["rows"]
    mine = share(last - first, dist.get_world_size(), rank)
    random = np.random.default_rng(config.run.seed)
    tokens = random.integers(2, 2048, (settings["steps"], ROWS, length), dtype=np.int32)
    targets = (last - first) * (length - 1)
    out = Path(settings["out"])
    (out / f"{first}-{rank}.ready").touch()
    while len(list(out.glob("*.ready"))) < settings["processes"]:
        time.sleep(0.01)
    seconds, losses, ended = [], [], []
    for step in range(settings["steps"]):
        if step == settings["warm_up"]:
            before = busy_seconds(), time.process_time(), time.perf_counter()
        rows = [Row(tokens[step, first + row], (length,), ("",)) for row in mine]
        batches = [collate([row], [0], [0]) for row in rows]
        start = time.perf_counter()
        summed = torch.tensor(sum(engine.accumulate(batches, group_size, targets).losses), dtype=torch.float64)
        dist.all_reduce(summed)
        engine.apply(config.optimization.learning_rate)
        seconds.append(time.perf_counter() - start)
        losses.append(float(summed) / targets)
        ended.append(time.time())
    busy, own, elapsed = (
        now - then for now, then in zip((busy_seconds(), time.process_time(), time.perf_counter()), before, strict=True)
    )
    told = {
        "seconds": seconds,
        "losses": losses,
        "first_step": ended[0],
        "priority": os.getpriority(os.PRIO_PROCESS, 0),
        "busy": busy / elapsed,
        "own": own / elapsed,
    }
    (out / f"{first}-{rank}.json").write_text(json.dumps(told), encoding="utf-8")


def busy_seconds() -> float:
    """Processor seconds that all processes of the machine have taken."""
    import psutil

    times = psutil.cpu_times()
    return times.user + times.nice + times.system


def under_torchrun(settings: dict[str, Any]) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    work(settings)
    dist.destroy_process_group()


def under_ray(settings: dict[str, Any]) -> None:
    from ray.train.torch import TorchConfig
    from ray.train.v2.api.config import RunConfig, ScalingConfig
    from ray.train.v2.torch.torch_trainer import TorchTrainer

    with ray_session(parse_config(settings["config"])):
        TorchTrainer(
            work,
            train_loop_config=settings,
            torch_config=TorchConfig(backend="gloo"),
            scaling_config=ScalingConfig(num_workers=settings["processes"], resources_per_worker={"CPU": 1}),
            run_config=RunConfig(storage_path=settings["out"]),
        ).fit()


def start(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Starts a contender and waits for its end. Returns seconds a step and to the first one, and the losses."""
    with tempfile.TemporaryDirectory() as out:
        this, processes = os.path.abspath(__file__), 1 if name in ("one", "alone") else 2
        parts = [[0, ROWS // 2], [ROWS // 2, ROWS]] if name == "apart" else [[0, ROWS]]
        launcher = [] if name in ("ray", "one") else [*TORCHRUN, str(processes // len(parts))]
        role = "under_ray" if name in ("ray", "one") else "under_torchrun"
        environment = {**os.environ, **TRAIN_SETTINGS, **worker_environment(2), "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
        begun, running = time.time(), []
        for number, rows in enumerate(parts):
            path = Path(out) / f"settings-{number}"
            path.write_text(json.dumps({**settings, "rows": rows, "processes": processes, "out": out}), "utf-8")
            command = [sys.executable, *launcher, this, "--role", role, "--settings", str(path)]
            log = (Path(out) / f"log-{number}").open("wb")
            running.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
        if any([process.wait() for process in running]):
            logs = "\n".join(path.read_text(errors="replace") for path in Path(out).glob("log-*"))
            raise SystemExit(f"{name} failed:\n{logs[-4000:]}")
        told = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path(out).glob("[0-9]-*.json"))]
    return {
        "step": max(statistics.median(worker["seconds"][settings["warm_up"] :]) for worker in told),
        "start": max(worker["first_step"] for worker in told) - begun,
        "losses": told[0]["losses"],
        "priority": told[0]["priority"],
        "others": told[0]["busy"] - sum(worker["own"] for worker in told),
    }


def check_same(starts: Mapping[str, Mapping[str, Any]]) -> float:
    """The largest relative difference of a step's loss to that of torchrun; ends the benchmark if it is too large."""
    reference = starts["torchrun"]["losses"]
    largest = 0.0
    for name in ("ray", "one", "alone"):
        if starts[name]["priority"] != starts["torchrun"]["priority"]:
            raise SystemExit(f"{name} runs at priority {starts[name]['priority']}, torchrun's workers do not")
        for step, (loss, wanted) in enumerate(zip(starts[name]["losses"], reference, strict=True)):
            difference = abs(loss - wanted) / abs(wanted)
            if not math.isfinite(loss) or difference > TOLERANCE:
                raise SystemExit(f"step {step}: {name} has a loss of {loss!r}, torchrun of {wanted!r}")
            largest = max(largest, difference)
    return largest


def judge(rounds: Sequence[Round], cores: int) -> dict[str, Any]:
    """Both ratios, their spread (median absolute deviation, relative), and whether the goals are met."""
    from figures import verdict

    steps = [{name: started["step"] for name, started in one_round.items()} for one_round in rounds]
    overhead, overhead_spread = middle([row["ray"] / row["torchrun"] for row in steps])
    scaling, scaling_spread = middle([row["one"] / row["ray"] for row in steps])
    machines, _ = middle([row["one"] / row["apart"] for row in steps])
    plain, _ = middle([row["alone"] / row["torchrun"] for row in steps])
    with_room, with_room_spread = middle([row["one"] / row["alone"] for row in steps])
    rays, _ = middle([row["ray"]["others"] - row["torchrun"]["others"] for row in rounds])
    return {
        "ray_over_torchrun": round(overhead, 4),
        "spread of it": f"{overhead_spread:.1%}",
        "goal 1": f"at most {OVERHEAD_GOAL}",
        "verdict 1": verdict(OVERHEAD_GOAL / overhead, 1.0, overhead_spread),
        "cores that Ray's own processes take": round(rays, 3),
        "ratio to be expected of that": round(2 / min(2, cores - rays), 3),
        "one_over_alone": round(with_room, 4),
        "spread of that ratio": f"{with_room_spread:.1%}",
        "scaling": round(scaling, 3),
        "spread of that": f"{scaling_spread:.1%}",
        "goal 2": f"at least {SCALING_GOAL}",
        "verdict 2": verdict(scaling, SCALING_GOAL, scaling_spread),
        "scaling under torchrun": round(plain, 3),
        "scaling without exchange": round(machines, 3),
    }


def middle(ratios: Sequence[float]) -> tuple[float, float]:
    """Median, and the median absolute deviation over it."""
    median = statistics.median(ratios)
    return median, statistics.median(abs(ratio - median) for ratio in ratios) / median


def measure(options: argparse.Namespace) -> tuple[list[Round], float]:
    """The rounds, after a short start of each contender for its losses; and the losses' largest difference."""
    overrides = [f"context.length={options.tokens}", f"attention.group_size={options.tokens // 4}"]
    more = ["attention.full_last=0.0", f"optimization.global_batch={ROWS}", "evaluation.lengths=[]"]
    config = load_config(None, [*overrides, *more]).model_dump(mode="json")
    settings = {"config": config, "warm_up": 0, "steps": CHECKED_STEPS}
    difference = check_same({name: start(name, settings) for name in CONTENDERS if name != "apart"})
    print(f"losses agree to {difference:.1e}", flush=True)
    settings |= {"warm_up": options.warm_up, "steps": options.warm_up + options.steps}
    rounds: list[Round] = []
    for number in range(options.rounds):
        order = CONTENDERS if number % 2 == 0 else CONTENDERS[::-1]
        rounds.append({name: start(name, settings) for name in order})
        print({name: round(rounds[-1][name]["step"], 4) for name in CONTENDERS}, flush=True)
    return rounds, difference


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20, help="timed steps of a start")
    parser.add_argument("--warm-up", type=int, default=20, help="steps before them")
    parser.add_argument("--tokens", type=int, default=1024, help="of a row")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/<date>-ray-overhead.json and .md")
    parser.add_argument("--role", choices=["under_torchrun", "under_ray"], help=argparse.SUPPRESS)
    parser.add_argument("--settings", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """0 if both goals are met."""
    options = parse()
    if options.role:
        globals()[options.role](json.loads(Path(options.settings).read_text(encoding="utf-8")))
        return 0
    from figures import as_table, machine, save  # not at the top: workers of torchrun read this file as well

    load = f"{os.getloadavg()[0]:.1f}"
    rounds, difference = measure(options)
    judged = judge(rounds, os.cpu_count() or 1)
    facts = machine(
        "cpu",
        model="examples/tiny-llama",
        rows=f"{ROWS} x {options.tokens} tokens a step",
        threads_of_a_worker=1,
        steps=options.steps,
        largest_difference_of_losses=f"{difference:.1e}",
        **judged,
    ) | {"load average": f"{load} before"}
    table = [
        {f"{name} {what}": f"{row[name][key]:.{digits}f}" for what, key, digits in COLUMNS for name in CONTENDERS}
        for row in rounds
    ]
    print("\n".join(f"{name}: {value}" for name, value in facts.items()))
    print(as_table(table))
    if options.save:
        title = "Step time under Ray Train and under torchrun, with two workers and with one"
        print(f"written to {save('ray-overhead', title, facts, table)}")
    return 0 if judged["verdict 1"] == judged["verdict 2"] == "PASS" else 1


COLUMNS = (("seconds a step", "step", 4), ("seconds to the first", "start", 1))


if __name__ == "__main__":
    sys.exit(main())
