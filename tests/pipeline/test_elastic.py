"""Which nodes count: those that are alive, not leaving, and whose raylet takes a connection."""

import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import ray
from ray.exceptions import GetTimeoutError
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision
from ray.train.v2._internal.execution.scaling_policy.autoscaling_coordinator_client import (
    TrainAutoscalingCoordinatorClient,
)
from ray.train.v2.api.config import ScalingConfig

from pipeline.elastic import ElasticTrainer, PresentNodesPolicy


class Log:
    """Collects what the policy tells the run's log."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.waiting = SimpleNamespace(remote=self.told.append)


@pytest.fixture
def raylet() -> Iterator[int]:
    """A port that takes connections."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def closed() -> int:
    """A port that refuses them."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def policy_on(
    monkeypatch: pytest.MonkeyPatch,
    ports: dict[str, int],
    leaving: tuple[str, ...] = (),
    workers: Any = (1, 3),
    reserved: tuple[str, ...] | None = None,
    used: tuple[str, ...] = (),
) -> PresentNodesPolicy:
    """A policy for workers of one CPU, on a cluster with such a node for each port; all are reserved if not said."""
    nodes = [
        {"NodeID": name, "Alive": True, "NodeManagerAddress": "127.0.0.1", "NodeManagerPort": port}
        for name, port in ports.items()
    ]
    free = {name: {"CPU": 0.0 if name in used else 1.0} for name in ports}
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray, "get", lambda value, timeout: value)
    monkeypatch.setattr(ray._private.state.state, "get_draining_nodes", lambda: dict.fromkeys(leaving, 0))
    monkeypatch.setattr(ray._private.state.state, "available_resources_per_node", lambda: free)
    policy = PresentNodesPolicy(ScalingConfig(num_workers=workers, resources_per_worker={"CPU": 1}), "run", Log())
    ours = {name: {"CPU": 1.0} for name in (ports if reserved is None else reserved)}
    remote = SimpleNamespace(remote=lambda requester, recompute: ours)
    client = SimpleNamespace(
        _autoscaling_coordinator=SimpleNamespace(get_reserved_resources=remote),
        maybe_send_resource_request=lambda *_: None,
    )
    policy._coordinator_client = client  # type: ignore[assignment]
    return policy


def test_workers_start_on_nodes_that_are_there(monkeypatch: pytest.MonkeyPatch, raylet: int, closed: int) -> None:
    policy = policy_on(monkeypatch, {"a": raylet, "dead": closed, "b": raylet, "going": raylet}, leaving=("going",))
    decision = policy.make_decision_for_non_running_worker_group()
    assert isinstance(decision, ResizeDecision) and decision.num_workers == 2
    selector = policy.on_controller_start_worker_group(scaling_config=policy.scaling_config, num_workers=2)
    assert selector == {"ray.io/node-id": "in(a,b)"}


def test_a_node_that_nobody_uses_takes_the_place_of_a_lost_one(
    monkeypatch: pytest.MonkeyPatch, raylet: int, closed: int
) -> None:
    ports = {"a": raylet, "lost": closed, "spare": raylet, "another run's": raylet}
    policy = policy_on(monkeypatch, ports, workers=(1, 2), reserved=("a", "lost"), used=("a", "another run's"))
    decision = policy.make_decision_for_non_running_worker_group()
    assert isinstance(decision, ResizeDecision) and decision.num_workers == 2
    selector = policy.on_controller_start_worker_group(scaling_config=policy.scaling_config, num_workers=2)
    assert selector == {"ray.io/node-id": "in(a,another run's,spare)"}


@pytest.mark.parametrize(("workers_now", "resized"), [(1, True), (2, False), (3, False)])
def test_workers_on_a_node_that_leaves_train_on(
    monkeypatch: pytest.MonkeyPatch, raylet: int, workers_now: int, resized: bool
) -> None:
    """Two nodes stay: one worker becomes two, while three stay three until the third node has gone."""
    policy = policy_on(monkeypatch, {"a": raylet, "b": raylet, "going": raylet}, leaving=("going",))
    policy._latest_monitor_time = -1e9  # the last look was long ago
    now = cast(Any, SimpleNamespace(start_time=-1e9, num_workers=workers_now))
    decision = policy.make_decision_for_running_worker_group(now, cast(Any, None))
    assert isinstance(decision, ResizeDecision if resized else NoopDecision)


def test_too_few_nodes_are_waited_for_and_counted(monkeypatch: pytest.MonkeyPatch, raylet: int, closed: int) -> None:
    policy = policy_on(monkeypatch, {"a": raylet, "dead": closed}, workers=2)
    assert isinstance(policy.make_decision_for_non_running_worker_group(), NoopDecision)
    assert policy.run_log.told == ["waiting for nodes: room for 1 of 2 workers"]


def test_no_answer_of_the_coordinator_is_no_node(monkeypatch: pytest.MonkeyPatch, raylet: int) -> None:
    policy = policy_on(monkeypatch, {"a": raylet})

    def late(*_: object, timeout: float) -> None:
        raise GetTimeoutError("busy")

    monkeypatch.setattr(ray, "get", late)
    assert isinstance(policy.make_decision_for_non_running_worker_group(), NoopDecision)
    assert policy.on_controller_start_worker_group(scaling_config=policy.scaling_config, num_workers=1) is None


def test_a_driver_takes_over_what_the_one_before_it_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        TrainAutoscalingCoordinatorClient,
        "send_resource_request",
        lambda self, config, workers: asked.append((self._requester_id, workers)),
    )
    for driver in ("first", "second"):
        policy = PresentNodesPolicy(ScalingConfig(num_workers=(1, 3)), "s3://bucket/run", Log())
        policy.after_controller_start(SimpleNamespace(run_id=driver))
    assert asked == [("longlora-s3://bucket/run", 3)] * 2


def test_no_process_is_started_for_data_that_ray_does_not_feed() -> None:
    trainer = ElasticTrainer(print, scaling_config=ScalingConfig(num_workers=1), run="run", run_log=Log())
    callbacks = trainer._create_default_callbacks()
    assert callbacks and not any(isinstance(callback, DatasetsCallback) for callback in callbacks)
