"""What Ray Tune asks and tells, played by hand."""

from pathlib import Path
from typing import Any

import pytest
from ray.tune.search import Searcher
from upath import UPath

from pipeline.config import load_config
from pipeline.prepare import PreparedPacks
from pipeline.search_budget import Budget
from pipeline.search_source import EndWithBudget, TrialSource
from pipeline.search_trials import TrialStore


def source_of(folder: Path, *overrides: str) -> tuple[TrialSource, list[str]]:
    config = load_config("configs/search-demo.yaml", list(overrides))
    said: list[str] = []
    packs = PreparedPacks(UPath("train-packs"), UPath("validation-packs"))
    search = UPath(folder)
    return TrialSource(config, TrialStore(search), packs, Budget(config, search), said.append), said


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
    source.on_trial_complete("behind", validation(6, 4.4))  # Tune gives the last result to this method alone
    source.on_trial_complete("ill", told(0, ended="failed", reason="workers.min is 9: …"))
    source.on_trial_complete("dead", None, error=True)
    source.ends_because = "search.max_hours 1 is spent"
    source.on_trial_complete("cut", validation(3, 4.5))
    records = TrialStore(UPath(tmp_path)).read()
    assert [records[n].status for n in (1, 2, 3, 4)] == ["stopped", "failed", "failed", "running"]
    assert records[1].reason == "behind after 49,152 tokens"
    assert [report.step for report in records[1].reports] == [3, 6]
    assert records[2].reason == "workers.min is 9: …"
    assert records[4].reason == "interrupted: search.max_hours 1 is spent"


def test_a_search_that_starts_anew_goes_on_with_interrupted_trials_first(tmp_path: Path) -> None:
    killed, _ = source_of(tmp_path)
    for name in ("a", "b", "c"):
        killed.suggest(name)
        killed.on_trial_result(name, validation(3, 4.5, 30.0))
    killed.on_trial_complete("b", told(12 * 8192, 31.0, ended="finished", reason=""))
    source, said = source_of(tmp_path)
    runs = [given["config"]["run"]["name"] for given in map(source.suggest, "xyz") if isinstance(given, dict)]
    assert runs == ["search-demo.0001", "search-demo.0003", "search-demo.0004"]
    assert said[0] == "trial 1 goes on: group_size 512, rank 2"
    assert len({str(record.settings) for record in source.records.values()}) == 4
    source.on_trial_result("x", told(5 * 8192, 10.0))
    assert source.records[1].worker_seconds == 40.0  # both drivers' time has to be paid
    assert [report.step for report in source.records[1].reports] == [3]


def test_an_ended_search_begins_nothing(tmp_path: Path) -> None:
    source, said = source_of(tmp_path, "search.trials=1")
    source.suggest("a")
    assert source.suggest("b") == Searcher.FINISHED
    assert said[-1] == "no further trial: search.trials 1 have been begun"
    source.ends_because = "Ctrl-C"
    assert EndWithBudget(source).stop_all() and not EndWithBudget(source)("a", {})


def test_trials_that_end_with_the_search_will_go_on(tmp_path: Path) -> None:
    source, said = source_of(tmp_path)
    for name in ("a", "b"):
        source.suggest(name)
    source.on_trial_complete("a", told(0, ended="finished", reason=""))
    source.ends_because = "Ctrl-C"
    source.interrupt()
    records = TrialStore(UPath(tmp_path)).read()
    assert [(r.status, r.reason) for r in records.values()] == [("finished", ""), ("running", "interrupted: Ctrl-C")]
    assert said[-1] == "trial 2 interrupted: Ctrl-C"


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
    assert source.records[1].status == "failed"


def test_tunes_state_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="goes on from its records"):
        source_of(tmp_path)[0].restore("state.pkl")
