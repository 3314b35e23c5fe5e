"""Who may work on a run: drivers that live, die, hang, and live on another machine."""

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from object_store import ObjectStore
from upath import UPath

from pipeline import lease
from pipeline.config import ConfigError
from pipeline.lease import Holder, Lease, refuse_if_held
from pipeline.storage import create_once, read_json


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.1)
    monkeypatch.setattr(lease, "EXPIRY_S", 1.5)


@pytest.fixture
def run(tmp_path: Path) -> UPath:
    return UPath(tmp_path) / "run"


def elsewhere() -> Holder:
    return replace(Holder.here(os.getpid()), host="another-machine")


def dead() -> Holder:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    holder = Holder.here(process.pid)
    process.communicate(b"\n")
    return replace(holder, writer=process.pid)


def test_a_second_driver_is_refused_and_told_who_holds_the_run(run: UPath) -> None:
    first = Lease(run, Holder.here(os.getpid()))
    for ask in (lambda: Lease(run, Holder.here(os.getpid())), lambda: refuse_if_held(run)):
        with pytest.raises(ConfigError, match=rf"process {os.getpid()} on \S+ is working on this run"):
            ask()
    first.check()
    first.release()
    refuse_if_held(run)
    Lease(run, Holder.here(os.getpid())).release()


def test_a_holder_elsewhere_is_known_by_its_beat(run: UPath) -> None:
    first = Lease(run, elsewhere())
    with pytest.raises(ConfigError, match="on another-machine is working on this run"):
        Lease(run, elsewhere())
    first.release()


def test_a_dead_process_holds_nothing(run: UPath) -> None:
    first = Lease(run, dead())
    first._ended.set()
    start = time.monotonic()
    Lease(run, Holder.here(os.getpid())).release()
    assert time.monotonic() - start < 1.0


def test_a_holder_that_went_silent_expires_and_learns_of_it(run: UPath) -> None:
    lost = threading.Event()
    first = Lease(run, elsewhere(), lost=lost.set)
    first._ended.set()  # as a machine that hangs
    first._thread.join()
    start = time.monotonic()
    second = Lease(run, elsewhere())
    assert 1.5 <= time.monotonic() - start < 10
    with pytest.raises(RuntimeError, match="another driver has taken over"):
        first.check()
    second.check()
    first._ended.clear()  # and wakes up again
    first._keep()
    assert lost.is_set()
    assert "beat" in read_json(run / "lease" / "2.beat")
    second.release()


@pytest.mark.parametrize("kind", ["disk", "object store"])
def test_of_many_that_come_at_once_one_wins(kind: str, run: UPath, bucket: UPath) -> None:
    folder = run if kind == "disk" else bucket / "run"

    def take(_: int) -> Lease | None:
        try:
            return Lease(folder, elsewhere())
        except ConfigError:
            return None

    with ThreadPoolExecutor(8) as pool:
        taken = [one for one in pool.map(take, range(8)) if one]
    assert len(taken) == 1
    taken[0].check()
    taken[0].release()


def test_created_once_means_once_and_whole(tmp_path: Path) -> None:
    path = UPath(tmp_path) / "folder" / "file"
    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(lambda n: create_once(path, bytes([n]) * 1000), range(16)))
    assert won.count(True) == 1
    assert path.read_bytes() == bytes([won.index(True)]) * 1000
    assert [file.name for file in path.parent.iterdir()] == ["file"]


def test_on_an_object_store_too_one_driver_holds_a_run(bucket: UPath) -> None:
    run = bucket / "runs" / "run"
    first = Lease(run, elsewhere())
    with pytest.raises(ConfigError, match="is working on this run"):
        Lease(run, elsewhere())
    first.check()
    first.release()
    Lease(run, elsewhere()).release()


def test_after_an_outage_a_driver_learns_that_it_was_replaced(bucket: UPath) -> None:
    lost = threading.Event()
    run = bucket / "runs" / "run"
    first = Lease(run, elsewhere(), lost.set)
    assert create_once(run / "lease" / "2.json", b"{}")  # by another machine, which the store answered meanwhile
    with pytest.raises(RuntimeError, match="another driver has taken over"):
        first.check()
    assert lost.wait(30), "the heartbeat sees it too"


def test_a_term_whose_answer_was_lost_is_held(store: ObjectStore, bucket: UPath) -> None:
    store.fail(status=500, code="InternalError", path="lease/1.json", done=True)
    lease = Lease(bucket / "run", elsewhere())
    lease.check()
    lease.release()
