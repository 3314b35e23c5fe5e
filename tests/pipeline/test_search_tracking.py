"""The end of the search's own MLflow run, with a server that takes its time."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from upath import UPath

from pipeline import search_tracking
from pipeline.config import load_config
from pipeline.search_budget import Budget
from pipeline.search_records import Records
from pipeline.search_tracking import SearchTracker
from pipeline.search_trials import TrialRecord, TrialStore


@pytest.fixture
def records(tmp_path: Path) -> Records:
    config = load_config("configs/search-demo.yaml", [f"run.storage={tmp_path}"])
    folder = UPath(tmp_path) / "tried"
    return Records(TrialStore(folder), Budget(config, folder), lambda: None, threading.Event())


@pytest.fixture
def tracker(records: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SearchTracker:
    monkeypatch.setattr(search_tracking, "INTERVAL_S", 0.01)
    monkeypatch.setattr(search_tracking, "PATIENCE_S", 0.5)
    config = load_config("configs/search-demo.yaml", [f"run.storage={tmp_path}"])
    return SearchTracker(config, UPath(tmp_path) / "tried", records)


def test_the_last_delivery_is_not_waited_for_without_end(
    tracker: SearchTracker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = threading.Event()

    def deliver(status: str, result: bool) -> None:
        assert not result or answer.wait(60)

    monkeypatch.setattr(tracker, "_deliver", deliver)
    tracker.start()
    began = time.monotonic()
    tracker.close()
    assert time.monotonic() - began < 5
    assert "has not got all of this search (no answer in" in capsys.readouterr().out
    answer.set()


@pytest.mark.parametrize(("status", "expected"), [("finished", "FINISHED"), ("running", "KILLED")])
def test_the_result_comes_last(
    tracker: SearchTracker, records: Records, monkeypatch: pytest.MonkeyPatch, status: Any, expected: str
) -> None:
    records.keep(TrialRecord(1, "tried.0001", {}, status))
    sent: list[tuple[str, bool]] = []
    monkeypatch.setattr(tracker, "_deliver", lambda status, result: sent.append((status, result)))
    tracker.start()
    time.sleep(0.1)
    tracker.close()
    assert sent[-1] == (expected, True) and set(sent[:-1]) == {("RUNNING", False)}


def test_a_search_that_was_taken_over_tells_nothing_more(
    tracker: SearchTracker, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[str] = []
    monkeypatch.setattr(tracker, "_deliver", lambda status, result: sent.append(status))
    records.taken_over.set()
    tracker.start()
    tracker._thread.join(5)
    assert sent == [] and not tracker._thread.is_alive()
