"""The launcher's YAML files, by Ray's own schema and autoscaler, and by what the recipes and the lock say."""

import re
import tomllib
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import ray
from packaging.specifiers import SpecifierSet
from ray._private.label_utils import validate_node_labels
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import ResourceRequestByCount

from cluster.spot_fallback import DEMOTION
from pipeline.config import Config, load_config
from pipeline.session import TRAIN_SETTINGS

ROOT = Path(__file__).parent.parent.parent
CLOUDS = ("aws-spot", "gcp-spot")
each_cloud = pytest.mark.parametrize("name", CLOUDS)
each_file = pytest.mark.parametrize("name", [*CLOUDS, "on-prem"])
Launcher = Callable[[str], dict[str, Any]]
Autoscaling = Callable[[str], AutoscalingConfig]


def text_of(name: str) -> str:
    return (ROOT / "cluster" / f"{name}.yaml").read_text(encoding="utf-8")


def header_of(name: str) -> str:
    return "\n".join(takewhile(lambda line: line.startswith("#"), text_of(name).splitlines()))


def recipe_of(name: str) -> Config:
    """The recipe of the command that the header shows."""
    (recipe,) = set(re.findall(r"--config (configs/\S+\.yaml)", header_of(name)))
    return load_config(ROOT / recipe)


def workers_on(node_type: dict[str, Any], recipe: Config) -> int:
    """How many of the recipe's workers one node has room for."""
    room = node_type["resources"]
    return int(min(room.get("GPU", 0) // recipe.workers.gpus, room["CPU"] // recipe.workers.cpus))


def launched(config: AutoscalingConfig, demand: dict[str, float], count: int) -> dict[str, int]:
    """Nodes that the autoscaler would launch on an empty cluster."""
    request = ResourceRequestByCount(request=ResourceRequestUtil.make(demand), count=count)
    reply = ResourceDemandScheduler(None).schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=config.get_node_type_configs(),
            max_num_nodes=config.get_max_num_nodes(),
            resource_requests=[request],
        )
    )
    return {launch.instance_type: launch.count for launch in reply.to_launch}


@each_file
def test_ray_takes_it(name: str, autoscaling: Autoscaling) -> None:
    """Ray's schema and its checks; for machines of one's own it makes one node type of head and workers."""
    node_types = autoscaling(name).get_node_type_configs()
    wanted = {"head", "gpu_spot", "gpu_on_demand", "cpu"} if name in CLOUDS else {"local.cluster.node"}
    assert set(node_types) == wanted


@each_cloud
def test_the_head_runs_no_workers_and_stays(name: str, autoscaling: Autoscaling, launcher: Launcher) -> None:
    config = autoscaling(name)
    head = config.get_node_type_configs()[config.get_head_node_type()]
    assert (head.resources, head.max_worker_nodes) == ({"CPU": 0}, 1)
    assert not is_spot(launcher(name)["available_node_types"]["head"])


def is_spot(node_type: dict[str, Any]) -> bool:
    node_config = node_type["node_config"]
    on_aws = node_config.get("InstanceMarketOptions", {}).get("MarketType") == "spot"
    return on_aws or node_config.get("scheduling", {}).get("provisioningModel") == "SPOT"


@each_cloud
def test_labels_say_what_comes_and_goes(name: str, launcher: Launcher) -> None:
    for node_type, settings in launcher(name)["available_node_types"].items():
        validate_node_labels(settings["labels"])
        assert settings["labels"]["lifecycle"] == ("spot" if is_spot(settings) else "on-demand")
        assert node_type.endswith("_spot") == is_spot(settings), "by its name the watcher is started"


@each_cloud
def test_workers_get_a_spot_node_and_data_a_cpu_node(name: str, autoscaling: Autoscaling) -> None:
    config, recipe = autoscaling(name), recipe_of(name)
    worker = {"GPU": recipe.workers.gpus, "CPU": recipe.workers.cpus}
    assert launched(config, worker, recipe.workers.max) == {"gpu_spot": 1}
    assert launched(config, {"CPU": 1}, 20) == {"cpu": 1}
    assert launched(config, worker, 1000) == {"gpu_spot": 2, "gpu_on_demand": 1}


@each_cloud
def test_the_fallback_has_the_lower_priority(name: str, autoscaling: Autoscaling) -> None:
    node_types = autoscaling(name).get_node_type_configs()
    assert node_types["gpu_spot"].priority > node_types["gpu_on_demand"].priority
    assert all(abs(node_type.priority) < DEMOTION / 2 for node_type in node_types.values())
    assert node_types["gpu_spot"].resources == node_types["gpu_on_demand"].resources, "else the better fit wins"


@each_cloud
def test_the_workers_of_the_recipe_fit(name: str, launcher: Launcher) -> None:
    config, recipe = launcher(name), recipe_of(name)
    node_types = config["available_node_types"]
    for node_type in ("gpu_spot", "gpu_on_demand"):
        settings = node_types[node_type]
        assert settings["max_workers"] * workers_on(settings, recipe) >= recipe.workers.max >= recipe.workers.min
    assert config["max_workers"] == sum(settings["max_workers"] for settings in node_types.values())


@each_cloud
def test_a_resize_does_not_make_nodes_go(name: str, launcher: Launcher) -> None:
    """While workers are started again their nodes are idle; five times over, since the first attempts may fail."""
    start_s = float(TRAIN_SETTINGS["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"])
    bound = 5 * (recipe_of(name).workers.resize_interval_s + start_s)
    for node_type in ("gpu_spot", "gpu_on_demand"):
        assert launcher(name)["available_node_types"][node_type]["idle_timeout_s"] >= bound


@each_file
def test_what_is_mounted_is_there(name: str, launcher: Launcher) -> None:
    mounts = launcher(name)["file_mounts"]
    ours = {remote: local for remote, local in mounts.items() if not local.startswith("~/")}
    assert set(ours) == {"~/longlora/requirements.lock", "~/longlora/cluster"}
    assert all((ROOT / local).exists() for local in ours.values())
    secrets = {remote for remote in mounts if remote not in ours}
    assert secrets == {"~/.ray/auth_token", "~/.cache/huggingface/token"}
    used = re.findall(r"~/longlora/([\w./-]+)", " ".join(every_command(launcher(name))))
    assert used and all((ROOT / path).is_file() for path in used)


@each_file
def test_versions_are_the_locks(name: str, launcher: Launcher) -> None:
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert f"\nray=={ray.__version__} " in lock, "the Ray by which these files are checked"
    settings = launcher(name)
    installs = [command for command in every_command(settings) if re.search(r"\b(pip|uv) ", command)]
    assert [command.partition("pip install ")[2] for command in installs] == [
        "--quiet --require-hashes -r ~/longlora/requirements.lock"
    ]
    python = re.search(r"\bpython(3\.\d+) -m venv", installs[0])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert python and python[1] in SpecifierSet(project["requires-python"])
    assert settings.get("head_setup_commands", []) == []


def every_command(settings: dict[str, Any]) -> list[str]:
    types = settings.get("available_node_types", {}).values()
    lists = [value for place in (settings, *types) for key, value in place.items() if key.endswith("_commands")]
    return [command for commands in lists for command in commands]


PLACEHOLDERS = re.compile(
    r"\bmy-[a-z-]+|\bami-0+\b|\bsg-0+\b|\b192\.0\.2\.\d+\b"  # what is no one's
    r"|\b[a-z]{2}-[a-z]+-?\d(?:-?[a-z]\b)?"  # regions and zones of both clouds
)


@each_file
def test_the_header_lists_all_that_is_to_be_changed(name: str) -> None:
    header = header_of(name)
    body = text_of(name)[len(header) :]
    listed = "\n".join(re.findall(r"^#   (?! )(.*?)  +\S", header.partition("Change these")[2], re.MULTILINE))
    found = set(PLACEHOLDERS.findall(body))
    assert len(found) >= 4
    assert found == set(PLACEHOLDERS.findall(listed))


@each_file
def test_nothing_is_open_to_the_world(name: str, launcher: Launcher) -> None:
    """The rest is in test_launcher_clouds.py (security groups) and test_launcher_commands.py (who listens where)."""
    assert not re.search(r"0\.0\.0\.0|::/0|[\s\[]::[\s\]]", str(launcher(name)))
    assert "*" not in header_of(name), "no right to everything"
    (head,) = [command for command in launcher(name)["head_start_ray_commands"] if "ray start" in command]
    assert "--dashboard-host=127.0.0.1" in head
