"""Nodes come and go under a run, with a notice and without: the same data, the same losses."""

import json
import time
from collections.abc import Callable, Iterator

import pytest
from upath import UPath

from pipeline.audit import audit_run
from pipeline.config import load_config
from pipeline.ledger import Event, StepRecord, read_ledger

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]  # minutes each: Ray waits for nodes that are gone

SLOT = {"slot": 1}
STEPS = 1500
SETTINGS = {
    "optimization": {"steps": STEPS, "learning_rate": 1e-3},
    "workers": {"min": 1, "max": 2, "resources": SLOT, "resize_interval_s": 5},
    "checkpoint": {"every_steps": 500},
}
WAIT_S = 300


class Nodes:
    """A Ray cluster of processes: a head that runs no workers, and nodes with room for one worker each."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})

    def add(self) -> object:
        return self.cluster.add_node(num_cpus=1, resources=SLOT)

    def remove(self, node: object) -> None:
        """As a machine that is switched off."""
        self.cluster.remove_node(node, allow_graceful=False)

    def give_notice(self, node: object, seconds: float) -> None:
        """As a cloud that wants its machine back."""
        from ray._raylet import GcsClient
        from ray.core.generated import autoscaler_pb2

        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline = int((time.time() + seconds) * 1000)
        GcsClient(self.cluster.address).drain_node(node.node_id, reason, "spot", deadline)  # type: ignore[attr-defined]


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # on loopback, for the length of a test
    nodes = Nodes()
    yield nodes
    nodes.cluster.shutdown()


def wait_for(what: str, condition: Callable[[], bool], process: "object") -> None:
    until = time.monotonic() + WAIT_S
    while not condition():
        assert process.poll() is None, process.communicate()[0]  # type: ignore[attr-defined]
        assert time.monotonic() < until, f"{what}: not in {WAIT_S} s"
        time.sleep(0.1)


def events(folder: UPath, name: str) -> list[Event]:
    return [line for _, line in read_ledger(folder) if isinstance(line, Event) and line.event == name]


def training_with(folder: UPath, workers: int) -> bool:
    """Whether the newest attempt has so many workers and has trained a step."""
    lines = [line for _, line in read_ledger(folder)]
    starts = [n for n, line in enumerate(lines) if isinstance(line, Event) and line.event == "start"]
    if not starts or lines[starts[-1]].details["world_size"] != workers:  # type: ignore[union-attr]
        return False
    after = lines[starts[-1] :]
    interrupted = any(isinstance(line, Event) and line.event in ("failure", "resize") for line in after)
    return not interrupted and any(isinstance(line, StepRecord) for line in after)


@pytest.mark.parametrize("notice", [True, False], ids=["with notice", "without notice"])
def test_a_node_goes_and_another_comes(make_run: Callable, nodes: Nodes, notice: bool) -> None:
    first, second = nodes.add(), nodes.add()
    assert first
    run = make_run("run", **SETTINGS)
    run.environment = {"RAY_ADDRESS": nodes.cluster.address, "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5"}
    process = run.start("train")
    wait_for("two workers", lambda: training_with(run.folder, 2), process)
    if notice:
        nodes.give_notice(second, seconds=8)
        wait_for("a notice", lambda: bool(events(run.folder, "notice")), process)
        wait_for("a checkpoint", lambda: bool(events(run.folder, "checkpoint")), process)
        time.sleep(4)
    nodes.remove(second)
    wait_for("one worker", lambda: training_with(run.folder, 1), process)
    nodes.add()
    wait_for("two workers again", lambda: training_with(run.folder, 2), process)
    output, _ = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, output

    result = audit_run(load_config(run.config), run.folder)
    assert result.whole and result.committed == STEPS
    assert [recovery.cause for recovery in result.recoveries][-1] == "resize to 2"
    assert result.recoveries[-1].redone == 0, "a checkpoint is made before a resize"
    print(json.dumps([vars(recovery) for recovery in result.recoveries]))
