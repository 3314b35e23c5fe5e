"""The launcher's YAML files go through Ray's code for each cloud: against stand-ins of EC2, IAM and GCP."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import pytest
from botocore.client import BaseClient
from moto import mock_aws
from ray.autoscaler._private.aws import utils as aws_utils
from ray.autoscaler._private.aws.config import bootstrap_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config
from ray.autoscaler.tags import TAG_RAY_LAUNCH_CONFIG, TAG_RAY_NODE_KIND, TAG_RAY_USER_NODE_TYPE

from cluster.preemption_watcher import __file__ as watcher_file

Launcher = Callable[[str], dict[str, Any]]
CLUSTER = Path(watcher_file).parent


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operations that are asked of AWS, as IAM names them."""
    made: list[str] = []
    ask = BaseClient._make_api_call

    def record(client: Any, operation: str, parameters: Any) -> Any:
        made.append(f"{client.meta.service_model.service_name}:{operation}")
        return ask(client, operation, parameters)

    monkeypatch.setattr(BaseClient, "_make_api_call", record)
    return made


@pytest.fixture
def aws(launcher: Launcher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """The config for AWS, in an account that has the security group and the instance profiles that it names."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("HOME", str(tmp_path))  # for the key pair
    aws_utils.resource_cache.cache_clear()
    config = prepare_config(launcher("aws-spot"))
    with mock_aws():
        ec2 = boto3.client("ec2", config["provider"]["region"])
        (vpc,) = ec2.describe_vpcs(Filters=[{"Name": "is-default", "Values": ["true"]}])["Vpcs"]
        group = ec2.create_security_group(GroupName="mine", Description="mine", VpcId=vpc["VpcId"])["GroupId"]
        (image, *_) = ec2.describe_images()["Images"]
        iam = boto3.client("iam", config["provider"]["region"])
        for node_type in config["available_node_types"].values():
            node_config = node_type["node_config"]
            node_config["SecurityGroupIds"] = [group]
            node_config["ImageId"] = image["ImageId"]
            profile = node_config["IamInstanceProfile"]["Name"]
            if profile not in [
                known["InstanceProfileName"] for known in iam.list_instance_profiles()["InstanceProfiles"]
            ]:
                iam.create_instance_profile(InstanceProfileName=profile)
        yield config
    aws_utils.resource_cache.cache_clear()


def launch(provider: AWSNodeProvider, config: dict[str, Any], name: str) -> Any:
    """One node of a type, as the launcher and the autoscaler ask for it."""
    kind = "head" if name == config["head_node_type"] else "worker"
    tags = {TAG_RAY_NODE_KIND: kind, TAG_RAY_USER_NODE_TYPE: name, TAG_RAY_LAUNCH_CONFIG: "hash"}
    (node,) = provider.create_node(config["available_node_types"][name]["node_config"], tags, 1).values()
    return node


def test_ray_makes_no_role_and_opens_no_port(aws: dict[str, Any], calls: list[str]) -> None:
    """With a security group and instance profiles of the user's, Ray adds none of its own, which would allow more."""
    bootstrap_aws(aws)
    assert not [call for call in calls if re.search("Create|Authorize|Attach|Put", call) and "KeyPair" not in call]


def test_ec2_gets_the_nodes_that_are_described(aws: dict[str, Any]) -> None:
    config = bootstrap_aws(aws)
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    ec2 = boto3.client("ec2", config["provider"]["region"])
    for name in config["available_node_types"]:
        node = launch(provider, config, name)
        (described,) = ec2.describe_instances(InstanceIds=[node.id])["Reservations"][0]["Instances"]
        assert (described.get("InstanceLifecycle") == "spot") == (name == "gpu_spot")
        assert described["MetadataOptions"]["HttpTokens"] == "required"
        (volume,) = ec2.describe_volumes(Filters=[{"Name": "attachment.instance-id", "Values": [node.id]}])["Volumes"]
        assert (volume["Size"], volume["VolumeType"], volume["Encrypted"]) == (200, "gp3", True)
        profile = described["IamInstanceProfile"]["Arn"].rpartition("/")[2]
        assert profile == ("my-head-profile" if name == "head" else "my-worker-profile")


def test_resources_are_those_of_the_machines(aws: dict[str, Any]) -> None:
    """Ray itself would look them up; written down they can be read, and are the same."""
    written = {name: dict(settings["resources"]) for name, settings in aws["available_node_types"].items()}
    for settings in aws["available_node_types"].values():
        settings["resources"] = {}
    found = AWSNodeProvider.fillout_available_node_types_resources(aws)["available_node_types"]
    del written["head"]
    for name, resources in written.items():
        assert resources == {key: found[name]["resources"][key] for key in resources}
        assert ("GPU" in found[name]["resources"]) == ("GPU" in resources)


def test_the_heads_rights_suffice(aws: dict[str, Any], calls: list[str]) -> None:
    """What the autoscaler asks of EC2 from the head is what the header says, no more and no less."""
    config = bootstrap_aws(aws)
    calls.clear()
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    node = launch(provider, config, "gpu_spot")
    provider.non_terminated_nodes({})
    provider.set_node_tags(node.id, {"ray-node-status": "up-to-date"})
    provider.external_ip(node.id), provider.internal_ip(node.id)
    provider.terminate_nodes([node.id])
    header = (CLUSTER / "aws-spot.yaml").read_text(encoding="utf-8").partition("cluster_name:")[0]
    assert set(calls) == set(re.findall(r"ec2:\w+", header))


class Api:
    """GCP's API, as far as it is told: `Api(answers)` answers `projects.get` to `projects().get(…).execute()`."""

    def __init__(self, answers: dict[str, Any], path: str = "") -> None:
        self.answers, self.path = answers, path
        self._http = None

    def __getattr__(self, name: str) -> Callable[..., "Api"]:
        def call(**arguments: Any) -> Api:
            api = Api(self.answers, f"{self.path}.{name}".lstrip("."))
            self.answers.setdefault("calls", []).append((api.path, arguments))
            return api

        return call

    def execute(self, **_: Any) -> Any:
        return self.answers[self.path]


@pytest.fixture
def gcp(launcher: Launcher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """The config for GCP after Ray's preparations, the API that it spoke to, and Ray's provider."""
    pytest.importorskip("googleapiclient", reason="Ray's code for GCP needs google-api-python-client (the gcs extra)")
    from ray.autoscaler._private.gcp import config as gcp_config
    from ray.autoscaler._private.gcp import node, node_provider

    own = {"email": "ray-autoscaler-sa-v1@my-project.iam.gserviceaccount.com", "projectId": "my-project"}
    answers: dict[str, Any] = {
        "projects.get": {
            "lifecycleState": "ACTIVE",
            "projectId": "my-project",
            "name": "my-project",
            "commonInstanceMetadata": {},
        },
        "projects.serviceAccounts.get": own,
        "projects.getIamPolicy": {"bindings": []},
        "projects.setIamPolicy": {},
        "projects.setCommonInstanceMetadata": {"name": "operation"},
        "globalOperations.get": {"status": "DONE"},
        "instances.insert": {"name": "operation"},
        "zoneOperations.get": {"status": "DONE"},
    }
    api = Api(answers)
    monkeypatch.setenv("HOME", str(tmp_path))
    for module in (gcp_config, node_provider):
        monkeypatch.setattr(module, "construct_clients_from_provider_config", lambda _: (api, api, api, None))
    monkeypatch.setattr(node.GCPCompute, "get_new_authorized_http", lambda *_: None)
    config = gcp_config.bootstrap_gcp(prepare_config(launcher("gcp-spot")))
    provider = node_provider.GCPNodeProvider(config["provider"], config["cluster_name"])
    return SimpleNamespace(config=config, answers=answers, provider=provider)


def inserted(gcp: SimpleNamespace, name: str) -> dict[str, Any]:
    """What GCP is asked for as one node of a type."""
    node_config = gcp.config["available_node_types"][name]["node_config"]
    head = gcp.config["head_node"] if name == "head" else {}
    tags = {"ray-node-name": f"ray-longlora-{name.replace('_', '-')}", TAG_RAY_USER_NODE_TYPE: name}
    gcp.provider.create_node(head | node_config, tags, 1)
    _, arguments = [call for call in gcp.answers["calls"] if call[0] == "instances.insert"][-1]
    return arguments["body"]


@pytest.mark.parametrize("name", ["head", "gpu_spot", "gpu_on_demand", "cpu"])
def test_gcp_gets_an_instance_that_it_knows(gcp: SimpleNamespace, name: str) -> None:
    body = inserted(gcp, name)
    assert unknown(body, "Instance", compute_schemas()) == []
    (account,) = body["serviceAccounts"]
    assert account["email"] == f"my-{'head' if name == 'head' else 'worker'}@my-project.iam.gserviceaccount.com"
    assert (body.get("scheduling", {}).get("provisioningModel") == "SPOT") == (name == "gpu_spot")
    assert "subnetworks.list" not in [path for path, _ in gcp.answers["calls"]], "Ray would take any subnetwork"
    assert all(re.fullmatch(r"[a-z][a-z0-9_-]{0,62}", label) for label in body["labels"])


def compute_schemas() -> dict[str, Any]:
    import googleapiclient

    path = Path(googleapiclient.__file__).parent / "discovery_cache" / "documents" / "compute.v1.json"
    return json.loads(path.read_text(encoding="utf-8"))["schemas"]


def unknown(value: Any, schema: str | dict[str, Any], schemas: dict[str, Any], path: str = "") -> list[str]:
    """Where a value is not what the published description of the API says: keys, types and words that it has not."""
    described = schemas[schema] if isinstance(schema, str) else schema
    if "$ref" in described:
        return unknown(value, described["$ref"], schemas, path)
    kinds = {"object": dict, "array": list, "string": str | int, "boolean": bool, "integer": int}
    if not isinstance(value, kinds[described["type"]]):
        return [f"{path}: {value!r} is no {described['type']}"]
    if isinstance(value, list):
        return [line for entry in value for line in unknown(entry, described["items"], schemas, path)]
    if isinstance(value, dict) and "properties" in described:
        known = described["properties"]
        return [f"{path}.{key}" for key in value if key not in known] + [
            line for key in value if key in known for line in unknown(value[key], known[key], schemas, f"{path}.{key}")
        ]
    return [f"{path}: {value}"] if value not in described.get("enum", [value]) else []
