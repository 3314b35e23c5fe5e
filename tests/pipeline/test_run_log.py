import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from botocore.exceptions import ClientError
from mlflow import MlflowClient
from ray.exceptions import RayTaskError
from upath import UPath

from pipeline.assignment import FinalError
from pipeline.config import REPOSITORY, ConfigError, parse_config
from pipeline.ledger import Event, StepRecord, read_ledger
from pipeline.run_log import RunLog
from pipeline.storage import read_json
from pipeline.train_worker import final_reason

STARTED = {"checkpoint": None, "attention": "sdpa"}
SAVED = {"seconds": 0.5, "write_seconds": 1.0}


@pytest.fixture
def values(tmp_path: Path, mlflow_database: Path) -> dict[str, Any]:
    shutil.copy(mlflow_database, tmp_path / "mlflow.db")
    config = parse_config(
        {
            "run": {"name": "logged", "storage": str(tmp_path)},
            "model": {"base": "some/model"},
            "context": {"length": 100},
            "attention": {"group_size": 20},
            "data": {"train": ["books"]},
            "optimization": {"steps": 8, "global_batch": 2, "warmup_steps": 0},
        }
    )
    (tmp_path / "logged").mkdir()
    return config.model_dump(mode="json")


def record(step: int, loss: float = 2.0, seconds: float = 4.0) -> StepRecord:
    return StepRecord(
        step=step,
        world_size=2,
        first_position=2 * step,
        sequences=[0, 1],
        token_hash="00",
        loss=loss,
        target_tokens=190,
        time=1.0,
        tokens=200,
        seconds=seconds,
        learning_rate=1e-3,
        gradient_norm=0.5,
    )


def losses(folder: UPath) -> list[tuple[int, float]]:
    client = MlflowClient(f"sqlite:///{folder.parent}/mlflow.db")
    points = client.get_metric_history(read_json(folder / "run.json")["mlflow_run_id"], "train/loss")
    return sorted((point.step, point.value) for point in points)


def test_a_redone_step_is_in_the_ledger_twice_and_in_mlflow_once(values: dict[str, Any], tmp_path: Path) -> None:
    folder = UPath(tmp_path) / "logged"
    log = RunLog(values, str(folder), os.getpid())
    assert log.start_attempt(2, 0, STARTED) == 1
    for step in range(3):
        log.step(1, record(step))
    log.close("FAILED")
    log = RunLog(values, str(folder), os.getpid())
    assert log.start_attempt(2, 1, STARTED) == 2
    for step in range(1, 4):
        log.step(2, record(step))
    log.close("FINISHED")
    lines = [(attempt, line) for attempt, line in read_ledger(folder) if isinstance(line, StepRecord)]
    assert [(attempt, line.step) for attempt, line in lines] == [(1, 0), (1, 1), (1, 2), (2, 1), (2, 2), (2, 3)]
    assert losses(folder) == [(step, 2.0) for step in range(4)]


def test_a_step_of_workers_that_were_replaced_counts_for_nothing(values: dict[str, Any], tmp_path: Path) -> None:
    folder = UPath(tmp_path) / "logged"
    log = RunLog(values, str(folder), os.getpid())
    log.start_attempt(2, 0, STARTED)
    log.step(1, record(0))
    log.start_attempt(1, 0, STARTED)
    log.step(1, record(1))  # of a worker that was stopped, and went on
    log.step(2, record(0))
    log.close("FINISHED")
    lines = [(attempt, line.step) for attempt, line in read_ledger(folder) if isinstance(line, StepRecord)]
    assert lines == [(1, 0), (2, 0)]


@pytest.mark.parametrize("phase", ["starting workers", "waiting for nodes: room for 0 of 2 workers", "recovering"])
def test_a_run_without_workers_is_ended_at_once(values: dict[str, Any], tmp_path: Path, phase: str) -> None:
    folder = tmp_path / "logged"
    log = RunLog(values, str(folder), os.getpid())
    if phase == "recovering":
        log.start_attempt(2, 0, STARTED)
        log.happened("failure", {"cause": "worker died"})
    elif phase != "starting workers":
        log.waiting(phase)
    assert log.status().phase == phase and log.end_early()
    with pytest.raises(RuntimeError, match="has been ended"):  # workers that were about to start
        log.start_attempt(2, 0, STARTED)
    assert log.close("FAILED") == "", "what is closed stays as it is"
    run = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").get_run(
        read_json(UPath(folder) / "run.json")["mlflow_run_id"]
    )
    assert run.info.status == "KILLED"
    RunLog(values, str(folder), os.getpid()).close("FINISHED")  # the lease is free


def test_a_run_in_a_step_is_ended_by_its_workers(values: dict[str, Any], tmp_path: Path) -> None:
    log = RunLog(values, str(tmp_path / "logged"), os.getpid())
    log.start_attempt(2, 0, STARTED)
    assert not log.end_early() and log.request().end
    log.workers_ended(1)
    assert not log.end_early(), "they may be writing the last checkpoint"
    log.close("FINISHED")


def test_the_status_is_where_the_run_is(values: dict[str, Any], tmp_path: Path) -> None:
    log = RunLog(values, str(tmp_path / "logged"), os.getpid())
    log.start_attempt(2, 0, STARTED)
    log.step(1, record(0, loss=3.0, seconds=6.0))
    log.step(1, record(1, loss=2.5, seconds=2.0))
    log.evaluated(2, 2.75, 1000, seconds=0.5)
    status = log.status()
    assert (status.phase, status.step, status.steps, status.setup) == ("training", 2, 8, {"attention": "sdpa"})
    assert (status.loss, status.eval_loss, status.world_size, status.attempt) == (2.5, 2.75, 2, 1)
    assert status.tokens_per_second == 50.0  # 400 tokens in 8 s
    assert status.remaining_s == 24.0  # 6 steps of 4 s
    log.close("FINISHED")


def test_the_first_reason_to_end_counts(values: dict[str, Any], tmp_path: Path) -> None:
    log = RunLog(values, str(tmp_path / "logged"), os.getpid())
    log.start_attempt(2, 0, STARTED)
    log.fail("the loss is nan")
    log.fail("connection lost, because the first rank ended")
    log.close("FAILED")
    assert log.status().error == "the loss is nan"
    events = [line for _, line in read_ledger(log.folder) if isinstance(line, Event) and line.event == "error"]
    assert [event.details for event in events] == [{"error": "the loss is nan"}]


def test_a_tracking_store_that_cannot_be_used_is_one_line(values: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    values["tracking"]["uri"] = f"sqlite:///{tmp_path}/file/mlflow.db"
    with pytest.raises(ConfigError, match=r"MLflow at 'sqlite:.*cannot be used") as caught:
        RunLog(values, str(tmp_path / "logged"), os.getpid())
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "logged" / "lease").exists(), "refused before it holds anything"


def test_mlflow_is_not_waited_for(values: dict[str, Any], tmp_path: Path) -> None:
    """It is imported beside the start of the workers, not before it."""
    script = (
        "import json, os, sys\n"
        "from pipeline.run_log import RunLog\n"
        "log = RunLog(json.loads(sys.argv[1]), sys.argv[2], os.getpid())\n"
        "log.start_attempt(2, 0, {'attention': 'sdpa'})\n"
        "print('mlflow.client' in sys.modules)\n"
        "log.close('FINISHED')\n"
        "print('mlflow.client' in sys.modules)\n"
    )
    command = [sys.executable, "-c", script, json.dumps(values), str(tmp_path / "logged")]
    finished = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert finished.stdout.split() == ["False", "True"]


def test_a_driver_that_has_lost_the_run_ends_only_itself(values: dict[str, Any], tmp_path: Path) -> None:
    log = RunLog(values, str(tmp_path / "logged"), os.getpid())
    log.start_attempt(2, 0, STARTED)
    log._lease_lost()
    assert log.close("FAILED") == ""
    assert "end" not in [line.event for _, line in read_ledger(log.folder) if isinstance(line, Event)]


def test_a_run_that_could_not_start_has_failed_in_mlflow(values: dict[str, Any], tmp_path: Path) -> None:
    log = RunLog(values, str(tmp_path / "logged"), os.getpid())
    log.fail("no worker could start")
    assert log.close("FAILED") == ""
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    run_id = read_json(log.folder / "run.json")["mlflow_run_id"]
    assert client.get_run(run_id).info.status == "FAILED"


def test_a_checkpoint_is_asked_for_and_answered(values: dict[str, Any], tmp_path: Path) -> None:
    log = RunLog(values, str(tmp_path / "logged"), os.getpid())
    assert log.ask_for_checkpoint() == 0, "nobody is training yet"
    log.start_attempt(2, 0, STARTED)
    assert log.request().number == 0
    asked = log.ask_for_checkpoint(hold=True)
    assert (log.request().number, log.request().hold) == (asked, True)
    log.checkpointed((1, 3), 0, SAVED)  # one that was due anyway, before the workers heard of the request
    assert not log.has_checkpointed(asked)
    log.checkpointed((1, 4), asked, SAVED)
    assert log.has_checkpointed(asked) and log.request().number == 0
    log.close("FINISHED")


def test_a_request_to_workers_that_are_gone_is_dropped(values: dict[str, Any], tmp_path: Path) -> None:
    log = RunLog(values, str(tmp_path / "logged"), os.getpid())
    log.start_attempt(2, 0, STARTED)
    asked = log.ask_for_checkpoint(hold=True)
    log.happened("failure", {"cause": "worker died"})
    assert log.has_checkpointed(asked) and log.ask_for_checkpoint() == 0
    log.start_attempt(1, 0, STARTED)
    assert log.request().number == 0
    log.close("FINISHED")


def test_the_same_error_twice_without_a_checkpoint_ends_the_run(values: dict[str, Any], tmp_path: Path) -> None:
    log = RunLog(values, str(tmp_path / "logged"), os.getpid())
    log.start_attempt(2, 0, STARTED)
    assert log.final_error("KeyError: 'x'") == ""
    log.checkpointed((1, 5), 0, SAVED)
    assert log.final_error("KeyError: 'x'") == "", "there was progress"
    assert log.final_error("") == "", "a worker that died says nothing about our code"
    assert log.final_error("KeyError: 'x'") == ""
    assert log.final_error("KeyError: 'y'") == ""
    assert log.final_error("KeyError: 'y'") == "the same error twice, without a checkpoint between: KeyError: 'y'"
    log.close("FAILED")


def test_what_happened_before_the_first_attempt_is_kept(values: dict[str, Any], tmp_path: Path) -> None:
    log = RunLog(values, str(tmp_path / "logged"), os.getpid())
    log.happened("workers", {})
    log.start_attempt(2, 0, STARTED)
    log.close("FINISHED")
    events = [line.event for _, line in read_ledger(log.folder) if isinstance(line, Event)]
    assert events == ["driver", "workers", "start", "end"]


def test_what_a_fast_rank_offers_for_the_next_save_is_kept(values: dict[str, Any], tmp_path: Path) -> None:
    log = RunLog(values, str(tmp_path / "logged"), os.getpid())
    log.start_attempt(2, 0, STARTED)
    log.offer((1, 5), 0, {}, [])
    log.offer((1, 5), 1, {}, [])
    log.offer((1, 6), 1, {}, [])
    log.checkpointed((1, 5), 0, SAVED)
    assert (log.offers((1, 5)), list(log.offers((1, 6)))) == ({}, [1])
    log.start_attempt(2, 5, STARTED)
    assert log.offers((1, 6)) == {}, "of workers that are gone"
    log.close("FINISHED")


def test_nobody_is_asked_once_a_worker_has_ended(values: dict[str, Any], tmp_path: Path) -> None:
    log = RunLog(values, str(tmp_path / "logged"), os.getpid())
    log.start_attempt(2, 0, STARTED)
    asked = log.ask_for_checkpoint(hold=True)
    log.workers_ended(0)  # of an attempt before this one
    assert not log.has_checkpointed(asked)
    log.workers_ended(1)
    assert log.has_checkpointed(asked) and log.ask_for_checkpoint() == 0
    log.close("FINISHED")


def test_workers_that_were_replaced_commit_nothing(values: dict[str, Any], tmp_path: Path) -> None:
    log = RunLog(values, str(tmp_path / "logged"), os.getpid())
    log.start_attempt(2, 0, STARTED)
    log.sync(1)
    log.happened("workers", {})  # which will read the newest checkpoint, so it must not change any more
    with pytest.raises(RuntimeError, match="the workers of attempt 1 have been replaced"):
        log.sync(1)
    log.start_attempt(2, 5, STARTED)
    log.sync(2)
    with pytest.raises(RuntimeError, match="attempt 1"):
        log.checkpointed((1, 6), 0, SAVED)
    log.close("FINISHED")


def test_a_storage_error_reaches_the_worker_as_one_line(values: dict[str, Any], tmp_path: Path) -> None:
    """An actor's error arrives without its cause and in Ray's wrapping, which hides what the storage answered."""
    log = RunLog(values, str(tmp_path / "logged"), os.getpid())
    attempt = log.start_attempt(2, 0, STARTED)
    refused = PermissionError("Access Denied")
    answer = {"Error": {"Code": "AccessDenied", "Message": "not you"}, "ResponseMetadata": {"HTTPStatusCode": 403}}
    refused.__cause__ = ClientError(answer, "PutObject")  # type: ignore[arg-type]
    log.ledger.sync = Mock(side_effect=refused)  # type: ignore[method-assign]
    with pytest.raises(FinalError) as told:
        log.sync(attempt)
    wrapped = RayTaskError("RunLog.sync", "a traceback\nof many lines", pickle.loads(pickle.dumps(told.value)))
    reason = final_reason(wrapped.as_instanceof_cause())
    assert reason.startswith("run.storage cannot be used: not you (AccessDenied)") and "\n" not in reason
    log.ledger.sync = Mock()  # type: ignore[method-assign]
    log.close("FAILED")
