"""The manifests: legal, of one mind with the lock and the recipes, closed by default."""

import copy
import gzip
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from cluster import preemption_watcher
from pipeline.config import Config, load_config
from pipeline.main import parser

ROOT = Path(__file__).parents[3]
DEFINITIONS = ROOT.parent / "shared" / "data" / "kuberay"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")
PARTS = {"services", "cluster", "train", "search", "evaluate", "export"}
KUBERNETES_VERSION = "1.29"  # the oldest with sidecar containers

Object = dict[str, Any]


def locked(package: str) -> str:
    found = re.search(rf"^{package}==(\S+)", LOCK, re.MULTILINE)
    assert found, package
    return found[1]


def unknown_fields_refused(schema: Any) -> Any:
    """The schema as an API server with strict field validation reads it: what is not named is a mistake."""
    if isinstance(schema, list):
        return [unknown_fields_refused(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: unknown_fields_refused(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        closed.setdefault("additionalProperties", False)
    return closed


@pytest.fixture(scope="module")
def definitions() -> dict[str, Any]:
    """Validators by kind, from KubeRay's custom resource definitions."""
    if not DEFINITIONS.is_dir():
        pytest.skip("KubeRay's custom resource definitions are not there: ../shared/data/kuberay")
    validators = {}
    for path in DEFINITIONS.glob("*.yaml.gz"):
        definition = yaml.load(gzip.decompress(path.read_bytes()), Loader=yaml.CSafeLoader)
        (schema,) = [one["schema"]["openAPIV3Schema"] for one in definition["spec"]["versions"] if one["name"] == "v1"]
        schema["properties"]["metadata"] = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
        validators[definition["spec"]["names"]["kind"]] = jsonschema.Draft202012Validator(
            unknown_fields_refused(schema)
        )
    return validators


def test_ray_objects_match_their_definitions(rendered: Any, definitions: Any) -> None:
    objects = [one for one in rendered.objects if one["kind"] in definitions]
    assert len(objects) == 5
    for one in objects:
        definitions[one["kind"]].validate(one)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "enableInTreeAutoscalling"), True),
        (("spec", "headGroupSpec", "template", "spec", "containers", 0, "resource"), {}),
        (("spec", "workerGroupSpecs", 0, "maxReplicas"), "8"),
        (("spec", "authOptions", "mode"), "none"),
    ],
)
def test_the_definitions_refuse_mistakes(base: Any, definitions: Any, path: Any, value: Any) -> None:
    wrong = copy.deepcopy(base.cluster())
    place = wrong
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        definitions["RayCluster"].validate(wrong)


def test_other_objects_match_kubernetes_schemas(rendered: Any) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    for one in rendered.objects:
        if not one["apiVersion"].startswith("ray.io/"):
            kubernetes_validate.validate(one, KUBERNETES_VERSION, strict=True)


def test_every_object_belongs_to_a_part(rendered: Any) -> None:
    """Parts are applied by this label; jobs have one each, so that none is started with another."""
    assert {one["metadata"]["labels"]["part"] for one in rendered.objects} == PARTS
    for job in rendered.of_kind("RayJob"):
        assert job["metadata"]["labels"]["part"] == job["metadata"]["name"]


def test_versions_are_the_locks(rendered: Any) -> None:
    oldest = PROJECT["requires-python"].removeprefix(">=").replace(".", "")
    tag = f"{PROJECT['version']}-ray{locked('ray')}-py{oldest}" + ("-cpu" if rendered.folder == "local" else "")
    images = {container["image"] for pod in rendered.pods() for container in pod.containers()}
    assert {image.partition(":")[2] for image in images if "longlora" in image} == {tag}
    specs = [rendered.cluster()["spec"], *(job["spec"]["rayClusterSpec"] for job in rendered.of_kind("RayJob"))]
    assert {spec["rayVersion"] for spec in specs} == {locked("ray")}


def command_line(job: Object, settings: dict[str, str]) -> list[str]:
    """The entrypoint as the submitter's shell expands it, with nothing but the settings in its environment."""
    script = f"set -eu; printf '%s\\n' {job['spec']['entrypoint']}"
    shell = ["bash", "--norc", "-c", script]
    return subprocess.run(shell, env=settings, capture_output=True, text=True, check=True).stdout.splitlines()


def config_of(job: Object, settings: dict[str, str]) -> Config:
    python, script, *arguments = command_line(job, settings)
    assert (python, script) == ("python", "pipeline/main.py")
    options = parser().parse_args(arguments)
    assert options.command == job["metadata"]["name"]
    return load_config(options.config, options.overrides)


def test_command_lines_are_ours(rendered: Any) -> None:
    settings = rendered.settings()
    for job in rendered.of_kind("RayJob"):
        config = config_of(job, settings)
        assert config.run.storage == settings["STORAGE"]
        assert (config.data.train, config.data.validation) == ([settings["TRAIN"]], [settings["VALIDATION"]])
        (mlflow,) = [
            one for one in rendered.of_kind("Service") if f"//{one['metadata']['name']}:" in config.tracking.uri
        ]
        assert config.tracking.uri == f"http://mlflow:{mlflow['spec']['ports'][0]['port']}"


def test_evaluation_is_of_what_was_trained(rendered: Any) -> None:
    jobs = {job["metadata"]["name"]: config_of(job, rendered.settings()) for job in rendered.of_kind("RayJob")}
    assert jobs["train"] == jobs["evaluate"] == jobs["export"] and jobs["train"].run.name != jobs["search"].run.name


def test_jobs_bring_the_cluster_that_there_is_one_description_of(rendered: Any) -> None:
    for job in rendered.of_kind("RayJob"):
        assert job["spec"]["rayClusterSpec"] == rendered.cluster()["spec"]
        assert job["spec"]["shutdownAfterJobFinishes"] and job["spec"]["backoffLimit"] > 0
        assert "clusterSelector" not in job["spec"], "KubeRay refuses backoffLimit with it"


def node_types(cluster: Object) -> dict[str, Any]:
    """The worker groups as Ray's autoscaler reads them on Kubernetes."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig

    return AutoscalingConfig(_derive_autoscaling_config_from_ray_cr(cluster), True).get_node_type_configs()


def launched(
    cluster: Object, demand: dict[str, float], count: int, unavailable: tuple[str, ...] = ()
) -> dict[str, int]:
    """What Ray's autoscaler starts for so many demands, when these groups were not to be had just now."""
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil

    demands = ResourceRequestUtil.group_by_count([ResourceRequestUtil.make(demand)] * count)
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=node_types(cluster),
        resource_requests=demands,
        recoverable_resource_availabilities=dict.fromkeys(unavailable, 0.0),
    )
    launches = ResourceDemandScheduler(None).schedule(request).to_launch
    return {one.instance_type: one.count for one in launches if one.instance_type != "headgroup"}


def test_the_autoscaler_tries_spot_first_and_falls_back(base: Any) -> None:
    """For the workers of the recipe; Ray Data's tasks go to nodes without a GPU."""
    workers = load_config(base.settings()["CONFIG"]).workers
    worker = {"CPU": workers.cpus, "GPU": 1}
    assert launched(base.cluster(), worker, workers.max) == {"gpu-spot": workers.max}
    assert launched(base.cluster(), worker, workers.max, ("gpu-spot",)) == {"gpu-on-demand": workers.max}
    assert launched(base.cluster(), {"CPU": 1}, 16) == {"data": 2}


def test_the_head_runs_no_tasks(rendered: Any) -> None:
    assert node_types(rendered.cluster())["headgroup"].resources["CPU"] == 0


def test_workers_fit_into_the_cluster(rendered: Any) -> None:
    """The largest number of workers of every job is within what the autoscaler may start, in one group."""
    for job in rendered.of_kind("RayJob"):
        workers = config_of(job, rendered.settings()).workers
        wanted = {"CPU": workers.cpus, "GPU": 0 if workers.gpus == "auto" else workers.gpus}
        room = max(
            group.max_worker_nodes * min(int(group.resources.get(key, 0) / n) for key, n in wanted.items() if n)
            for group in node_types(rendered.cluster()).values()
        )
        assert workers.max <= room, job["metadata"]["name"]


def test_a_deleted_pod_has_time_to_drain(rendered: Any) -> None:
    for pod in rendered.pods():
        if pod.is_ray:
            variables = {one["name"]: one.get("value") for one in pod.spec["containers"][0]["env"]}
            drain = float(variables["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
            assert 0 < drain < pod.spec["terminationGracePeriodSeconds"], pod.name


def test_spot_nodes_are_watched(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spot = [pod for pod in base.pods() if pod.spec.get("nodeSelector", {}).get("longlora/capacity") == "spot"]
    assert len(spot) == 5  # the cluster's and each job's
    for pod in spot:
        (watcher,) = pod.spec["initContainers"]
        assert watcher["restartPolicy"] == "Always", "otherwise Ray waits for it to end"
        python, script, *arguments = watcher["command"]
        assert python == "python" and ROOT / script == Path(preemption_watcher.__file__)
        options = preemption_watcher.parser().parse_args([one.replace("$(FQ_RAY_IP)", "head") for one in arguments])
        assert options.address == "head:6379"


def test_local_asks_for_nothing_special(local: Any) -> None:
    (group,) = local.cluster()["spec"]["workerGroupSpecs"]
    assert group["maxReplicas"] == 1
    for pod in local.pods():
        assert not pod.spec.keys() & {"nodeSelector", "tolerations", "affinity"}, pod.name
        assert "nvidia.com/gpu" not in str(pod.spec), pod.name
