from pathlib import Path

import pytest
from upath import UPath

from pipeline.config import ConfigError, load_config
from pipeline.search_trials import (
    Report,
    TrialRecord,
    TrialStore,
    best_trial,
    described,
    pareto_front,
    trial_config,
)

CONFIG = load_config("configs/search-demo.yaml", ["workers.min=2", "workers.max=4"])


def record(number: int, loss: float, rate: float | None = 100.0, status: str = "finished") -> TrialRecord:
    return TrialRecord(number, f"s.{number}", {"adapter.rank": 8}, status, reports=[Report(3, 30, loss, rate)])


def test_a_trial_is_the_searchs_config_with_its_settings_and_a_name_of_its_own() -> None:
    config = trial_config(CONFIG, {"attention.group_size": 512, "adapter.rank": 4}, 7)
    assert (config.attention.group_size, config.adapter.rank) == (512, 4)
    assert (config.workers.min, config.workers.max) == (2, 2)
    assert config.run.name == "search-demo.0007"
    assert config.tracking.tags == {"longlora.search": "search-demo", "longlora.trial": "7"}
    assert not config.search.space
    assert config.data == CONFIG.data


def test_the_number_of_workers_may_be_a_setting() -> None:
    config = trial_config(CONFIG, {"workers.min": 8}, 1)
    assert (config.workers.min, config.workers.max) == (8, 8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"adapter.rnk": 4}, "adapter.rnk: unknown key; did you mean adapter.rank?"), ({"nothing.at": 1}, "nothing")],
)
def test_an_unknown_key_is_named(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        trial_config(CONFIG, settings)


def test_records_are_read_as_they_were_written(tmp_path: Path) -> None:
    store = TrialStore(UPath(tmp_path))
    records = {number: record(number, 4.0 + number, None if number == 2 else 50.5) for number in (1, 2, 10)}
    for one in records.values():
        store.write(one)
    assert store.read() == records
    assert list(store.read()) == [1, 2, 10]


def test_records_on_an_object_store(bucket: UPath) -> None:
    store = TrialStore(bucket / "search")
    assert store.read() == {}
    store.write(record(1, 4.0))
    assert store.read() == {1: record(1, 4.0)}


def test_the_best_trial_has_finished() -> None:
    assert best_trial([record(1, 4.2), record(2, 4.1), record(3, 3.9, status="stopped")]).number == 2
    assert best_trial([record(1, float("inf")), record(2, 4.1)]).number == 2, "what has diverged is never the best"
    assert best_trial([record(3, 3.9, status="stopped"), TrialRecord(4, "s.4", {}, "finished")]) is None


def test_the_pareto_front_by_hand() -> None:
    records = [record(1, 4.0, 100), record(2, 4.5, 200), record(3, 4.6, 150), record(4, 3.9, 50), record(5, 4.0, 90)]
    stopped = record(6, 3.0, 300, status="stopped")
    assert [one.number for one in pareto_front([*records, stopped])] == [4, 1, 2]


def test_settings_in_words() -> None:
    settings = {"attention.group_size": 512, "optimization.learning_rate": 0.00123456}
    assert described(settings) == "group_size 512, learning_rate 0.00123"
