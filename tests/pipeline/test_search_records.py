import threading
from pathlib import Path
from typing import Any

import pytest
from object_store import ObjectStore
from upath import UPath

from pipeline.config import ConfigError, load_config
from pipeline.lease import TakenOver
from pipeline.search_budget import Budget
from pipeline.search_records import Records
from pipeline.search_trials import TrialRecord, TrialStore

CONFIG = load_config("configs/search-demo.yaml")


def nothing() -> None: ...


def records_of(folder: UPath, check: Any = nothing) -> Records:
    return Records(TrialStore(folder), Budget(CONFIG, folder), check, threading.Event())


def trial(number: int, tokens: int = 0) -> TrialRecord:
    return TrialRecord(number, f"s.{number}", {"adapter.rank": 8}, tokens=tokens)


def test_what_the_storage_refuses_is_written_when_it_takes_it(store: ObjectStore, bucket: UPath) -> None:
    records = records_of(bucket / "search")
    assert records.begin(trial(1))
    store.fail(status=403, code="AccessDenied", method="PUT", path="/trials/", times=99)
    assert not records.keep(trial(1, 100)) and records.problem.startswith("run.storage cannot be used: ")
    assert not records.begin(trial(2)) and list(records.all) == [1]
    with pytest.raises(ConfigError, match=r"the search's last records are not written: run\.storage cannot be used"):
        records.finish()
    store.heal()
    records.finish()
    assert records_of(bucket / "search").all == {1: trial(1, 100)} and not records.problem


def test_a_driver_that_has_lost_the_search_writes_nothing_more(tmp_path: Path) -> None:
    lost = threading.Event()

    def check() -> None:
        if lost.is_set():
            raise TakenOver("search: another driver has taken over this run")

    records = records_of(UPath(tmp_path), check)
    assert records.keep(trial(1)) and (tmp_path / "spent.json").exists()
    lost.set()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.json")}
    assert not records.keep(trial(1, 100)) and records.taken_over.is_set()
    assert not records.begin(trial(2))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.json")} == before
    with pytest.raises(ConfigError, match=r"^another driver has taken over this search$"):
        records.finish()
