"""The manifests as `kubectl kustomize` renders them, and the pods that come of them."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

ROOT = Path(__file__).parents[3]
KUBERNETES = ROOT / "cluster" / "kubernetes"

Object = dict[str, Any]


class Pod(NamedTuple):
    name: str
    labels: dict[str, str]
    spec: Object
    is_ray: bool = False

    def containers(self) -> list[Object]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]


class Rendered:
    """The objects of one folder."""

    def __init__(self, folder: str, objects: list[Object]) -> None:
        self.folder = folder
        self.objects = objects

    def of_kind(self, kind: str) -> list[Object]:
        return [one for one in self.objects if one["kind"] == kind]

    def cluster(self) -> Object:
        (cluster,) = self.of_kind("RayCluster")
        return cluster

    def settings(self) -> dict[str, str]:
        (settings,) = self.of_kind("ConfigMap")
        return settings["data"]

    def pods(self) -> list[Pod]:
        """The pods that the objects lead to, with the labels that KubeRay adds to its own."""
        templates = [one for kind in ("Deployment", "StatefulSet") for one in self.of_kind(kind)]
        pods = [_pod(one["metadata"]["name"], one["spec"]["template"]) for one in templates]
        for job in self.of_kind("RayJob"):
            pods += [_pod(f"{job['metadata']['name']} submitter", job["spec"]["submitterPodTemplate"])]
            pods += _ray_pods(job["metadata"]["name"], job["spec"]["rayClusterSpec"])
        return [*pods, *_ray_pods("cluster", self.cluster()["spec"])]


def _pod(name: str, template: Object, **more: str) -> Pod:
    return Pod(name, {**template.get("metadata", {}).get("labels", {}), **more}, template["spec"], bool(more))


def _ray_pods(name: str, cluster: Object) -> Iterator[Pod]:
    groups = [("head", "head", cluster["headGroupSpec"])]
    groups += [(group["groupName"], "worker", group) for group in cluster["workerGroupSpecs"]]
    for group, kind, spec in groups:
        labels = {"ray.io/is-ray-node": "yes", "ray.io/node-type": kind}
        yield _pod(f"{name} {group}", spec["template"], **labels)


@cache
def _render(folder: str) -> Rendered:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not there")
    version = subprocess.run(["kubectl", "version", "--client"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"Kustomize Version: v(\d+)", version)
    if found is None or int(found[1]) < 5:
        pytest.skip("kubectl is older than 1.27: its kustomize knows no anchors in lists, or no replacements")
    rendered = subprocess.run(
        ["kubectl", "kustomize", str(KUBERNETES / folder)], capture_output=True, text=True, check=False
    )
    assert rendered.returncode == 0, rendered.stderr[-2000:]
    return Rendered(folder, list(yaml.safe_load_all(rendered.stdout)))


@pytest.fixture(params=["base", "local"])
def rendered(request: pytest.FixtureRequest) -> Rendered:
    return _render(request.param)


@pytest.fixture
def base() -> Rendered:
    return _render("base")


@pytest.fixture
def local() -> Rendered:
    return _render("local")
