"""A Ray cluster of processes on this machine, whose nodes come and go, and runs on it that are disturbed.

Used by the benchmarks and the tests of elasticity. Node = raylet; a worker of a run takes the one `slot` of a node.
"""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import psutil
from ray._private import ray_constants
from ray._private.utils import write_ray_address
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2
from upath import UPath

from pipeline.config import REPOSITORY
from pipeline.ledger import Event, StepRecord, newest_attempt, read_ledger

SLOT = {"slot": 1}
WAIT_S = 300.0
# No token, so on loopback alone, as in `pipeline/session.py`: here for drivers, below for this process. Workers at the
# default niceness of 15 would wait for anything else here.
ENVIRONMENT = {"RAY_AUTH_MODE": "disabled", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_worker_niceness": "0"}


class SpotCluster:
    """A head that runs no workers, and nodes with room for one worker each. To be used in the main thread only."""

    def __init__(self, dashboard_port: int = 0) -> None:
        """dashboard_port: where the head takes jobs; 0 for no dashboard."""
        os.environ.update(ENVIRONMENT)
        self.dashboard = {"include_dashboard": bool(dashboard_port), "dashboard_port": dashboard_port or None}
        # By default all heads of a machine want one port for the agent that starts jobs; the second would start none.
        self.dashboard |= {"dashboard_agent_listen_port": free_port()} if dashboard_port else {}
        ray_constants.ENABLE_RAY_CLUSTER = False
        self.start_head()

    def start_head(self) -> None:
        self.nodes: list[Any] = []
        self.scratch = tempfile.mkdtemp(prefix="nodes-")  # short: a socket's path has 107 characters at most
        folder = {"temp_dir": f"{self.scratch}/head"}
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, **self.dashboard, **folder})
        write_ray_address(self.address, folder["temp_dir"])  # where its jobs look for it

    @property
    def address(self) -> str:
        return self.cluster.address

    def add(self) -> Any:
        # A folder of its own, as a machine has: nodes that share one replace each other's copy of a job's folder.
        folder = tempfile.mkdtemp(dir=self.scratch)
        node = self.cluster.add_node(num_cpus=1, resources=SLOT, temp_dir=folder)
        self.nodes.append(node)
        return node

    def remove(self, node: Any) -> None:
        """As a machine that is switched off: its raylet and its workers are killed."""
        raylet = psutil.Process(raylet_pid(node))
        victims = [raylet, *raylet.children(recursive=True)]
        self.nodes.remove(node)
        for process in victims:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.cluster.remove_node(node, allow_graceful=False)

    def give_notice(self, node: Any, seconds: float) -> None:
        """As a cloud that wants its machine back."""
        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline = int((time.time() + seconds) * 1000)
        GcsClient(self.address).drain_node(node.node_id, reason, "spot", deadline)

    def kill_head(self) -> None:
        """As a head node that is switched off: the cluster ends, and a new one is started with as many nodes."""
        count = len(self.nodes)
        for process in descendants("raylet", "gcs_server"):
            process.kill()
        self.shutdown()
        self.start_head()
        for _ in range(count):
            self.add()

    def shutdown(self) -> None:
        self.cluster.shutdown()
        shutil.rmtree(self.scratch, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()


class RunEnded(RuntimeError):
    """The driver has done its work, while something else was waited for."""


class DisturbedRun:
    """A run on a cluster (or on a Ray of its own), started by the command line as a user does, again and again."""

    def __init__(self, config: Path, folder: UPath, **environment: str) -> None:
        self.config, self.folder, self.environment = config, folder, environment
        self.output = Path(f"{config}.log")
        self.driver: subprocess.Popen[bytes] | None = None

    def start(self, *overrides: str) -> "subprocess.Popen[bytes]":
        """The driver; what it prints is added to `output`."""
        command = [sys.executable, str(REPOSITORY / "pipeline" / "main.py"), "train", "--config", str(self.config)]
        with self.output.open("ab") as output:
            self.driver = subprocess.Popen(
                [*command, *overrides],
                env={**os.environ, **self.environment},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self.driver

    def kill_driver(self) -> None:
        assert self.driver is not None
        self.driver.kill()
        self.driver.wait()

    def finish(self, timeout_s: float = WAIT_S) -> None:
        """Waits for the driver's end; RuntimeError, with what it printed, if it failed."""
        assert self.driver is not None
        if self.driver.wait(timeout=timeout_s):
            raise RuntimeError(f"the driver ended with {self.driver.returncode}: {self.tail()}")

    def wait_for(self, what: str, condition: Callable[[], bool], timeout_s: float = WAIT_S) -> None:
        """Returns once `condition` holds; RunEnded if the run is done first, RuntimeError if it fails or is late."""
        until = time.monotonic() + timeout_s
        while not condition():
            if self.driver is not None and self.driver.poll() == 0:
                raise RunEnded(f"waiting for {what}, the run came to its end")
            if self.driver is None or self.driver.poll() is not None:
                raise RuntimeError(f"waiting for {what}, the driver ended: {self.tail()}")
            if time.monotonic() > until:
                raise RuntimeError(f"{what}: not in {timeout_s:.0f} s; {self.story()}\n{self.tail()}")
            time.sleep(0.05)

    def tail(self) -> str:
        return self.output.read_text(errors="replace")[-2000:] if self.output.exists() else ""

    def attempt(self) -> int:
        """The newest attempt's number: cheap, also where its predecessor has thousands of lines."""
        return newest_attempt(self.folder)

    def newest(self) -> tuple[int, list[StepRecord | Event]]:
        """The newest attempt's number, 0 before the first, and its lines in the ledger."""
        numbered = list(read_ledger(self.folder, newest_only=True))
        return max((attempt for attempt, _ in numbered), default=0), [line for _, line in numbered]

    def events(self, name: str) -> list[Event]:
        """Those of the newest attempt."""
        return [line for line in self.newest()[1] if isinstance(line, Event) and line.event == name]

    def all_events(self, name: str) -> list[Event]:
        """The events of that name in all attempts."""
        return [line for _, line in read_ledger(self.folder) if isinstance(line, Event) and line.event == name]

    def story(self) -> str:
        """What happened to the run, from its ledger: (attempt, event, step, cause), in order."""
        events = [(attempt, line) for attempt, line in read_ledger(self.folder) if isinstance(line, Event)]
        return " ".join(f"({n}, {line.event}, {line.step}, {line.details.get('cause', '')})" for n, line in events)

    def steps_since_start(self) -> tuple[int, int]:
        """(workers, steps that they have trained since they started); (0, 0) if none are in training."""
        workers, steps = 0, 0
        for line in self.newest()[1]:
            if isinstance(line, StepRecord):
                steps += 1
            elif line.event == "start":
                workers, steps = line.details["world_size"], 0
            elif line.event in ("failure", "resize", "driver"):
                workers, steps = 0, 0
        return workers, steps

    def trained(self) -> int:
        """The last step of the newest attempt; -1 before the first."""
        return max((line.step for line in self.newest()[1] if isinstance(line, StepRecord)), default=-1)

    def trains(self, workers: int, steps: int = 1) -> bool:
        """Whether so many workers are in training, and have trained so many steps since they started."""
        now, trained = self.steps_since_start()
        return now == workers and trained >= steps


def workers_of(root: int | None = None) -> list[psutil.Process]:
    """The processes of training workers below process `root` (this one by default)."""
    return descendants("ray::RayTrainWorker", root=root)


def descendants(*names: str, root: int | None = None) -> list[psutil.Process]:
    """Processes below `root` (this one by default) whose command starts with one of these names."""
    found = []
    for process in psutil.Process(root).children(recursive=True):
        with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            command = process.cmdline()
            if command and Path(command[0]).name.startswith(tuple(names)):
                found.append(process)
    return found


def free_port() -> int:
    """A port below those that Linux gives to connections (32768 on), one of which could take it before it is used."""
    while True:
        port = random.randrange(20000, 32768)
        with socket.socket() as free, suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


def raylet_pid(node: Any) -> int:
    [info] = node.all_processes["raylet"]
    return info.process.pid


def send(processes: Sequence[psutil.Process], which: signal.Signals) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(which)
