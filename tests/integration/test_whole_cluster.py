"""All that a run on a cluster has, on one machine: a job, spot nodes, S3, MLflow on PostgreSQL; nodes go and come."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from cloud_metadata import serving
from mlflow import MlflowClient
from object_store import ObjectStore
from ray.job_submission import JobStatus, JobSubmissionClient
from spot_cluster import SLOT, DisturbedRun, SpotCluster, free_port
from tracking_server import TrackingServer, postgresql, postgresql_programs
from upath import UPath

from pipeline.audit import audit_run
from pipeline.config import REPOSITORY, load_config
from pipeline.storage import read_json

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

STEPS = 1500
NOTICE_S = 20
POLL_S = 2.0
"""Between two looks of Ray Train at the nodes, and of its controller at the workers (`session.TRAIN_SETTINGS`)."""
WAIT_S = 600


@pytest.fixture
def server(tmp_path: Path) -> Iterator[TrackingServer]:
    programs = postgresql_programs()
    if programs is None:
        pytest.skip("PostgreSQL's server is not installed (on Debian: apt-get install postgresql)")
    with postgresql(programs) as database:
        server = TrackingServer(tmp_path, database)
        server.start()
        yield server
        server.kill()


@pytest.fixture
def cluster(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[SpotCluster]:
    """Its nodes find the object store by their environment, as machines with a role do, and our Python as `python`."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    with SpotCluster(dashboard_port=free_port()) as cluster:
        cluster.add(), cluster.add()
        yield cluster


class Job:
    """A run that was sent to the cluster as a job."""

    def __init__(self, cluster: SpotCluster, folder: Path, run: DisturbedRun) -> None:
        self.client = JobSubmissionClient(f"http://127.0.0.1:{cluster.dashboard['dashboard_port']}")
        self.run = run
        self.id = self._submit(f"python pipeline/main.py run --config {run.config.name}", folder)

    def _submit(self, entrypoint: str, folder: Path) -> str:
        until = time.monotonic() + WAIT_S
        while True:
            try:
                return self.client.submit_job(entrypoint=entrypoint, runtime_env={"working_dir": str(folder)})
            except RuntimeError as error:  # the head has just been started
                if "No available agent" not in str(error) or time.monotonic() > until:
                    raise
                time.sleep(1)

    def wait_for(self, what: str, condition: Callable[[], bool]) -> None:
        """AssertionError, with what has happened to the run, if the job ends first or it takes too long."""
        until = time.monotonic() + WAIT_S
        while not condition():
            status = self.client.get_job_status(self.id)
            late = time.monotonic() > until
            assert not late and not status.is_terminal(), f"{what}: {status}; {self.run.story()}; {self.logs()}"
            time.sleep(0.2)

    def status(self) -> JobStatus:
        return self.client.get_job_status(self.id)

    def logs(self) -> str:
        return self.client.get_job_logs(self.id)


def test_nodes_go_and_come_under_a_job(
    cluster: SpotCluster, server: TrackingServer, bucket: UPath, make_run: Callable, tmp_path: Path
) -> None:
    made = make_run(
        "run",
        run={"storage": str(bucket / "runs")},
        data={"train": [str(bucket / "books")], "validation": [str(bucket / "books")]},
        context={"length": 512},
        optimization={"steps": STEPS, "learning_rate": 1e-3},
        workers={"min": 1, "max": 2, "resources": SLOT, "resize_interval_s": 2},
        checkpoint={"every_steps": 100},
        evaluation={"lengths": [64, 512], "tokens": 1024},
        tracking={"uri": server.uri},
    )
    (bucket / "books" / "book.txt").write_bytes((tmp_path / "book.txt").read_bytes())
    sent = working_folder(tmp_path / "sent", made.config)
    run = DisturbedRun(made.config, bucket / "runs" / "run")
    job = Job(cluster, sent, run)

    job.wait_for("two workers", lambda: run.trains(2, 20))
    cluster.remove(cluster.nodes[-1])
    job.wait_for("one worker", lambda: run.trains(1, 20))
    server.kill()
    cluster.add()
    job.wait_for("two workers again", lambda: run.trains(2, 20))
    leaving, failures = cluster.nodes[0], len(run.all_events("failure"))
    with serving("aws") as cloud, watching(leaving, cluster, cloud.endpoint):
        announced = time.time()
        cloud.metadata.announce(announced + NOTICE_S)
        job.wait_for("the deadline", lambda: len(run.all_events("failure")) > failures)
    cluster.remove(leaving)
    notice = next(event for event in run.all_events("notice") if event.time > announced)
    assert notice.time - announced < 5 + POLL_S, "drained within 5 s, which Ray Train sees at its next look"
    deadline = notice.time + notice.details["seconds_left"]
    assert deadline == pytest.approx(announced + NOTICE_S, abs=1.5), "AWS's deadline, in whole seconds"
    server.start()
    cluster.add()
    job.wait_for("two workers at last", lambda: run.trains(2, 20))
    job.wait_for("its end", lambda: job.status() == JobStatus.SUCCEEDED)

    result = audit_run(load_config(run.config), run.folder)
    assert result.whole and result.committed == STEPS and result.sequences == STEPS * 5, job.logs()
    [preempted] = [recovery for recovery in result.recoveries if recovery.cause == "preempted"]
    assert preempted.redone == 0, "the run was saved in time"
    assert (run.folder / "export" / "model.safetensors").exists()
    client = MlflowClient(server.uri)
    found = client.get_run(read_json(run.folder / "run.json")["mlflow_run_id"])
    points = client.get_metric_history(found.info.run_id, "train/loss")
    assert found.info.status == "FINISHED", job.logs()
    assert sorted(point.step for point in points) == list(range(STEPS))
    assert "eval/perplexity_512" in found.data.metrics


@contextmanager
def watching(node: Any, cluster: SpotCluster, endpoint: str) -> Iterator[None]:
    """The watcher, as it runs on a spot machine of AWS; here all nodes have one address, so it is told which is its."""
    script = str(REPOSITORY / "cluster" / "preemption_watcher.py")
    places = ("--cloud", "aws", "--endpoint", endpoint, "--address", cluster.address, "--node-id", node.node_id)
    process = subprocess.Popen([sys.executable, script, *places])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def working_folder(folder: Path, config: Path) -> Path:
    """What a job is sent: the packages, by links, and a config."""
    folder.mkdir()
    for name in ("longlora", "pipeline", "configs", "examples", "pyproject.toml"):
        os.symlink(REPOSITORY / name, folder / name)
    (folder / config.name).write_text(yaml.safe_dump(yaml.safe_load(config.read_text())))
    return folder
