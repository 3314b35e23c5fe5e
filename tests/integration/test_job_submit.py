"""`ray job submit`, as the README has it, from a clean folder to a head that asks for a token."""

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile

import psutil
import pytest
from ray._private.runtime_env.packaging import create_package
from spot_cluster import DisturbedRun, free_port

from pipeline.audit import audit_run
from pipeline.config import REPOSITORY, load_config

STEPS = 1500  # enough to stop it on the way
JOB_TIMEOUT_S = 300


@dataclass
class Head:
    """A head node on loopback, and `ray` as its users type it."""

    environment: dict[str, str]

    def ray(self, *arguments: str, folder: Path | None = None) -> str:
        """What the command printed; AssertionError with it, if it failed."""
        done = subprocess.run(
            [str(Path(sys.executable).parent / "ray"), *arguments],
            cwd=folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=JOB_TIMEOUT_S,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def submit(self, folder: Path, job: str, *command: str) -> None:
        """Sends the job as soon as the head, which has just been started, takes jobs."""
        sent = ("job", "submit", "--no-wait", "--submission-id", job, "--working-dir", ".", "--", *command)
        until = time.monotonic() + JOB_TIMEOUT_S
        while True:
            try:
                self.ray(*sent, folder=folder)
                return
            except AssertionError as error:
                unready = any(text in str(error) for text in ("No available agent", "Failed to connect"))
                if not unready or time.monotonic() > until:
                    raise
                time.sleep(1)

    def status(self, job: str) -> str:
        """A sentence: the job is still running, succeeded, failed or was stopped."""
        return self.ray("job", "status", job)

    def wait_until(self, job: str, condition: Callable[[], bool]) -> None:
        """AssertionError with the job's output, if it fails or takes too long."""
        until, ask_again = time.monotonic() + JOB_TIMEOUT_S, 0.0
        while not condition():
            if time.monotonic() > ask_again:
                failed, ask_again = "failed" in self.status(job), time.monotonic() + 10
                assert not failed and time.monotonic() < until, self.ray("job", "logs", job)
            time.sleep(0.2)


@pytest.fixture
def head() -> Iterator[Head]:
    """A head that takes jobs for this machine alone, with room for two workers."""
    port, dashboard, agent = free_port(), free_port(), free_port()
    scratch = tempfile.mkdtemp(prefix="ray-")  # Ray's socket files need a short path
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_JOB_STOP_WAIT_TIME_S": "120",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on loopback alone (docs/security.md)
        "GLOO_SOCKET_IFNAME": "lo",
        "RAY_ADDRESS": f"http://127.0.0.1:{dashboard}",
    }
    starting = ("start", "--head", "--block", "--num-cpus", "3")
    places = ("--port", str(port), "--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard))
    places += ("--dashboard-agent-listen-port", str(agent))  # by default one port for all heads of a machine
    command = [str(Path(sys.executable).parent / "ray"), *starting, *places, "--temp-dir", scratch]
    own = {name: value for name, value in environment.items() if name != "RAY_ADDRESS"}
    with open(Path(scratch, "start.log"), "wb") as output:
        process = subprocess.Popen(command, env=own, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        yield Head(environment)
    finally:
        started = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        process.wait(timeout=60)
        for child in psutil.wait_procs(started, timeout=10)[1]:
            child.kill()
        shutil.rmtree(scratch, ignore_errors=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The files that git has, with what may lie beside them on a developer's machine."""
    folder = tmp_path / "checkout"
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, folder / name)
    for name in ("data/corpus.txt", ".env", ".git/HEAD", "pipeline/__pycache__/a.pyc", "notes.md"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("not for the cluster")
    return folder


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.split("\0") if name and (REPOSITORY / name).is_file()]


def test_a_job_is_sent_tracked_files_only_and_few(checkout: Path, tmp_path: Path) -> None:
    (checkout / "mine.yaml").write_text("run: {name: mine}")
    create_package(str(checkout), tmp_path / "sent.zip", include_gitignore=True)
    with ZipFile(tmp_path / "sent.zip") as sent:
        names = {entry.filename for entry in sent.infolist() if not entry.is_dir()}
    assert names <= {*tracked(), "mine.yaml"}, sorted(names - set(tracked()))
    packages = {
        name for name in tracked() if name.startswith(("pipeline/", "longlora/", "configs/", "examples/", "pyproject."))
    }
    assert names >= {*packages, "mine.yaml"}, sorted(packages - names)
    assert (tmp_path / "sent.zip").stat().st_size <= 20e6


@pytest.mark.timeout(900)
def test_stopped_and_submitted_again(head: Head, checkout: Path, make_run: Callable, tmp_path: Path) -> None:
    made = make_run(
        "book",
        optimization={"steps": STEPS},
        checkpoint={"every_steps": 2 * STEPS},
        evaluation={"lengths": [64, 128], "tokens": 1024},
        data={"train": [str(tmp_path / "book.txt")], "validation": [str(tmp_path / "book.txt")]},
    )
    shutil.copy(made.config, checkout / "book.yaml")
    line = ("python", "pipeline/main.py", "--config", "book.yaml")
    run = DisturbedRun(made.config, made.folder)

    head.submit(checkout, "first", *line)
    head.wait_until("first", lambda: run.trains(2))
    head.ray("job", "stop", "first")
    assert "was stopped" in head.status("first")
    [saved] = run.events("checkpoint")
    assert saved.step == run.trained() + 1 < STEPS, "the step at which it was stopped is saved"
    said = head.ray("job", "logs", "first")
    assert "the same command goes on from the last checkpoint" in said and "MLflow at" not in said, said

    head.submit(checkout, "second", *line)
    head.wait_until("second", lambda: "succeeded" in head.status("second"))
    [start] = run.events("start")
    assert start.details["checkpoint"] == f"step-{saved.step}"
    said = head.ray("job", "logs", "second")
    assert f"step {STEPS}/{STEPS}" in said and "MLflow at" not in said, said
    assert "extended at 128 tokens: perplexity" in said, "what a task on another node prints"
    assert (made.folder / "export" / "model.safetensors").exists()
    result = audit_run(load_config(made.config), made.folder)
    assert result.whole and result.redone == 0 and result.committed == STEPS
