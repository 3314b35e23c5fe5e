"""A trial as Tune's actor has it, over a training that is played."""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from upath import UPath

from pipeline import search_trial
from pipeline.config import ConfigError, load_config
from pipeline.lease import Holder, Lease, TakenOver
from pipeline.ledger import Event, LedgerWriter
from pipeline.search_ends import Ends
from pipeline.search_space import LOSS, THROUGHPUT
from pipeline.search_trial import Trial, passes
from pipeline.search_trials import trial_config
from pipeline.storage import storage_error, write_json

TOKENS_PER_STEP = 2 * 4096


def evaluation(step: int, loss: float) -> Event:
    return Event("evaluation", step, details={"loss": loss, "tokens_per_second": 800.0})


class PlayedLog:
    """What a trial asks of the run's log, without an actor."""

    def __init__(self) -> None:
        self.told: list[Event] = []
        self.has_workers = True
        self.asked_to_end = threading.Event()
        self.evaluations = SimpleNamespace(remote=lambda after: [line for line in self.told if line.step > after])
        self.status = SimpleNamespace(remote=lambda: SimpleNamespace(step=max((e.step for e in self.told), default=0)))
        self.end_early = SimpleNamespace(remote=self._end_early)

    def _end_early(self) -> bool:
        self.asked_to_end.set()
        return not self.has_workers


Training = Callable[[PlayedLog], None]


@pytest.fixture
def ends() -> Ends:
    return Ends()


@pytest.fixture
def make_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: Ends) -> Iterator[Callable[[Training], Trial]]:
    """make_trial(training): a trial whose workers do `training(log)`."""
    monkeypatch.setattr(search_trial.ray, "get", lambda answer: answer)
    monkeypatch.setattr(search_trial, "HEARTBEAT_S", 0.5)
    monkeypatch.setattr(search_trial, "POLL_S", 0.01)
    config = trial_config(load_config("configs/search-demo.yaml", [f"run.storage={tmp_path}"]), {}, 1)

    class PlayedTrial(Trial):
        """As `tune.with_parameters` makes it."""

        def setup(self, config: dict[str, Any]) -> None:  # type: ignore[override]
            super().setup(config, SimpleNamespace(asked=SimpleNamespace(remote=ends.asked)))

    def make(training: Training) -> Trial:
        def train(run: Any, folder: UPath, packs: Any, started: Callable[[Any], None]) -> None:
            log = PlayedLog()
            started(log)
            training(log)

        monkeypatch.setattr(search_trial, "train", train)
        values = {"config": config.model_dump(mode="json"), "train_packs": "train", "validation_packs": "held-out"}
        return PlayedTrial(config=values)

    yield make


def told(trial: Trial) -> list[dict[str, Any]]:
    """Everything that a trial tells until it has ended."""
    results = [trial.step()]
    while not results[-1].get("done"):
        results.append(trial.step())
    return results


def test_validations_in_order_and_then_the_end(make_trial: Callable[[Training], Trial]) -> None:
    trial = make_trial(lambda log: log.told.extend([evaluation(3, 4.5), evaluation(6, 4.25)]))
    first, second, end = told(trial)
    assert (first["step"], first["tokens"], first[LOSS], first[THROUGHPUT]) == (3, 3 * TOKENS_PER_STEP, 4.5, 800.0)
    assert (second["step"], second[LOSS]) == (6, 4.25)
    assert (end["ended"], end["reason"], end["tokens"]) == ("finished", "", 6 * TOKENS_PER_STEP)
    assert LOSS not in end and 0 <= first["worker_seconds"] <= end["worker_seconds"]


def test_a_trial_that_goes_on_tells_its_earlier_validations_first(
    make_trial: Callable[[Training], Trial], tmp_path: Path
) -> None:
    """Those of the ledger, redone ones once; then those that the new workers make, which begin before the last."""
    ledger = LedgerWriter(UPath(tmp_path / "search-demo.0001"))
    for lines in ([evaluation(3, 4.5), evaluation(6, 4.25)], [evaluation(6, 4.25)]):
        ledger.start_attempt()
        for line in lines:
            ledger.write(line)
    ledger.close()
    trial = make_trial(lambda log: log.told.extend([evaluation(6, 4.25), evaluation(9, 4.0)]))
    assert [(result["step"], result[LOSS]) for result in told(trial)[:-1]] == [(3, 4.5), (6, 4.25), (9, 4.0)]


def test_signs_of_life_while_nothing_is_validated(make_trial: Callable[[Training], Trial]) -> None:
    over = threading.Event()
    trial = make_trial(lambda log: over.wait(60) and None)
    assert trial.step().keys() == trial.step().keys() == {"tokens", "worker_seconds"}
    over.set()
    assert told(trial)[-1]["ended"] == "finished"


def test_a_loss_that_is_no_number_is_told_as_infinite(make_trial: Callable[[Training], Trial]) -> None:
    [diverged, _] = told(make_trial(lambda log: log.told.append(evaluation(12, float("nan")))))
    assert diverged[LOSS] == float("inf")


@pytest.mark.parametrize(
    ("error", "reason"),
    [(ConfigError("the packs differ"), "the packs differ"), (RuntimeError("two\nlines"), "RuntimeError: two lines")],
)
def test_an_error_is_the_trials_own(make_trial: Callable[[Training], Trial], error: Exception, reason: str) -> None:
    def fail(log: PlayedLog) -> None:
        raise error

    [end] = told(make_trial(fail))
    assert (end["ended"], end["reason"]) == ("failed", reason)


RUN = "search-demo.0001"


def test_a_trial_that_is_to_end_is_done_once_it_has_saved(make_trial: Callable[[Training], Trial], ends: Ends) -> None:
    """However long its step is: it gives signs of life meanwhile, and counts what that step trains."""
    saved, step_ends = [], threading.Event()

    def train(log: PlayedLog) -> None:
        log.told.append(evaluation(3, 4.5))
        assert log.asked_to_end.wait(60) and step_ends.wait(60)
        log.status = SimpleNamespace(remote=lambda: SimpleNamespace(step=4))
        saved.append("the step under way")

    trial = make_trial(train)
    assert trial.step()["step"] == 3
    ends.end(RUN)
    for _ in range(3):  # heartbeats
        assert "done" not in trial.step()
    step_ends.set()
    end = told(trial)[-1]
    assert saved and (end["ended"], end["tokens"]) == ("interrupted", 4 * TOKENS_PER_STEP)


def test_a_trial_whose_workers_wait_for_nodes_ends_at_once(make_trial: Callable[[Training], Trial], ends: Ends) -> None:
    node_comes = threading.Event()

    def wait(log: PlayedLog) -> None:
        log.has_workers = False
        node_comes.wait(60)

    trial = make_trial(wait)
    ends.end_all()
    [end] = told(trial)
    assert (end["ended"], end["reason"]) == ("interrupted", "") and trial.thread.is_alive()
    node_comes.set()


def test_a_trial_that_is_at_its_last_step_has_finished(make_trial: Callable[[Training], Trial], ends: Ends) -> None:
    def train(log: PlayedLog) -> None:
        assert log.asked_to_end.wait(60)
        log.told.append(evaluation(12, 4.0))

    trial = make_trial(train)
    ends.end(RUN)
    assert told(trial)[-1]["ended"] == "finished"


def test_a_storage_that_does_not_answer_fails_the_trial_and_may_pass(
    make_trial: Callable[[Training], Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(config: Any) -> UPath:
        raise ConfigError("run.storage = 's3://b': cannot be written (no answer); give a writable folder or URI")

    monkeypatch.setattr(search_trial, "run_folder", refuse)
    [end] = told(make_trial(lambda log: None))
    assert (end["ended"], end["passing"]) == ("failed", True) and end["reason"].startswith("run.storage = 's3://b'")


def test_what_may_pass(tmp_path: Path) -> None:
    lease = Lease(UPath(tmp_path), Holder.here(os.getpid()))
    with pytest.raises(ConfigError) as held:
        Lease(UPath(tmp_path), Holder.here(os.getpid()))
    write_json(UPath(tmp_path) / "lease" / "2.json", {})
    with pytest.raises(TakenOver) as taken:
        lease.check()
    lease.release()
    full = storage_error(OSError(errno.ENOSPC, "No space left on device"))
    assert all(map(passes, (str(held.value), f"RuntimeError: {taken.value}", full)))
    assert not any(map(passes, ("the loss is nan on sequences [3]", "out of GPU memory: …", "")))
