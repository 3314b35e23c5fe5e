"""The clouds announce, the watcher drains: against servers that answer as the clouds' metadata services do."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from cloud_metadata import METADATA, Service, serving

from cluster import preemption_watcher
from cluster.preemption_watcher import CLOUDS, LocalNodes, NotDrained, Notice, Unusable, Watcher, detect, parser

pytestmark = pytest.mark.timeout(120)

SCRIPT = Path(preemption_watcher.__file__)


WINDOW_S = {"aws": 120, "gcp": 30, "azure": 30}
each_cloud = pytest.mark.parametrize("name", METADATA)


class Drains(list):
    """What was drained; the first `failures` attempts fail."""

    def __init__(self, failures: int = 0) -> None:
        self.failures = failures

    def __call__(self, notice: Notice) -> list[str]:
        if self.failures:
            self.failures -= 1
            raise NotDrained("the control service is away")
        self.append(notice)
        return ["node"]


def watcher_of(name: str, service: Service, drains: Drains) -> Watcher:
    return Watcher(lambda: CLOUDS[name](service.endpoint), drains)


@each_cloud
def test_one_notice_is_one_drain(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    drains = Drains()
    with serving(name) as service:
        watcher = watcher_of(name, service, drains)
        for _ in range(3):
            watcher.poll()
        assert drains == []
        deadline = time.time() + WINDOW_S[name]
        service.metadata.announce(deadline)
        for _ in range(3):
            watcher.poll()
    (notice,) = drains
    assert notice.deadline == pytest.approx(deadline, abs=1)  # the clouds' times have whole seconds
    watching, noticed, drained = (line.split(" ", 1)[1] for line in capsys.readouterr().out.splitlines())
    assert watching == f"watching {CLOUDS[name].name}"
    assert noticed.startswith(f"notice: {notice.what}; ") and noticed.endswith(" s left")
    assert drained == "drained node node"


def test_aws_renews_its_token() -> None:
    drains = Drains()
    with serving("aws") as service:
        watcher = watcher_of("aws", service, drains)
        watcher.poll()
        service.metadata.token = "token-2"
        service.metadata.announce(time.time() + 100)
        watcher.poll()
    assert len(drains) == 1


def test_azure_drains_at_once_when_the_event_has_started() -> None:
    drains = Drains()
    with serving("azure") as service:
        service.metadata.announce(None)
        watcher_of("azure", service, drains).poll()
    assert drains[0].deadline == pytest.approx(time.time(), abs=1)


def answering(status: int, body: str) -> Callable[[BaseHTTPRequestHandler], None]:
    def respond(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.end_headers()
        handler.wfile.write(body.encode())

    return respond


def cut_off(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nTR")


FAILURES = {
    "error": answering(500, "out of order"),
    "not JSON": answering(200, "<html>please log in</html>"),
    "other JSON": answering(200, '["Events"]'),
    "cut off": cut_off,
    "no HTTP": lambda handler: handler.wfile.write(b"\x00\x01\x02\r\n\r\n"),
}


@each_cloud
@pytest.mark.parametrize("failure", FAILURES)
def test_a_failing_endpoint_is_one_line(name: str, failure: str, capsys: pytest.CaptureFixture[str]) -> None:
    drains = Drains()
    with serving(name) as service:
        watcher = watcher_of(name, service, drains)
        watcher.poll()
        capsys.readouterr()
        service.failure = FAILURES[failure]
        for _ in range(3):
            watcher.poll()
        (line,) = capsys.readouterr().out.splitlines()
        assert line.endswith("; trying again") and service.endpoint in line
        assert drains == []
        service.failure = None
        service.metadata.announce(time.time() + 30)
        watcher.poll()
        assert "the metadata service answers again" in capsys.readouterr().out
    assert len(drains) == 1


@each_cloud
def test_an_endpoint_that_is_away_is_waited_for(name: str) -> None:
    drains = Drains()
    with serving(name) as service:
        service.stop()
        watcher = watcher_of(name, service, drains)
        watcher.poll()
        assert watcher.trouble.endswith("Connection refused; trying again")
        service.start()
        service.metadata.announce(time.time() + 30)
        watcher.poll()
    assert len(drains) == 1


@each_cloud
def test_a_slow_endpoint_is_given_up(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preemption_watcher, "TIMEOUT_S", 0.1)
    answered = threading.Event()
    with serving(name) as service:
        watcher = watcher_of(name, service, Drains())
        service.failure = lambda handler: answered.wait(30) and None
        watcher.poll()
        answered.set()
    assert watcher.trouble.endswith("timed out; trying again")


@pytest.mark.parametrize("name", ["gcp", "azure"])
def test_where_404_is_no_answer(name: str) -> None:
    """On AWS it is the answer: no notice. GKE's own metadata service has no `preempted`, which must be seen."""
    with serving(name) as service:
        service.failure = answering(404, "")
        watcher = watcher_of(name, service, Drains())
        watcher.poll()
    assert watcher.trouble.endswith("HTTP 404; trying again")


@each_cloud
def test_the_cloud_is_detected(name: str) -> None:
    with serving(name) as service:
        assert type(detect(service.endpoint)) is CLOUDS[name]


def test_detection_waits_for_a_cloud() -> None:
    drains = Drains()
    with serving("gcp") as service:
        service.failure = answering(404, "")
        with pytest.raises(Unusable, match=f"no cloud's metadata service answers at {service.endpoint}"):
            detect(service.endpoint)
        watcher = Watcher(lambda: detect(service.endpoint), drains)
        watcher.poll()
        service.failure = None
        service.metadata.announce(0)
        watcher.poll()
    assert len(drains) == 1


def test_draining_is_tried_again(capsys: pytest.CaptureFixture[str]) -> None:
    drains = Drains(failures=3)
    with serving("gcp") as service:
        watcher = watcher_of("gcp", service, drains)
        service.metadata.announce(0)
        started = time.time()
        for _ in range(5):
            watcher.poll()
    assert [notice.deadline for notice in drains] == [pytest.approx(started + 30, abs=1)], "counted from the notice on"
    assert capsys.readouterr().out.count("not drained: the control service is away; trying again until") == 1


def test_draining_is_given_up_at_the_deadline(capsys: pytest.CaptureFixture[str]) -> None:
    drains = Drains(failures=1)
    with serving("aws") as service:
        watcher = watcher_of("aws", service, drains)
        service.metadata.announce(time.time() - 1)
        watcher.poll()
        watcher.poll()
    assert "given up at the deadline, not drained: the control service is away" in capsys.readouterr().out
    assert drains == [] and watcher.pending is None


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--cloud ibm", "'ibm'"),
        ("--endpoint 127.0.0.1:8000", "'127.0.0.1:8000'"),
        ("--endpoint http://host:70000", "'http://host:70000'"),
        ("--interval 0", "'0'"),
        ("--interval nan", "'nan'"),
        ("--interval often", "'often'"),
        ("--address ray://head:10001", "'ray://head:10001'"),
        ("--address head", "'head'"),
        ("--node-id 0123", "'0123'"),
        ("--node-ip head", "'head'"),
        (f"--node-ip 10.0.0.1 --node-id {'ab' * 28}", "--node-id: not allowed with argument --node-ip"),
        ("now", "unrecognized arguments: now"),
    ],
)
def test_a_wrong_argument_is_one_line(arguments: str, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parser().parse_args(arguments.split())
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and named in line


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@contextmanager
def running_watcher(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The script as a node runs it, where a proxy is configured that does not answer."""
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "http_proxy": f"http://127.0.0.1:{free_port()}"}
    command = [sys.executable, str(SCRIPT), "--interval", "0.2", *arguments]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd="/"
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def lines_until(process: subprocess.Popen[str], text: str) -> list[str]:
    """What it logs, up to a line with this text; fails at the end of the output."""
    lines = []
    for line in process.stdout or ():
        lines.append(line.rstrip())
        if text in line:
            return lines
    raise AssertionError(f"{text!r} is not in {lines}")


@pytest.mark.slow
def test_a_ray_cluster_that_is_away_is_asked_until_the_deadline() -> None:
    address = f"127.0.0.1:{free_port()}"
    with (
        serving("aws") as service,
        running_watcher("--endpoint", service.endpoint, "--address", address) as process,
    ):
        assert "no node to drain yet: cannot ask the Ray cluster: " in lines_until(process, "watching AWS")[0]
        service.metadata.announce(time.time() + 6)
        lines = lines_until(process, "given up at the deadline")
        assert process.poll() is None
    assert sum("trying again until" in line for line in lines) == 1


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[Any]:
    """A head and a worker node, both on loopback, with a driver connected."""
    import ray
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")  # on loopback, for the length of a test
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        patch.setattr("ray._private.ray_constants.ENABLE_RAY_CLUSTER", False)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        cluster.add_node(num_cpus=1, resources={"slot": 1})
        ray.init(address=cluster.address, log_to_driver=False)
        yield cluster
        ray.shutdown()
        cluster.shutdown()


def test_the_nodes_of_this_machine_are_found(ray_cluster: Any) -> None:
    node_ids = [node.node_id for node in (ray_cluster.head_node, *ray_cluster.worker_nodes)]
    assert sorted(LocalNodes(ray_cluster.address, None, None).find()[1]) == sorted(node_ids)
    assert LocalNodes(ray_cluster.address, node_ids[1], None).find()[1] == node_ids[1:]
    with pytest.raises(NotDrained, match="has no live node abab"):
        LocalNodes(ray_cluster.address, "ab" * 28, None).find()
    with pytest.raises(NotDrained, match=r"has no live node at 203\.0\.113\.1"):
        LocalNodes(ray_cluster.address, None, "203.0.113.1").find()


def test_the_right_ray_node_is_drained(ray_cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray
    from ray._private.state import state

    @ray.remote(resources={"slot": 1})
    class Work:  # an idle node would end as soon as it is drained
        def ready(self) -> bool:
            return True

    # Detached, for nothing but the end of the cluster is to end it.
    work = Work.options(name="work", lifetime="detached").remote()
    assert ray.get(work.ready.remote())
    (worker,) = ray_cluster.worker_nodes
    monkeypatch.setenv("RAY_ADDRESS", ray_cluster.address)
    deadline = int(time.time()) + 100
    with (
        serving("aws") as service,
        running_watcher("--endpoint", service.endpoint, "--node-id", worker.node_id) as process,
    ):
        lines_until(process, "watching AWS")
        assert state.get_draining_nodes() == {}
        service.metadata.announce(deadline)
        lines_until(process, f"drained node {worker.node_id}")
        assert process.poll() is None
    assert state.get_draining_nodes() == {worker.node_id: deadline * 1000}
