"""The manifests are closed by default: what pods may do, who reaches whom, where secrets are."""

from typing import Any

import pytest

Object = dict[str, Any]
SECRETS = {"ray-token", "credentials", "postgres"}  # made by hand: cluster/README.md


def test_pods_are_restricted(rendered: Any) -> None:
    """What the namespace's level of pod security asks for, and a token only where the autoscaler needs one."""
    (namespace,) = rendered.of_kind("Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    autoscaler = rendered.cluster()["spec"]["autoscalerOptions"]
    for pod in rendered.pods():
        context = pod.spec["securityContext"]
        assert context["runAsNonRoot"] and context["seccompProfile"] == {"type": "RuntimeDefault"}, pod.name
        assert not pod.spec.keys() & {"hostNetwork", "hostPID", "hostIPC"}, pod.name
        assert not any("hostPath" in volume for volume in pod.spec.get("volumes", [])), pod.name
        assert pod.spec["automountServiceAccountToken"] == (pod.labels.get("ray.io/node-type") == "head"), pod.name
        for container in [*pod.containers(), autoscaler]:
            expected = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
            assert container["securityContext"] == expected, (pod.name, container.get("name"))


def test_every_container_has_limits(rendered: Any) -> None:
    autoscaler = rendered.cluster()["spec"]["autoscalerOptions"]
    for pod in rendered.pods():
        for container in [*pod.containers(), autoscaler]:
            resources = container["resources"]
            assert {"cpu", "memory"} <= resources["limits"].keys(), (pod.name, container.get("name"))
            # More memory than was asked for may not be there when it is wanted.
            assert resources["requests"]["memory"] == resources["limits"]["memory"], (pod.name, container.get("name"))


def test_shared_memory_is_part_of_the_pods_memory(rendered: Any) -> None:
    for pod in rendered.pods():
        if pod.is_ray:
            mounts = {one["mountPath"]: one["name"] for one in pod.spec["containers"][0]["volumeMounts"]}
            volumes = {one["name"]: one for one in pod.spec["volumes"]}
            shared = volumes[mounts["/dev/shm"]]["emptyDir"]
            assert shared["medium"] == "Memory"
            memory = pod.spec["containers"][0]["resources"]["limits"]["memory"]
            assert int(shared["sizeLimit"].removesuffix("Gi")) <= int(memory.removesuffix("Gi")) / 2, pod.name
            assert "emptyDir" in volumes[mounts["/tmp/ray"]], "logs and spilled objects"


def test_secrets_are_named_and_not_there(rendered: Any) -> None:
    assert rendered.of_kind("Secret") == []
    named = set()
    for pod in rendered.pods():
        for container in pod.containers():
            for variable in container.get("env", []):
                if "secretKeyRef" in variable.get("valueFrom", {}):
                    named.add(variable["valueFrom"]["secretKeyRef"]["name"])
                else:
                    assert not any(word in variable["name"] for word in ("PASSWORD", "TOKEN", "SECRET", "KEY"))
            named |= {one["secretRef"]["name"] for one in container.get("envFrom", []) if "secretRef" in one}
    authentication = rendered.cluster()["spec"]["authOptions"]
    assert authentication["mode"] == "token"
    assert named | {authentication["secretName"]} == SECRETS


def test_nothing_is_exposed(rendered: Any) -> None:
    assert rendered.of_kind("Ingress") == []
    assert {one["spec"].get("type", "ClusterIP") for one in rendered.of_kind("Service")} == {"ClusterIP"}
    head = rendered.cluster()["spec"]["headGroupSpec"]
    assert not head.keys() & {"enableIngress", "ingressOptions", "headService", "serviceType"}


def selects(selector: Object, labels: dict[str, str]) -> bool:
    assert selector.keys() <= {"matchLabels"}
    return selector.get("matchLabels", {}).items() <= labels.items()


def reaches(rendered: Any, source: dict[str, str], target: dict[str, str], port: int) -> bool:
    """Whether the network policies let a pod of this namespace connect to another's port."""
    policies = [one["spec"] for one in rendered.of_kind("NetworkPolicy") if selects(one["spec"]["podSelector"], target)]
    assert policies, f"a pod that no policy closes: {target}"
    return any(
        selects(peer["podSelector"], source) and "namespaceSelector" not in peer
        for policy in policies
        for rule in policy.get("ingress", [])
        for peer in rule["from"]
        if port in [one["port"] for one in rule.get("ports", [{"port": port}])]
    )


@pytest.mark.parametrize(
    ("source", "target", "port", "expected"),
    [
        ("cluster data", "cluster head", 6379, True),
        ("cluster head", "cluster data", 40123, True),
        ("train submitter", "train head", 8265, True),
        ("train submitter", "train head", 6379, False),
        ("train submitter", "train data", 8265, False),
        ("cluster head", "mlflow", 5000, True),
        ("train submitter", "mlflow", 5000, False),
        ("mlflow", "postgres", 5432, True),
        ("cluster head", "postgres", 5432, False),
        ("postgres", "mlflow", 5000, False),
        ("mlflow", "cluster head", 8265, False),
    ],
)
def test_network_policies(rendered: Any, source: str, target: str, port: int, expected: bool) -> None:
    labels = {pod.name: pod.labels for pod in rendered.pods()}
    assert reaches(rendered, labels[source], labels[target], port) is expected


def test_network_policies_select_pods_that_exist(rendered: Any) -> None:
    every = [pod.labels for pod in rendered.pods()]
    for policy in rendered.of_kind("NetworkPolicy"):
        peers = [peer for rule in policy["spec"].get("ingress", []) for peer in rule["from"]]
        # The operator lives in another namespace.
        ours = [policy["spec"], *(peer for peer in peers if "namespaceSelector" not in peer)]
        for one in ours:
            assert any(selects(one["podSelector"], labels) for labels in every), policy["metadata"]["name"]


def test_services_lead_to_ports(rendered: Any) -> None:
    for service in rendered.of_kind("Service"):
        (pod,) = [pod for pod in rendered.pods() if service["spec"]["selector"].items() <= pod.labels.items()]
        ports = {one["containerPort"] for container in pod.containers() for one in container.get("ports", [])}
        assert {one["port"] for one in service["spec"]["ports"]} <= ports
