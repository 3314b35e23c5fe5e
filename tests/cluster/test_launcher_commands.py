"""The shell commands of the launcher's YAML files: what bash and Ray make of them, and what then runs."""

import json
import os
import re
import resource
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from ray._private.services import get_node_ip_address
from ray.autoscaler._private.command_runner import _with_interactive
from ray.autoscaler._private.commands import _set_up_config_for_head_node
from ray.autoscaler._private.local.config import LOCAL_CLUSTER_NODE_TYPE
from ray.autoscaler._private.util import prepare_config, with_envs
from ray.scripts.scripts import start as ray_start

CLUSTER = Path(__file__).parent.parent.parent / "cluster"
NAMES = ("aws-spot", "gcp-spot", "on-prem")
each_file = pytest.mark.parametrize("name", NAMES)
each_cloud = pytest.mark.parametrize("name", NAMES[:2])
Launcher = Callable[[str], dict[str, Any]]


def commands(settings: dict[str, Any], key: str) -> list[str]:
    types = settings.get("available_node_types", {}).values()
    return [command for place in (settings, *types) for command in place.get(key, [])]


def one_with(text: str, found: list[str]) -> str:
    (command,) = [command for command in found if text in command]
    return command


@each_file
def test_bash_understands_every_command(name: str, launcher: Launcher) -> None:
    keys = ("initialization_commands", "setup_commands", "head_start_ray_commands", "worker_start_ray_commands")
    every = [command for key in keys for command in commands(launcher(name), key)]
    assert len(every) >= 8
    for command in every:
        checked = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
        assert (checked.returncode, checked.stderr) == (0, ""), command


@each_file
@pytest.mark.parametrize("kind", ["head", "worker"])
def test_ray_knows_the_options_of_its_start(name: str, kind: str, launcher: Launcher) -> None:
    command = one_with("ray start", launcher(name)[f"{kind}_start_ray_commands"])
    assert command.startswith("unset OMP_NUM_THREADS; ulimit -n 65536;")
    options = shlex.split(command.partition("ray start ")[2])
    parsed = ray_start.make_context("ray start", options).params
    assert parsed["head"] == (kind == "head")
    assert parsed["object_spilling_directory"] == "$HOME/scratch/spilled"
    if name == "on-prem":  # where no node type says so
        assert [parsed["num_cpus"], parsed["num_gpus"]] == ([0, 0] if kind == "head" else [None, None])


@each_file
def test_what_stays_in_the_background_is_there_once(name: str, launcher: Launcher) -> None:
    settings = launcher(name)
    background = [
        command
        for key in ("head_start_ray_commands", "worker_start_ray_commands")
        for command in commands(settings, key)
        if command.endswith("&")
    ]
    assert background
    for command in background:
        match = re.search(r"nohup flock -n ~/(\w+)\.lock .* >> ~/(\w+)\.log 2>&1 < /dev/null &$", command)
        assert match and match[1] == match[2]


@pytest.fixture
def home(tmp_path: Path, launcher: Launcher) -> Path:
    """The home folder of a node, with what the launcher copies to it, an environment, and ~/.bashrc as set up."""
    (tmp_path / "longlora").mkdir()
    (tmp_path / "longlora" / "cluster").symlink_to(CLUSTER)
    (tmp_path / "venv").symlink_to(sys.prefix)
    (tmp_path / "scratch").mkdir()
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("0123456789abcdef" * 4, encoding="utf-8")
    bashrc = one_with("node_environment.sh", launcher("on-prem")["setup_commands"])
    for _ in range(2):
        subprocess.run(["bash", "-c", bashrc], check=True, env={"HOME": str(tmp_path), "PATH": os.environ["PATH"]})
    assert (tmp_path / ".bashrc").read_text(encoding="utf-8").count("node_environment.sh") == 1
    return tmp_path


def run(command: str, home: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A command as the launcher runs it by SSH."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
    environment = {"HOME": str(home), "RAY_USAGE_STATS_ENABLED": "0", **kept}
    (script,) = with_envs([command], variables)
    shell = shlex.join(_with_interactive(script)[:-1]) + " " + _with_interactive(script)[-1]
    with (home / "output").open("w+") as output:  # not a pipe, which what stays in the background would keep open
        status = subprocess.run(
            shell, shell=True, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=home
        ).returncode
        output.seek(0)
        return subprocess.CompletedProcess(command, status, output.read())


def processes_of(home: Path) -> list[psutil.Process]:
    """What was started with this home folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("HOME") == str(home):
                found.append(process)
        except psutil.Error:  # gone, or another user's
            continue
    return found


@pytest.fixture
def node(home: Path) -> Iterator[Path]:
    """A home folder; whatever was started there is ended."""
    yield home
    end(home)


def end(home: Path) -> None:
    """Ends what was started there; again, until nothing has started something else meanwhile."""
    while left := processes_of(home):
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=10)


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)
    return found


@each_cloud
def test_the_watcher_runs_on_spot_nodes_alone_and_once(name: str, launcher: Launcher, node: Path) -> None:
    (node / "venv").unlink()
    (node / "venv" / "bin").mkdir(parents=True)
    (node / "venv" / "bin" / "python").write_text('#!/bin/bash\necho "$@" >> ~/started\nexec sleep 60\n')
    (node / "venv" / "bin" / "python").chmod(0o755)
    settings = launcher(name)
    command = one_with("preemption_watcher", settings["worker_start_ray_commands"])
    for node_type in ("gpu_on_demand", "cpu", "gpu_spot", "gpu_spot"):
        assert node_type in settings["available_node_types"]
        finished = run(command, node, RAY_HEAD_IP="10.0.0.1", RAY_NODE_TYPE_NAME=node_type)
        assert finished.returncode == 0, finished.stdout
        time.sleep(0.5)
        assert (node / "started").exists() == (node_type == "gpu_spot")
    script = node / "longlora" / "cluster" / "preemption_watcher.py"
    (started,) = (node / "started").read_text(encoding="utf-8").splitlines()
    assert started == f"{script} --cloud {name.partition('-')[0]} --address 10.0.0.1:6379"


def free_ports(count: int) -> list[int]:
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in servers]
    for server in servers:
        server.close()
    return ports


def listeners(node: Path) -> set[tuple[str, int]]:
    """Addresses and ports at which the node's processes take connections."""
    places = set()
    for process in processes_of(node):
        with suppress(psutil.NoSuchProcess):
            links = process.net_connections("tcp")
            places |= {tuple(link.laddr) for link in links if link.status == psutil.CONN_LISTEN}
    return places


def http_status(url: str, token: str | None = None) -> int:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as response:
            return response.status
    except urllib.error.HTTPError as refusal:
        return refusal.code


def copy_to(node: Path, remote: str, local: str) -> None:
    """A file mount; what is this user's own is made up."""
    place = Path(remote.replace("~", str(node), 1))
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(b"" if local.startswith("~") else (CLUSTER.parent / local).read_bytes())


@pytest.fixture
def started(launcher: Launcher, node: Path) -> Iterator[dict[str, Any]]:
    """on-prem.yaml's head and a worker, started by its commands on free ports of this machine, but without `ray stop`,
    since other clusters may run here. The config names no workers, so that the autoscaler reaches for none."""
    gcs, dashboard, client, head_agent, worker_agent, mlflow = free_ports(6)
    settings = launcher("on-prem")
    config = prepare_config(settings | {"provider": settings["provider"] | {"worker_ips": []}})
    as_it_is = SimpleNamespace(prepare_for_head_node=lambda config: config)
    mounted, _file = _set_up_config_for_head_node(config, as_it_is, no_restart=False)
    for remote, local in mounted["file_mounts"].items():
        copy_to(node, remote, local)
    here = {
        "--head --port=6379": f"--head --port={gcs} --dashboard-port={dashboard} --ray-client-server-port={client} "
        f"--dashboard-agent-listen-port={head_agent}",
        "--address": f"--dashboard-agent-listen-port={worker_agent} --address",
        ":6379": f":{gcs}",
        "--port 5000": f"--port {mlflow}",
        "/mnt/my-share": str(node),
    }
    ip = get_node_ip_address()
    with tempfile.TemporaryDirectory() as short:  # paths of sockets have 107 characters at most
        variables = {"RAY_TMPDIR": short, "RAY_HEAD_IP": ip}
        of_head = {
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": settings["provider"]["head_ip"],
            "RAY_NODE_TYPE_NAME": LOCAL_CLUSTER_NODE_TYPE,
        }
        for key, more in {"head_start_ray_commands": of_head, "worker_start_ray_commands": {}}.items():
            for command in settings[key]:
                if command == "ray stop":
                    continue
                for old, new in here.items():
                    command = command.replace(old, new)
                finished = run(command, node, **variables, **more)
                assert finished.returncode == 0, finished.stdout
        yield {
            "address": f"{ip}:{gcs}",
            "dashboard": dashboard,
            "mlflow": mlflow,
            "variables": variables,
        }
        end(node)


def nodes_of(node: Path, started: dict[str, Any]) -> list[dict[str, float]]:
    """Resources of each node, as a client with the token sees them."""
    script = (
        "import json, sys; from ray._raylet import GcsClient; "
        "nodes = GcsClient(address=sys.argv[1]).get_all_node_info(); "
        "print(json.dumps([dict(node.resources_total) | dict(node.labels) for node in nodes.values()]))"
    )
    seen = run(f"python -c {shlex.quote(script)} {started['address']}", node, **started["variables"])
    return json.loads(seen.stdout.strip().splitlines()[-1])


@pytest.mark.slow
def test_a_cluster_of_ones_own_machines_starts_closed(node: Path, started: dict[str, Any]) -> None:
    head, worker = sorted(nodes_of(node, started), key=lambda resources: resources.get("CPU", 0))
    assert (head.get("CPU", 0), head.get("GPU", 0), head["lifecycle"]) == (0, 0, "on-prem")
    assert worker["CPU"] == os.cpu_count()

    status = run(f"ray status --address {started['address']}", node, **started["variables"])
    assert status.returncode == 0 and f"/{os.cpu_count()}.0 CPU" in status.stdout, status.stdout
    assert f"1 {LOCAL_CLUSTER_NODE_TYPE}\n" in status.stdout, "the autoscaler knows that its head runs"
    right = (node / ".ray" / "auth_token").read_text(encoding="utf-8")
    for other in (f"RAY_AUTH_TOKEN={'f' * 64}", f"HOME={node}/scratch"):  # a wrong token, none
        refused = run(f"{other} ray status --address {started['address']}", node, **started["variables"])
        assert refused.returncode != 0 and "oken" in refused.stdout, refused.stdout

    jobs = f"http://127.0.0.1:{started['dashboard']}/api/jobs/"
    assert [http_status(jobs), http_status(jobs, "f" * 64)] == [401, 403]
    wait_for(lambda: http_status(jobs, right) == 200)
    wait_for(lambda: any(port == started["mlflow"] for _, port in listeners(node)))
    places = {ip for ip, port in listeners(node) if port in (started["dashboard"], started["mlflow"])}
    assert places == {"127.0.0.1"}

    raylets = [process for process in processes_of(node) if process.name() == "raylet"]
    assert len(raylets) == 2
    soft_limit, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    for raylet in raylets:
        assert "OMP_NUM_THREADS" not in raylet.environ()
        assert raylet.environ()["NCCL_DEBUG"] == "WARN"
        assert raylet.rlimit(psutil.RLIMIT_NOFILE)[0] == (65536 if hard_limit >= 65536 else soft_limit)
        assert f"--fallback_directory={node}/scratch/spilled" in raylet.cmdline()
