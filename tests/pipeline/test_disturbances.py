import os
import signal
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch.distributed as dist
from ray.exceptions import RayActorError
from ray.train import PreemptionInfo
from ray.train.v2._internal.exceptions import WorkerHealthCheckTimeoutError
from ray.train.v2._internal.execution.controller.state import ErroredState, PreemptingState, RunningState
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from pipeline.disturbances import NoticeOnSigterm, TellDisturbances, cause, lost_a_worker

CLOSED = RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:34567")

DIED = RuntimeError("The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR")


SILENT = WorkerHealthCheckTimeoutError("A worker health check has been hanging for 10.00 seconds.")


class Log:
    """RunLog, of which only the answers and what was asked matter."""

    def __init__(self, save_seconds: float = 5.0) -> None:
        self.told: list[Any] = []
        self.heard = threading.Event()
        self.noticed = SimpleNamespace(remote=self._noticed)
        self.ask_for_checkpoint = SimpleNamespace(remote=lambda hold=False: self.told.append(("save", hold)))
        self.save_seconds = SimpleNamespace(remote=lambda: save_seconds)

    def _noticed(self, details: dict[str, Any]) -> None:
        self.told.append(("notice", details))
        self.heard.set()


@pytest.mark.parametrize("error", [RayActorError(), DIED, SILENT, dist.DistNetworkError("timed out"), CLOSED])
def test_a_process_that_is_gone_is_no_error_of_ours(error: Exception) -> None:
    assert lost_a_worker(error)


def test_an_error_of_our_code_is() -> None:
    assert not lost_a_worker(ValueError("the plan has 12 tokens and q 13"))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (WorkerGroupError("", {0: CLOSED, 1: DIED}), "worker died"),
        (WorkerGroupError("", {0: CLOSED}), "connection to a worker lost"),
        (WorkerGroupError("", {0: SILENT}), "no sign of life of a worker"),
        (WorkerGroupError("", {0: KeyError("x")}), "error in a worker"),
        (ControllerError(TimeoutError("no resources")), "workers could not start"),
    ],
)
def test_the_cause_in_words(error: Exception, words: str) -> None:
    assert cause(error) == words  # type: ignore[arg-type]


def preempting(seconds_left: float | None) -> PreemptingState:
    deadline = int((time.time() + seconds_left) * 1000) if seconds_left is not None else None
    info = PreemptionInfo(deadline_ms=deadline, preempted_node_to_ranks={"node": [1]})
    return PreemptingState(preemption_info=info, detected_at_s=time.time())


def test_a_notice_is_told_once_and_the_last_call_comes_before_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "get", lambda value: value)
    log = Log(save_seconds=5.0)
    callback = TellDisturbances(log)
    callback.after_controller_state_update(RunningState(), preempting(30))
    [(what, details)] = log.told
    assert what == "notice" and details["ranks"] == [1] and details["seconds_left"] == pytest.approx(30, abs=1)
    callback.after_controller_state_update(preempting(20), preempting(20))
    assert len(log.told) == 1, "there is time"
    for seconds_left in (4, 3):
        callback.after_controller_state_update(preempting(seconds_left), preempting(seconds_left))
    assert log.told[1:] == [("save", True)], "a last checkpoint, once, after which the workers wait"


def test_a_notice_without_a_deadline_has_no_last_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "get", lambda value: value)
    log = Log()
    callback = TellDisturbances(log)
    callback.after_controller_state_update(RunningState(), preempting(None))
    callback.after_controller_state_update(preempting(None), preempting(None))
    assert [what for what, _ in log.told] == ["notice"]


def test_sigterm_on_a_worker_is_a_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray.train, "get_context", lambda: SimpleNamespace(get_world_rank=lambda: 3))
    before, log = signal.getsignal(signal.SIGTERM), Log()
    try:
        NoticeOnSigterm(log).after_init_train_context()
        os.kill(os.getpid(), signal.SIGTERM)
        assert log.heard.wait(10)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert log.told == [("notice", {"ranks": [3], "seconds_left": None, "signal": "SIGTERM"})]


def test_at_the_end_of_the_group_nobody_is_left_to_answer() -> None:
    """Who waits for a checkpoint, after Ctrl-C, would otherwise wait for workers that Ray does not start again."""
    ended: list[int | None] = []
    log = SimpleNamespace(workers_ended=SimpleNamespace(remote=ended.append))
    state = ErroredState(training_failed_error=ControllerError(RuntimeError("no workers")))
    TellDisturbances(log).after_controller_state_update(RunningState(), state)
    assert ended == [None]
