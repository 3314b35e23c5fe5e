"""What Ray Tune asks and tells, played by hand."""

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.search import Searcher
from upath import UPath

from pipeline.config import load_config
from pipeline.prepare import PreparedPacks
from pipeline.search_budget import Budget
from pipeline.search_ends import Ends
from pipeline.search_records import Records
from pipeline.search_source import TrialSource
from pipeline.search_trials import TrialStore


class Cluster:
    """Room for so many workers of any kind."""

    def __init__(self, room: int = 2) -> None:
        self.room_for_workers: Callable[[Any], int] = lambda config: room

    def look(self) -> None: ...


def source_of(folder: Path, *overrides: str, room: int = 2) -> tuple[TrialSource, list[str]]:
    """A source over `folder` whose ends are no actor (`source.ends.kept`), and what it says."""
    config = load_config("configs/search-demo.yaml", list(overrides))
    said: list[str] = []
    packs = PreparedPacks(UPath("train-packs"), UPath("validation-packs"))
    search = UPath(folder)
    records = Records(TrialStore(search), Budget(config, search), lambda: None, threading.Event())
    kept = Ends()
    ends = SimpleNamespace(
        kept=kept, end=SimpleNamespace(remote=kept.end), end_all=SimpleNamespace(remote=kept.end_all)
    )
    return TrialSource(config, records, packs, ends, Cluster(room), said.append), said  # type: ignore[arg-type]


def told(tokens: int, seconds: float = 1.0, **more: Any) -> dict[str, Any]:
    return {"tokens": tokens, "worker_seconds": seconds, **more}


def validation(step: int, loss: float, seconds: float = 1.0) -> dict[str, Any]:
    return told(step * 8192, seconds, step=step, **{"eval/loss": loss, "train/tokens_per_second": 900.0})


def test_a_trial_from_its_start_to_its_end(tmp_path: Path) -> None:
    source, said = source_of(tmp_path)
    given = source.suggest("t1")
    assert isinstance(given, dict)
    assert given["config"]["attention"]["group_size"] == 512 and given["config"]["run"]["name"] == "search-demo.0001"
    source.on_trial_result("t1", told(0))
    source.on_trial_result("t1", validation(3, 4.5, 20.0))
    source.on_trial_result("t1", validation(3, 4.5, 20.0))  # told again by a driver that was restarted
    source.on_trial_result("t1", validation(12, 4.1, 60.0))
    source.on_trial_complete("t1", told(12 * 8192, 61.0, ended="finished", reason=""))
    record = TrialStore(UPath(tmp_path)).read()[1]
    assert [(report.step, report.loss) for report in record.reports] == [(3, 4.5), (12, 4.1)]
    assert (record.status, record.tokens, record.worker_seconds) == ("finished", 12 * 8192, 61.0)
    assert said == ["trial 1 starts: group_size 512, rank 2", "trial 1 finished: eval/loss 4.1000, 98,304 tokens"]


def test_how_trials_end(tmp_path: Path) -> None:
    source, _ = source_of(tmp_path)
    for name in ("behind", "ill", "dead", "cut"):
        source.suggest(name)
        source.on_trial_result(name, validation(3, 4.5))
    source.fell_behind("behind", validation(6, 4.4))
    source.on_trial_complete("behind", told(7 * 8192, ended="interrupted", reason="", passing=False))
    source.on_trial_complete("ill", told(0, ended="failed", reason="the loss is nan", passing=False))
    source.on_trial_complete("dead", None, error=True)
    source.ends_because = "search.max_hours 1 is spent"
    source.on_trial_complete("cut", told(4 * 8192, ended="interrupted", reason="", passing=False))
    records = TrialStore(UPath(tmp_path)).read()
    assert [records[n].status for n in (1, 2, 3, 4)] == ["stopped", "failed", "failed", "running"]
    assert records[1].reason == "behind after 49,152 tokens"
    assert [report.step for report in records[1].reports] == [3, 6]
    assert records[1].tokens == 7 * 8192, "the step that it was in when it fell behind counts"
    assert records[2].reason == "the loss is nan"
    assert records[4].reason == "interrupted: search.max_hours 1 is spent"
    assert source.ends.kept.asked("search-demo.0001") and not source.ends.kept.asked("search-demo.0002")


def test_a_trial_that_goes_on_is_not_judged_again_by_what_it_was(tmp_path: Path) -> None:
    """Told again for ASHA's rungs, after a restart, a validation that it was let go on with decides nothing."""
    killed, _ = source_of(tmp_path)
    killed.suggest("a")
    for step in (3, 9):
        killed.on_trial_result("a", validation(step, 4.5))
    source, _ = source_of(tmp_path)
    source.suggest("b")
    for step in (3, 9):
        source.fell_behind("b", validation(step, 4.5))
        assert source.records.all[1].status == "running" and not source.ends.kept.asked("search-demo.0001")
    source.fell_behind("b", validation(10, 4.5))
    assert source.records.all[1].status == "stopped" and source.ends.kept.asked("search-demo.0001")


def test_a_trial_that_reached_its_last_step_meanwhile_has_finished(tmp_path: Path) -> None:
    source, _ = source_of(tmp_path)
    source.suggest("a")
    source.fell_behind("a", validation(9, 4.5))
    source.on_trial_complete("a", told(12 * 8192, ended="finished", reason="", passing=False))
    assert (source.records.all[1].status, source.records.all[1].reason) == ("finished", "")


def test_what_may_pass_is_tried_again_by_the_next_start(tmp_path: Path) -> None:
    source, said = source_of(tmp_path)
    for name in ("outage", "loss"):
        source.suggest(name)
    outage = "run.storage cannot be used: Service Unavailable (503)"
    source.on_trial_complete("outage", told(0, ended="failed", reason=outage, passing=True))
    source.on_trial_complete("loss", told(0, ended="failed", reason="the loss is nan", passing=False))
    assert source.records.all[1].status == "failed" and said[-2] == f"trial 1 failed: {outage}"
    again, said = source_of(tmp_path)
    given = again.suggest("x")
    assert isinstance(given, dict) and given["config"]["run"]["name"] == "search-demo.0001"
    assert said == ["trial 1 goes on: group_size 512, rank 2"]
    assert (again.records.all[1].status, again.records.all[1].reason) == ("running", "")


def test_a_trial_for_which_there_is_no_room_waits_for_a_start_with_room(tmp_path: Path) -> None:
    space = "search.space={workers.min: {choice: [4, 1]}}"
    source, said = source_of(tmp_path, space)
    given = source.suggest("a")
    assert isinstance(given, dict) and given["config"]["run"]["name"] == "search-demo.0002"
    assert said[0].startswith("trial 1 cannot be: workers.min is 4: the cluster has room for 2 such workers")
    assert (source.records.all[1].status, source.records.all[1].worker_seconds) == ("failed", 0.0)
    larger, said = source_of(tmp_path, space, room=4)
    assert larger.suggest("b") and said == ["trial 1 goes on: min 4"]


def test_a_search_that_starts_anew_goes_on_with_interrupted_trials_first(tmp_path: Path) -> None:
    killed, _ = source_of(tmp_path)
    for name in ("a", "b", "c"):
        killed.suggest(name)
        killed.on_trial_result(name, validation(3, 4.5, 30.0))
    killed.on_trial_complete("b", told(12 * 8192, 31.0, ended="finished", reason="", passing=False))
    source, said = source_of(tmp_path)
    runs = [given["config"]["run"]["name"] for given in map(source.suggest, "xyz") if isinstance(given, dict)]
    assert runs == ["search-demo.0001", "search-demo.0003", "search-demo.0004"]
    assert said[0] == "trial 1 goes on: group_size 512, rank 2"
    records = source.records.all
    assert len({str(record.settings) for record in records.values()}) == 4
    source.on_trial_result("x", told(5 * 8192, 10.0))
    assert records[1].worker_seconds == 40.0  # both drivers' time has to be paid
    assert [report.step for report in records[1].reports] == [3]


def test_an_ended_search_begins_nothing(tmp_path: Path) -> None:
    source, said = source_of(tmp_path, "search.trials=1")
    source.suggest("a")
    assert source.suggest("b") == Searcher.FINISHED
    assert said[-1] == "no further trial: search.trials 1 have been begun"


def test_trials_that_end_with_the_search_will_go_on(tmp_path: Path) -> None:
    source, said = source_of(tmp_path)
    for name in ("a", "b"):
        source.suggest(name)
    source.watch()
    assert not source.ends.kept.asked("search-demo.0002")
    source.on_trial_complete("a", told(0, ended="finished", reason="", passing=False))
    source.ends_because = "Ctrl-C"
    source.watch()
    assert source.ends.kept.asked("search-demo.0002") and source.suggest("c") == Searcher.FINISHED
    source.on_trial_complete("b", told(8192, ended="interrupted", reason="", passing=False))
    records = TrialStore(UPath(tmp_path)).read()
    assert [(r.status, r.reason) for r in records.values()] == [("finished", ""), ("running", "interrupted: Ctrl-C")]
    assert said[-1] == "trial 2 interrupted: Ctrl-C"


def test_a_search_that_is_taken_over_ends_its_trials(tmp_path: Path) -> None:
    source, _ = source_of(tmp_path)
    source.suggest("a")
    source.records.taken_over.set()
    source.watch()
    assert source.ends.kept.asked("search-demo.0001") and source.suggest("b") == Searcher.FINISHED
    assert source.ends_because == "another driver has taken over this search"


def test_a_trial_starts_once_its_record_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it the next driver would give the number, and the run's folder, to other settings."""
    source, said = source_of(tmp_path)
    source.suggest("a")
    written = TrialStore.write

    def refuse(store: TrialStore, record: Any) -> None:
        raise OSError("no answer")

    monkeypatch.setattr(TrialStore, "write", refuse)
    assert source.suggest("b") is None and list(source.records.all) == [1]
    source.on_trial_result("a", validation(3, 4.5))
    assert source.suggest("b") is None, "looked at again, and nothing more"
    monkeypatch.setattr(TrialStore, "write", written)
    assert isinstance(source.suggest("b"), dict)
    assert TrialStore(UPath(tmp_path)).read() == source.records.all and source.records.all[1].reports
    assert said[-1].startswith("trial 2 starts")


def test_the_whole_grid_and_then_no_more(tmp_path: Path) -> None:
    source, _ = source_of(tmp_path, "search.trials=100")
    given = [source.suggest(str(number)) for number in range(10)]
    assert given[9] == Searcher.FINISHED and all(isinstance(config, dict) for config in given[:9])


def test_settings_that_are_illegal_together_fail_alone(tmp_path: Path) -> None:
    space = "search.space={adapter.dropout: {choice: [0.1, 0.0]}, optimization.micro_batch: {choice: [2]}}"
    source, said = source_of(tmp_path, space)
    given = source.suggest("a")
    assert isinstance(given, dict) and given["config"]["adapter"]["dropout"] == 0.0
    assert said[0].startswith("trial 1 cannot be: adapter.dropout 0.1 needs optimization.micro_batch 1")
    assert source.records.all[1].status == "failed"


def test_tunes_state_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="goes on from its records"):
        source_of(tmp_path)[0].restore("state.pkl")
