"""Which nodes the workers start on: those that are there now, not those that a list of some seconds ago still names.

Ray Train's own policy takes dead and leaving nodes for capacity until its list is renewed and the cluster has given
them up; each start of workers on one of them costs a time-out. Here a node counts if it is not about to leave and its
raylet takes a connection, and workers are started on counted nodes only. The policy is an internal interface of Ray;
the range of Ray versions is pinned for it.
"""

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
)
from ray.train.v2._internal.execution.scaling_policy.autoscaling_coordinator_client import (
    TrainAutoscalingCoordinatorClient,
)
from ray.train.v2._internal.execution.worker_group import WorkerGroupPollStatus, WorkerGroupState
from ray.train.v2.api.config import ScalingConfig
from ray.train.v2.torch.torch_trainer import TorchTrainer

ANSWER_TIMEOUT_S = 2.0
COORDINATOR_TIMEOUT_S = 5.0
WAIT_S = 0.5
NODE_ID_LABEL = "ray.io/node-id"

Reserved = dict[str, dict[str, float]]
"""Resources set aside for this run, by node id."""


class ElasticTrainer(TorchTrainer):
    """A TorchTrainer whose workers start on nodes that are there."""

    def __init__(self, *arguments: Any, scaling_config: ScalingConfig, run: str, run_log: Any, **settings: Any) -> None:
        """run: a name that no other run of the cluster has."""
        super().__init__(*arguments, scaling_config=scaling_config, **settings)
        self._policy = PresentNodesPolicy(scaling_config, run, run_log)

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        return super()._initialize_and_run_controller(**{**parts, "scaling_policy": self._policy})

    def _register_sigint_handler(self, controller: Any) -> None:
        """Ctrl-C is the driver's, as anywhere in Python; Ray's handler would end it before it can save."""

    def _create_default_callbacks(self) -> list[Any]:
        """Without Ray Data's: workers read the packs themselves, and it starts a process with every group."""
        return [one for one in super()._create_default_callbacks() if not isinstance(one, DatasetsCallback)]


class PresentNodesPolicy(ElasticScalingPolicy):
    """Ray's elastic policy over the nodes that answer; with a fixed number of workers it waits for so many."""

    def __init__(self, scaling_config: ScalingConfig, run: str, run_log: Any) -> None:
        super().__init__(scaling_config)
        self.run, self.run_log = run, run_log
        self._present: list[str] = []

    def after_controller_start(self, train_run_context: Any) -> None:
        """Asks for resources under the run's name.

        Ray's names differ from driver to driver, and what a killed one asked for is held for three minutes: the next
        driver of the run would find it taken.
        """
        self._requester_id = f"longlora-{self.run}"
        self._coordinator_client = TrainAutoscalingCoordinatorClient(self._requester_id)
        self._send_resource_request()

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        decision = super().make_decision_for_non_running_worker_group()
        if isinstance(decision, NoopDecision):
            room = self._count_possible_workers(self._latest_reserved_resources or {})
            time.sleep(WAIT_S)  # the controller asks again at once
            self.run_log.waiting.remote(
                f"waiting for nodes: room for {room} of {self.scaling_config.min_workers} workers"
            )
        return decision

    def make_decision_for_running_worker_group(
        self, worker_group_state: WorkerGroupState, worker_group_status: WorkerGroupPollStatus
    ) -> ScalingDecision:
        """More workers, where there is room. Fewer are no decision of ours: workers on a node that is about to leave
        save and train on until it goes, and one that is lost ends the group by itself."""
        decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
        fewer = isinstance(decision, ResizeDecision) and decision.num_workers < worker_group_state.num_workers
        return NoopDecision() if fewer else decision

    def on_controller_start_worker_group(
        self, *, scaling_config: ScalingConfig, num_workers: int
    ) -> dict[str, str] | None:
        """Keeps the workers to the nodes that were counted; a label selector of the config has its own say."""
        if scaling_config.label_selector or not self._present:
            return None
        return {NODE_ID_LABEL: f"in({','.join(self._present)})"}

    def _get_reserved_resources(self) -> Reserved | None:
        """Resources that are set aside for this run on nodes that are there; None if that cannot be known now."""
        self._latest_reserved_resources = None
        with suppress(RayError):
            reserved = self._autoscaling_coordinator.get_reserved_resources.remote(self._requester_id, recompute=True)
            self._latest_reserved_resources = _on_present_nodes(ray.get(reserved, timeout=COORDINATOR_TIMEOUT_S))
        self._present = sorted(self._latest_reserved_resources or {})
        return self._latest_reserved_resources


def _on_present_nodes(reserved: Reserved) -> Reserved:
    """What is reserved on nodes that are there; on others that are there, what nobody uses, in place of lost ones."""
    leaving = ray._private.state.state.get_draining_nodes()
    staying = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]
    with ThreadPoolExecutor(max_workers=32) as pool:
        answers = list(pool.map(_answers, staying))
    free = ray._private.state.state.available_resources_per_node()
    present = [node["NodeID"] for node, there in zip(staying, answers, strict=True) if there]
    return {node: reserved.get(node) or free.get(node, {}) for node in present}


def _answers(node: dict[str, Any]) -> bool:
    """Whether the node's raylet takes a connection: known at once, while the cluster gives a node up after seconds."""
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), ANSWER_TIMEOUT_S).close()
    except OSError:
        return False
    return True
