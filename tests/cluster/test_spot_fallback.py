"""Without spot machines there are on-demand ones: against Ray's autoscaler, with a cloud that has run out of spot."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler.tags import NODE_KIND_HEAD, TAG_RAY_NODE_KIND, TAG_RAY_USER_NODE_TYPE
from ray.autoscaler.v2.instance_manager.config import FileConfigReader
from ray.autoscaler.v2.instance_manager.instance_manager import InstanceManager
from ray.autoscaler.v2.instance_manager.instance_storage import InstanceStorage
from ray.autoscaler.v2.instance_manager.node_provider import NodeProviderAdapter
from ray.autoscaler.v2.instance_manager.reconciler import Reconciler
from ray.autoscaler.v2.instance_manager.storage import InMemoryStorage
from ray.autoscaler.v2.instance_manager.subscribers.cloud_instance_updater import CloudInstanceUpdater
from ray.autoscaler.v2.instance_manager.subscribers.cloud_resource_monitor import CloudResourceMonitor
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler
from ray.autoscaler.v2.schema import ClusterStatus, Stats
from ray.autoscaler.v2.utils import ClusterStatusParser, ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import (
    ClusterResourceState,
    GetClusterStatusReply,
    NodeState,
    NodeStatus,
    ResourceRequestByCount,
)

from cluster import spot_fallback
from cluster.spot_fallback import RECOVERY_S, refused_types, update

ROOT = Path(spot_fallback.__file__).parent.parent
each_cloud = pytest.mark.parametrize("file", ["aws-spot.yaml", "gcp-spot.yaml"])


class NoSpot:
    """A cloud that has machines on demand and no spot ones."""

    def __init__(self) -> None:
        self.machines = {"head": {TAG_RAY_NODE_KIND: NODE_KIND_HEAD, TAG_RAY_USER_NODE_TYPE: "head"}}
        self.asked_for: list[str] = []

    def non_terminated_nodes(self, _: Any) -> list[str]:
        return list(self.machines)

    def node_tags(self, machine: str) -> dict[str, str]:
        return self.machines[machine]

    def is_running(self, _: str) -> bool:
        return True

    def create_node_with_resources_and_labels(self, config: Any, tags: dict[str, str], count: int, *_: Any) -> None:
        node_type = tags[TAG_RAY_USER_NODE_TYPE]
        self.asked_for.append(node_type)
        if node_type == "gpu_spot":
            raise RuntimeError("InsufficientInstanceCapacity")
        self.machines[f"machine-{len(self.machines)}"] = tags


class Autoscaler:
    """Ray's, of a cluster whose head runs and on which eight workers wait for their GPUs."""

    def __init__(self, config_file: Path) -> None:
        self.config = FileConfigReader(str(config_file))
        self.cloud = NoSpot()
        self.provider = NodeProviderAdapter(self.cloud, self.config)
        self.monitor = CloudResourceMonitor()
        subscribers = [CloudInstanceUpdater(self.provider), self.monitor]
        self.manager = InstanceManager(InstanceStorage("test", InMemoryStorage()), subscribers)
        self.scheduler = ResourceDemandScheduler(None)
        self.cluster = ClusterResourceState()
        head = NodeState(node_id=b"h" * 28, instance_id="head", ray_node_type_name="head", status=NodeStatus.RUNNING)
        head.total_resources["node:__internal_head__"] = 1
        self.cluster.node_states.append(head)
        worker = ResourceRequestUtil.make({"GPU": 1, "CPU": 8})
        self.cluster.pending_resource_requests.append(ResourceRequestByCount(request=worker, count=8))

    def look(self) -> ClusterStatus:
        """One round, with the launches that it decides on done; the status that it reports."""
        self.config.refresh_cached_autoscaling_config()
        state = Reconciler.reconcile(
            self.manager,
            self.scheduler,
            self.provider,
            self.monitor,
            self.cluster,
            self.provider.get_non_terminated(),
            self.config.get_cached_autoscaling_config(),
            cloud_provider_errors=self.provider.poll_errors(),
            ray_install_errors=[],
            ray_stop_errors=[],
        )
        self.provider._main_executor.submit(lambda: None).result()
        self.provider._node_launcher_executors.submit(lambda: None).result()
        reply = GetClusterStatusReply(autoscaling_state=state)
        return ClusterStatusParser.from_get_cluster_status_reply(
            reply, Stats(gcs_request_time_s=0, request_ts_s=int(time.time()))
        )

    def close(self) -> None:
        self.provider._main_executor.shutdown()
        self.provider._node_launcher_executors.shutdown()


@pytest.fixture
def config_file(file: str, tmp_path: Path) -> Path:
    config = yaml.safe_load((ROOT / "cluster" / file).read_text(encoding="utf-8"))
    path = tmp_path / "ray_bootstrap_config.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


@pytest.fixture
def autoscaler(config_file: Path) -> Any:
    autoscaler = Autoscaler(config_file)
    yield autoscaler
    autoscaler.close()


def priorities(path: Path) -> dict[str, int]:
    node_types = json.loads(path.read_text(encoding="utf-8"))["available_node_types"]
    return {name: node_type.get("priority", 0) for name, node_type in node_types.items()}


@each_cloud
def test_ray_alone_asks_for_spot_without_end(autoscaler: Autoscaler) -> None:
    """Why spot_fallback.py is there. If this fails, Ray has learned it: take the file and its starts away."""
    for _ in range(5):
        autoscaler.look()
    assert set(autoscaler.cloud.asked_for) == {"gpu_spot"}


@each_cloud
def test_what_is_refused_comes_last_until_it_has_recovered(autoscaler: Autoscaler, config_file: Path) -> None:
    before = priorities(config_file)
    for _ in range(4):
        status = autoscaler.look()
        update(config_file, refused_types(status, time.time()))
    asked_for = autoscaler.cloud.asked_for
    assert asked_for[0] == "gpu_spot" and "gpu_on_demand" in asked_for
    assert "gpu_spot" not in asked_for[asked_for.index("gpu_on_demand") :]
    assert update(config_file, refused_types(status, time.time())) == [], "said once"
    assert update(config_file, refused_types(status, time.time() + RECOVERY_S + 1)) == [
        f"gpu_spot: has its priority again, {before['gpu_spot']}"
    ]
    assert priorities(config_file) == before


@each_cloud
def test_other_users_cannot_read_the_new_file_either(config_file: Path) -> None:
    config_file.chmod(0o600)
    assert update(config_file, {"gpu_spot"}) == ["gpu_spot: refused by the cloud, comes last for 10 minutes"]
    assert config_file.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in config_file.parent.iterdir()] == [config_file.name]
