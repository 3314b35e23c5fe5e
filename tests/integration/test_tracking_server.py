"""MLflow stays whole whatever its server does: a real one, that is started late, killed, stopped, and started again."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from tracking_server import TrackingServer, postgresql, postgresql_programs
from upath import UPath

from pipeline import tracking
from pipeline.config import REPOSITORY, ConfigError, parse_config
from pipeline.ledger import StepRecord
from pipeline.run_log import RunLog
from pipeline.storage import read_json
from pipeline.tracking import deliver

COUNTS = {"sequences": 3, "sequence_length": 100, "tokens": 290, "target_tokens": 285, "documents": 5}
PACKS = {"training": {"uri": "/packs/0a", "fingerprint": "0a", **COUNTS}}
STARTED = {"checkpoint": None, "attention": "sdpa", "discarded": [], "packs": PACKS}
SAMPLE = {"node": 0, "nodes": 1, "values": {"cpu_utilization_percentage": 35.0}}
WAIT_S = 120.0
"""For something that takes seconds on an idle machine."""


@pytest.fixture(scope="module", params=["sqlite"])
def down(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrackingServer]:
    """A server that has not been started yet."""
    with contextlib.ExitStack() as stack:
        store = ""
        if request.param == "postgresql":
            programs = postgresql_programs()
            if programs is None:
                pytest.skip("PostgreSQL's server is not installed (on Debian: apt-get install postgresql)")
            store = stack.enter_context(postgresql(programs))
        server = TrackingServer(tmp_path_factory.mktemp("server"), store)
        stack.callback(server.kill)
        yield server


@pytest.fixture
def server(down: TrackingServer) -> TrackingServer:
    if not down.runs:
        down.start()
    return down


on_each_store = pytest.mark.parametrize("down", ["sqlite", "postgresql"], indirect=True)


@pytest.fixture
def new_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Config values of a run; tries again after at most a second, which is up to a minute otherwise."""
    monkeypatch.setattr(tracking, "LONGEST_DELAY_S", 1.0)
    monkeypatch.setattr(tracking, "PATIENCE_S", WAIT_S)

    def make(uri: str, experiment: str = "longlora", name: str = "watched") -> dict[str, Any]:
        config = parse_config(
            {
                "run": {"name": name, "storage": str(tmp_path)},
                "model": {"base": "some/model"},
                "context": {"length": 100},
                "attention": {"group_size": 20},
                "data": {"train": ["books"]},
                "optimization": {"steps": 1000, "global_batch": 2, "warmup_steps": 0},
                "tracking": {"uri": uri, "experiment": experiment},
            }
        )
        (tmp_path / name).mkdir(exist_ok=True)
        return config.model_dump(mode="json")

    return make


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def until_said(log: RunLog, lines: int) -> None:
    until(lambda: len(log.status().messages) == lines)


def record(step: int) -> StepRecord:
    return StepRecord(
        step=step,
        world_size=2,
        first_position=2 * step,
        sequences=[0, 1],
        token_hash="00",
        loss=2.0 + step / 1000,
        target_tokens=190,
        time=time.time(),
        tokens=200,
        seconds=4.0,
        learning_rate=1e-3,
        gradient_norm=0.5,
    )


def train(log: RunLog, step: int) -> None:
    log.step(log.status().attempt, record(step))


def begin(values: dict[str, Any], step: int = 0) -> RunLog:
    log = RunLog(values, str(Path(values["run"]["storage"]) / values["run"]["name"]), os.getpid())
    log.start_attempt(2, step, STARTED)
    return log


def known_of(log: RunLog) -> dict[str, str]:
    """What run.json says."""
    record = log.folder / "run.json"
    return read_json(record) if record.exists() else {}


def tracked(server: TrackingServer, log: RunLog) -> Run:
    """The run on the server; there is one, and it is that of run.json."""
    client, known = MlflowClient(server.uri), known_of(log)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    [run] = client.search_runs(experiments, f"tags.`longlora.run` = '{known['mlflow_key']}'")
    assert run.info.run_id == known["mlflow_run_id"]
    return run


def steps_of(server: TrackingServer, log: RunLog, metric: str = "train/loss") -> list[int]:
    run_id = tracked(server, log).info.run_id
    return [point.step for point in MlflowClient(server.uri).get_metric_history(run_id, metric)]


def whole(server: TrackingServer, log: RunLog, steps: int) -> None:
    """Every metric of every step is there, once, with its value."""
    run = tracked(server, log)
    client = MlflowClient(server.uri)
    expected = [(step, 2.0 + step / 1000) for step in range(steps)]
    losses = client.get_metric_history(run.info.run_id, "train/loss")
    assert sorted((point.step, point.value) for point in losses) == expected
    for metric in ("train/world_size", "train/gradient_norm", "run/attempt", "run/disturbances"):
        assert sorted(steps_of(server, log, metric)) == list(range(steps))
    assert sorted(steps_of(server, log, "train/loss_by_tokens")) == [200 * (step + 1) for step in range(steps)]
    assert run.info.status == "FINISHED"


@on_each_store
def test_a_server_that_is_started_after_the_run(down: TrackingServer, new_run: Callable) -> None:
    log = begin(new_run(down.uri))
    for step in range(20):
        train(log, step)
    until_said(log, 1)
    assert log.status().messages[0].startswith(f"MLflow at {down.uri} fails (Connection refused): training goes on")
    down.start()
    until_said(log, 2)
    assert log.status().messages[1] == f"MLflow at {down.uri} is back, and has everything"
    assert sorted(steps_of(down, log)) == list(range(20))
    assert tracked(down, log).info.status == "RUNNING"
    log.happened("failure", {"cause": "worker died"})
    log.start_attempt(1, 10, STARTED)
    for step in range(10, 30):  # half of them again
        train(log, step)
    assert log.close("FINISHED") == ""
    whole(down, log, 30)
    run = tracked(down, log)
    assert run.data.tags["longlora.disturbances"] == "1: 1 failure"
    assert (run.data.tags["longlora.attempts"], run.data.params["run.name"]) == ("2", "watched")
    artifacts = MlflowClient(down.uri).list_artifacts(run.info.run_id)
    assert [file.path for file in artifacts] == ["config.yaml"]


def test_a_server_that_hangs_delays_no_step(
    server: TrackingServer, new_run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = begin(new_run(server.uri))
    train(log, 0)
    until(lambda: "mlflow_run_id" in known_of(log))
    until(lambda: steps_of(server, log) == [0])
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")  # read for each request; 10 otherwise
    server.send(signal.SIGSTOP)
    try:
        slowest, step = 0.0, 1
        while not log.status().messages:
            before = time.perf_counter()
            train(log, step)
            slowest, step = max(slowest, time.perf_counter() - before), step + 1
            time.sleep(0.05)
    finally:
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        server.send(signal.SIGCONT)
    assert "timed out" in log.status().messages[0]
    assert slowest < 0.5, "a request to the server waits for 1 s"
    assert log.close("FINISHED") == ""
    whole(server, log, step)


def test_a_run_that_died_while_the_server_was_down(server: TrackingServer, new_run: Callable, tmp_path: Path) -> None:
    """The driver is killed without having reached the server once; the next one delivers what it did."""
    values = new_run("http://127.0.0.1:9")  # where nothing listens
    script = (
        "import json, os, sys\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "from test_tracking_server import begin, train\n"
        "log = begin(json.loads(sys.argv[2]))\n"
        "for step in range(10): train(log, step)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    command = [sys.executable, "-c", script, str(Path(__file__).parent), parse_config(values).model_dump_json()]
    paths = os.pathsep.join(str(folder) for folder in (REPOSITORY, REPOSITORY / "benchmarks"))
    died = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, timeout=WAIT_S)
    assert died.returncode == -signal.SIGKILL
    log = begin(new_run(server.uri), step=8)
    for step in range(8, 12):
        train(log, step)
    assert log.close("FINISHED") == ""
    whole(server, log, 12)
    assert tracked(server, log).data.tags["longlora.disturbances"] == "1: 1 driver restart"


def test_a_server_that_is_down_until_after_the_end(
    server: TrackingServer, new_run: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    dead = new_run("http://127.0.0.1:9")
    log = begin(dead)
    for step in range(5):
        train(log, step)
    line = log.close("FINISHED")
    assert line == (
        "MLflow at http://127.0.0.1:9 has not got all of this run (Connection refused): "
        "its next train or evaluate delivers it"
    )
    deliver(parse_config(dead), log.folder)
    assert capsys.readouterr().out == line + "\n"
    deliver(parse_config(new_run(server.uri)), log.folder)
    assert capsys.readouterr().out == ""
    whole(server, log, 5)


@on_each_store
def test_runs_at_the_same_time_and_a_server_that_is_killed_under_them(
    server: TrackingServer, new_run: Callable
) -> None:
    """As the trials of a search are: they make the experiment and log the packs at the same moment."""
    logs = [begin(new_run(server.uri, f"at once on {server.port}", name)) for name in ("first", "second", "third")]
    for step in range(100):
        for log in logs:
            train(log, step)
            log.sampled(1, SAMPLE)
        if step == 50:
            until(lambda: all(known_of(log).get("mlflow_run_id") and steps_of(server, log) for log in logs))
            assert [log.status().messages for log in logs] == [[], [], []], "none stood in another's way"
            server.kill()
        time.sleep(0.01)
    for log in logs:
        until_said(log, 1)
    server.start()
    for log in logs:
        until_said(log, 2)
        assert log.close("FINISHED") == ""
    for log in logs:
        whole(server, log, 100)
        assert len(set(steps_of(server, log, "system/cpu_utilization_percentage"))) == 100
        assert len(steps_of(server, log, "system/cpu_utilization_percentage")) == 100
        assert len(steps_of(server, log, "run/goodput")) == 1
        inputs = tracked(server, log).inputs
        assert inputs is not None and [one.dataset.digest for one in inputs.dataset_inputs] == ["0a"]
    client = MlflowClient(server.uri)
    experiment = client.get_experiment_by_name(f"at once on {server.port}")
    assert experiment is not None and len(client.search_runs([experiment.experiment_id])) == 3


@pytest.mark.slow
@on_each_store
def test_a_server_that_is_killed_again_and_again(server: TrackingServer, new_run: Callable) -> None:
    """Killed while requests are under way; what it had not answered is asked for when it is back."""
    log, step = begin(new_run(server.uri)), 0
    for outage in range(3):
        for _ in range(200):
            train(log, step)
            step += 1
            time.sleep(0.01)
        server.kill()
        train(log, step)
        step += 1
        until_said(log, 2 * outage + 1)
        server.start()
        until_said(log, 2 * outage + 2)
    assert log.close("FINISHED") == ""
    whole(server, log, step)


def test_an_experiment_that_is_deleted_refuses_the_run(server: TrackingServer, new_run: Callable) -> None:
    client = MlflowClient(server.uri)
    client.delete_experiment(client.create_experiment("gone"))
    values = new_run(server.uri, experiment="gone")
    log = RunLog(values, str(UPath(values["run"]["storage"]) / "watched"), os.getpid())
    until(lambda: bool(log.tracker._mistake))
    with pytest.raises(ConfigError, match=r"^tracking.experiment = 'gone' is deleted; name another, or restore it"):
        log.start_attempt(2, 0, STARTED)
    assert "'gone' is deleted" in log.status().error
    assert (log.close("FAILED"), log.status().messages) == ("", [])


@pytest.mark.slow
def test_a_server_that_comes_back_without_its_data(server: TrackingServer, new_run: Callable) -> None:
    """As one does that keeps its database in a container: it gets the whole run again, at once."""
    log = begin(new_run(server.uri))
    for step in range(10):
        train(log, step)
    until(lambda: "mlflow_run_id" in known_of(log))
    until(lambda: len(steps_of(server, log)) == 10)
    server.kill()
    for path in server.folder.glob("mlflow.db*"):
        path.unlink()
    for step in range(10, 15):
        train(log, step)
    until_said(log, 1)
    server.start()
    until_said(log, 2)
    assert sorted(steps_of(server, log)) == list(range(15))
    train(log, 15)
    assert log.close("FINISHED") == ""
    whole(server, log, 16)


@pytest.mark.slow
def test_whole_commands_with_a_server_that_is_down_and_up_again(server: TrackingServer, make_run: Callable) -> None:
    run = make_run("run", optimization={"steps": 4}, tracking={"uri": server.uri})
    server.kill()
    lines = [line for line in run.finish("train").splitlines() if line.startswith("MLflow at")]
    assert [line.split(" (")[0] for line in lines] == [
        f"MLflow at {server.uri} fails",
        f"MLflow at {server.uri} has not got all of this run",
    ]
    assert len(run.records()) == 4
    server.start()
    assert "MLflow at" not in run.finish("train")
    assert len(run.records()) == 4, "nothing is trained again"
    client = MlflowClient(server.uri)
    found = client.get_run(read_json(run.folder / "run.json")["mlflow_run_id"])
    assert found.info.status == "FINISHED"
    points = client.get_metric_history(found.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in points] == [(line.step, line.loss) for line in run.records()]


@pytest.mark.slow
def test_a_command_with_an_experiment_that_is_deleted(server: TrackingServer, make_run: Callable) -> None:
    client = MlflowClient(server.uri)
    client.delete_experiment(client.create_experiment("thrown away"))
    run = make_run("run", tracking={"uri": server.uri, "experiment": "thrown away"})
    finished = subprocess.run(run.command("train"), capture_output=True, text=True, timeout=10 * WAIT_S)
    assert finished.returncode == 2, finished.stderr
    [error] = finished.stderr.splitlines()
    assert error.startswith("error: tracking.experiment = 'thrown away' is deleted; name another, or restore it")
    assert not run.records()


def test_a_server_that_is_no_mlflow_refuses_the_run(new_run: Callable) -> None:
    web = subprocess.Popen(
        [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert web.stdout is not None
        port = web.stdout.readline().split(" port ")[1].split()[0]
        values = new_run(f"http://127.0.0.1:{port}")
        log = RunLog(values, str(UPath(values["run"]["storage"]) / "watched"), os.getpid())
        until(lambda: bool(log.tracker._mistake))
        with pytest.raises(ConfigError, match=r"^MLflow at .* cannot be used: .* 404") as caught:
            log.start_attempt(2, 0, STARTED)
        assert "\n" not in str(caught.value)
        log.close("FAILED")
    finally:
        web.kill()
        web.wait()
