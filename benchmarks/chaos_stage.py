"""What befalls a run in `chaos.py`: each disturbance does one thing, from outside, to the real processes."""

import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psutil
import yaml
from object_store import ObjectStore, object_store
from spot_cluster import SLOT, DisturbedRun, RunEnded, SpotCluster, raylet_pid, send, workers_of
from upath import UPath

from pipeline.config import load_config
from pipeline.ledger import Event

STEPS_EACH = 10
"""Steps of a run for each disturbance."""
HANG_TIMEOUT_S = 10
CHECKPOINT_EVERY = 10
NOTICE_S = 8


@dataclass(frozen=True)
class Disturbance:
    kind: str
    time: float
    step: int
    recovered: float
    """Seconds until a step was trained by workers that started after it; 0 if none had to start."""


def settings(scratch: Path, name: str, steps: int, sizes: list[int]) -> dict[str, Any]:
    """The quickstart's model and books at a context of 768 tokens, on any of these numbers of workers."""
    config = load_config(
        None,
        [
            *(f"run.name={name}", f"run.storage={scratch}/runs", f"tracking.uri=sqlite:///{scratch}/mlflow.db"),
            *(
                "context.length=1024",
                "attention.group_size=256",
                "evaluation.every_steps=null",
                "evaluation.lengths=[]",
            ),
            *(f"optimization.steps={steps}", "optimization.global_batch=3", "optimization.learning_rate=2e-4"),
            *(f"workers.min={min(sizes)}", f"workers.max={max(sizes)}", "workers.resize_interval_s=2"),
            *(f"workers.hang_timeout_s={HANG_TIMEOUT_S}", "workers.max_failures=-1"),
            *(f"checkpoint.every_steps={CHECKPOINT_EVERY}", "checkpoint.keep_best=0"),
        ],
    )
    return config.model_dump(mode="json")


def undisturbed(scratch: Path, steps: int, size: int) -> DisturbedRun:
    """A run on `size` workers to its end, in a Ray of its own."""
    name = f"undisturbed-{size}"
    run = _run(scratch, settings(scratch, name, steps, [size]))
    run.start()
    run.finish(timeout_s=3600)
    return run


def _run(scratch: Path, values: dict[str, Any]) -> DisturbedRun:
    path = scratch / f"{values['run']['name']}.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return DisturbedRun(path, UPath(values["run"]["storage"]) / values["run"]["name"])


class Stage:
    """A run in training, and what there is to disturb around it."""

    def __init__(self, scenario: str, scratch: Path, values: dict[str, Any]) -> None:
        self.scenario, self.scratch, self.values = scenario, scratch, values
        self.most = values["workers"]["max"]
        self.cluster: SpotCluster | None = None
        self.store: ObjectStore | None = None
        self._exit = ExitStack()

    def __enter__(self) -> Self:
        if self.scenario == "elastic":
            self.cluster = self._exit.enter_context(SpotCluster())
            for _ in range(self.values["workers"]["max"]):
                self.cluster.add()
            self.values["workers"]["resources"] = SLOT
        if self.scenario == "s3":
            self.store = self._exit.enter_context(object_store())
            os.environ.update(self.store.environment)  # the driver's, and ours: the ledger is read there
            self.values["run"]["storage"] = f"s3://{self.store.bucket}/runs"
        self.run = _run(self.scratch, self.values)
        return self

    def __exit__(self, *_: object) -> None:
        if self.run.driver is not None and self.run.driver.poll() is None:
            self.run.kill_driver()
        self._exit.close()

    @property
    def workers(self) -> int:
        """How many workers the run should have now."""
        return min(self.most, len(self.cluster.nodes)) if self.cluster else self.most

    def start(self) -> None:
        """The command of the run, the first time or again."""
        self.run.environment.update({"RAY_ADDRESS": self.cluster.address} if self.cluster else {})
        self.run.start(f"workers.max={self.most}")


def kill_worker(stage: Stage) -> float:
    send([random.choice(workers_of())], signal.SIGKILL)
    return time.time()


def stop_worker(stage: Stage) -> float:
    """SIGSTOP: the process is there, and says nothing. Continued when it has been given up, it must do no harm."""
    stopped = random.choice(workers_of())
    attempt, began = stage.run.attempt(), time.time()
    send([stopped], signal.SIGSTOP)
    stage.run.wait_for("its loss", lambda: stage.run.attempt() > attempt)
    send([stopped], signal.SIGCONT)
    return began


def kill_driver(stage: Stage) -> float:
    began = time.time()
    stage.run.kill_driver()
    stage.start()
    return began


def kill_in_commit(stage: Stage) -> float:
    """Kills a worker while a checkpoint has files, and no manifest yet."""
    saving: list[str] = []
    while not saving:
        assert stage.run.driver is not None and stage.run.driver.poll() is None, stage.run.tail()
        saving = _uncommitted(stage.run.folder)
        time.sleep(0.002)  # a commit takes a tenth of a second
    send([random.choice(workers_of())], signal.SIGKILL)
    return time.time()


def second_driver(stage: Stage) -> None:
    """The same command while the first one works: it must be refused, and name the holder."""
    second = DisturbedRun(stage.run.config, stage.run.folder, **stage.run.environment)
    second.output = stage.scratch / "second.log"
    second.output.unlink(missing_ok=True)
    code = second.start().wait(timeout=300)
    if code != 2 or "is working on this run" not in second.tail():
        raise RuntimeError(f"a second driver ended with {code}: {second.tail()}")


def terminate_worker(stage: Stage) -> None:
    """SIGTERM on one rank: a notice. All save the same step, and go on."""
    noticed = len(stage.run.events("notice"))
    send([random.choice(workers_of())], signal.SIGTERM)
    stage.run.wait_for("a notice", lambda: len(stage.run.events("notice")) > noticed)
    stage.run.wait_for("its checkpoint", lambda: _saved_since_the_notice(stage))


def refuse_writes(stage: Stage) -> float:
    """The workers' files may not grow beyond 64 KiB: the next checkpoint fails with EFBIG, from the kernel."""
    # Without a checkpoint since the last time, the same error would come twice in a row, which rightly ends a run.
    stage.run.wait_for("a checkpoint of these workers", lambda: bool(stage.run.events("checkpoint")))
    attempt, began = stage.run.attempt(), time.time()
    for worker in workers_of():
        with suppress(psutil.NoSuchProcess):
            worker.rlimit(psutil.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))
    stage.run.wait_for("a failed checkpoint", lambda: stage.run.attempt() > attempt)
    return began


def lose_store(stage: Stage) -> None:
    """The S3 server answers nothing for some seconds: requests are repeated, training goes on."""
    assert stage.store is not None
    stage.store.pause()
    time.sleep(random.uniform(5, 20))
    stage.store.resume()


def slow_down(stage: Stage) -> None:
    """The S3 server answers 503 SlowDown to the next writes."""
    assert stage.store is not None
    stage.store.fail(method="PUT", times=random.randint(1, 4))


def give_notice(stage: Stage) -> float:
    """A node is to leave; it is switched off at the deadline."""
    assert stage.cluster is not None
    node = random.choice(_busy_nodes(stage.cluster))
    stage.cluster.give_notice(node, NOTICE_S)
    time.sleep(NOTICE_S)
    began = time.time()
    stage.cluster.remove(node)
    return began


def kill_node(stage: Stage) -> float:
    assert stage.cluster is not None
    began = time.time()
    stage.cluster.remove(random.choice(_busy_nodes(stage.cluster)))
    return began


def add_node(stage: Stage) -> float | None:
    """Another node: the run grows, unless it has all the workers that it may have."""
    assert stage.cluster is not None
    began, before = time.time(), stage.workers
    stage.cluster.add()
    return began if stage.workers > before else None


def change_range(stage: Stage) -> float:
    """Ctrl-C, and the same command with another `workers.max`."""
    assert stage.run.driver is not None
    began = time.time()
    stage.run.driver.send_signal(signal.SIGINT)
    stage.run.driver.wait(timeout=120)
    stage.most = random.randint(stage.values["workers"]["min"], stage.values["workers"]["max"])
    stage.start()
    return began


def kill_head(stage: Stage) -> float:
    """The head is gone, and the driver, which lives there, with it."""
    assert stage.cluster is not None
    began = time.time()
    stage.run.kill_driver()
    stage.cluster.kill_head()
    stage.start()
    return began


Kind = Callable[[Stage], float | None]
"""Does it, and returns when, if workers have to start anew for it."""
KINDS: dict[str, list[Kind]] = {
    "fixed": [kill_worker, stop_worker, kill_driver, kill_in_commit, second_driver, terminate_worker, refuse_writes],
    "elastic": [give_notice, kill_node, kill_worker, kill_driver, give_notice, kill_node, change_range, kill_head],
    "s3": [kill_worker, kill_driver, lose_store, slow_down],
}


def play(stage: Stage, count: int, seed: int) -> list[Disturbance]:
    """Runs the stage's run to its end, disturbed `count` times: every kind in turn, in an order drawn from the seed."""
    random.seed(seed)
    stage.start()
    done: list[Disturbance] = []
    bag: list[Kind] = []
    with suppress(RunEnded):
        while len(done) < count:
            # On S3 the ledger is written with each checkpoint: steps in between are not seen.
            trained = 1 if stage.store else random.randint(1, STEPS_EACH // 2)
            stage.run.wait_for("the next step", lambda n=trained: stage.run.trains(stage.workers, n))
            bag = bag or random.sample(KINDS[stage.scenario], len(KINDS[stage.scenario]))
            done.append(_disturb(stage, bag.pop()))
            _tell(stage, done, count)
            while stage.cluster and len(stage.cluster.nodes) < random.choice([2, 3]):
                done.append(_disturb(stage, add_node))
                _tell(stage, done, count)
    stage.run.finish(timeout_s=3600)
    return done


def _tell(stage: Stage, done: list[Disturbance], count: int) -> None:
    last = done[-1]
    print(f"{stage.scenario} {len(done)}/{count}: {last.kind} at step {last.step}, {last.recovered:.0f} s", flush=True)


def _disturb(stage: Stage, kind: Kind) -> Disturbance:
    began, attempt, step = time.time(), stage.run.attempt(), stage.run.trained()
    acted = kind(stage)
    if acted is not None:
        stage.run.wait_for(
            f"training after {kind.__name__}",
            lambda: stage.run.attempt() > attempt and stage.run.trains(stage.workers),
        )
    return Disturbance(kind.__name__, began, step, time.time() - acted if acted else 0.0)


def _busy_nodes(cluster: SpotCluster) -> list[Any]:
    return [node for node in cluster.nodes if workers_of(raylet_pid(node))]


def _saved_since_the_notice(stage: Stage) -> bool:
    names = [line.event for line in stage.run.newest()[1] if isinstance(line, Event)]
    return "notice" in names and "checkpoint" in names[len(names) - names[::-1].index("notice") :]


def _uncommitted(folder: UPath) -> list[str]:
    """Checkpoints of a local run that have files, and no manifest."""
    names = []
    with suppress(FileNotFoundError), os.scandir(folder / "checkpoints") as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                if "manifest.json" not in os.listdir(entry.path):
                    names.append(entry.name)
    return names


if __name__ == "__main__":
    sys.exit("run benchmarks/chaos.py")
