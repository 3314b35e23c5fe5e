"""Closed by default: what listens, what is asked for a token, and what of the environment is written down."""

import ipaddress
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from urllib.error import HTTPError

import psutil
import pytest

SECRETS = (
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "HF_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "PGPASSWORD",
    "RAY_AUTH_TOKEN",
)
PLANTED = {name: f"planted-{name.lower()}" for name in SECRETS}
START_TIMEOUT_S = 120


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A folder with a short name: Ray makes sockets in it, whose paths have 107 characters at most."""
    folder = Path(tempfile.mkdtemp(prefix="t"))
    yield folder
    shutil.rmtree(folder)


def tree(pid: int) -> list[psutil.Process]:
    try:
        return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def look(pid: int, listening: dict[str, set[tuple[str, int]]], commands: set[str]) -> None:
    """Adds the addresses that a process and its children listen on, by the name of the process, and what `ps` shows."""
    for process in tree(pid):
        with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            command = process.cmdline()
            commands.add(" ".join(command))
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    listening[command[0].rpartition("/")[2].split(".")[0]].add(connection.laddr)


def is_loopback(address: str) -> bool:
    ip = ipaddress.ip_address(address)
    return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback


def reached_from_outside(listening: dict[str, set[tuple[str, int]]]) -> list[tuple[str, str]]:
    return sorted((name, ip) for name, found in listening.items() for ip, _ in found if not is_loopback(ip))


def test_a_run_listens_on_loopback_alone_and_keeps_no_secret(
    make_run: Callable, temporary: Path, tmp_path: Path
) -> None:
    run = make_run("run", optimization={"steps": 1_000_000})
    run.environment |= {**PLANTED, "TMPDIR": str(temporary)}
    listening: dict[str, set[tuple[str, int]]] = defaultdict(set)
    commands: set[str] = set()
    driver = run.start("train")
    until = time.monotonic() + START_TIMEOUT_S
    while len(run.records()) < 3:
        assert driver.poll() is None and time.monotonic() < until, driver.communicate()[0]
        look(driver.pid, listening, commands)
        time.sleep(1)
    look(driver.pid, listening, commands)
    driver.send_signal(signal.SIGINT)
    output, _ = driver.communicate(timeout=START_TIMEOUT_S)
    assert driver.returncode == 130, output

    assert {"gcs_server", "raylet", "ray::RayTrainWorker"} <= set(listening)
    assert len(listening["ray::RayTrainWorker"]) >= 5, "each worker's own and Gloo's, and torch's store"
    assert reached_from_outside(listening) == []

    [folder] = temporary.glob("longlora-*")
    assert folder.stat().st_mode & 0o077 == 0, "Ray's sockets, logs and spilled objects are for this user alone"
    files = [path for top in (tmp_path, temporary) for path in top.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"mlflow.db", "config.yaml", "run.json", "attempt-1.jsonl", "raylet.out", "runtime_env_agent.log"} <= names
    for secret in PLANTED.values():
        assert secret not in output
        assert [command for command in commands if secret in command] == []
        assert [path for path in files if secret.encode() in path.read_bytes()] == []


@contextmanager
def ray_head(temporary: Path, port: int) -> Iterator["subprocess.Popen[str]"]:
    """A head that takes jobs, for this machine alone; never ended by `ray stop`, which ends any."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=1"]
    client, agent = free_ports(2)
    command += [f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}", "--port=0"]
    command += [f"--dashboard-port={port}", f"--temp-dir={temporary / 'ray'}"]
    environment = {**os.environ, **PLANTED, "RAY_AUTH_MODE": "token", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    with open(temporary / "log", "w") as log:
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=log, text=True)
    try:
        yield head
    finally:
        started = tree(head.pid)
        for process in started:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        head.wait()
        psutil.wait_procs(started, timeout=30)


def free_ports(number: int) -> list[int]:
    with ExitStack() as taken:
        servers = [taken.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)]
        return [server.getsockname()[1] for server in servers]


def ask(url: str, token: str | None, job: dict[str, str] | None = None) -> tuple[int, str]:
    """Status and text of the answer; (0, "") if there is none. job: to submit; without one the jobs are asked for."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    request = urllib.request.Request(url, json.dumps(job).encode() if job else None, headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except HTTPError as error:
        return error.code, ""
    except OSError:
        return 0, ""


def test_the_job_api_takes_no_job_without_the_token(temporary: Path) -> None:
    [port] = free_ports(1)
    jobs, token = f"http://127.0.0.1:{port}/api/jobs/", PLANTED["RAY_AUTH_TOKEN"]
    job = {"entrypoint": f"touch {temporary / 'marker'}"}
    with ray_head(temporary, port) as head:
        until = time.monotonic() + START_TIMEOUT_S
        while ask(jobs, token) != (200, "[]"):
            assert head.poll() is None and time.monotonic() < until, (temporary / "log").read_text()
            time.sleep(0.5)
        assert (ask(jobs, None, job)[0], ask(jobs, None)[0]) == (401, 401)
        assert (ask(jobs, "another", job)[0], ask(jobs, "another")[0]) == (403, 403)
        assert ask(jobs, token) == (200, "[]") and not (temporary / "marker").exists()
        assert ask(jobs, token, job)[0] == 200

        listening: dict[str, set[tuple[str, int]]] = defaultdict(set)
        look(head.pid, listening, set())
        assert port in {at for found in listening.values() for _, at in found}
        assert reached_from_outside(listening) == []
