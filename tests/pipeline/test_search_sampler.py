from dataclasses import replace

import pytest

from pipeline.search_sampler import _values, next_settings
from pipeline.search_space import Parameter, Search
from pipeline.search_trials import Report, TrialRecord

RANGES = {
    "attention.group_size": Parameter(choice=[512, 1024]),
    "adapter.rank": Parameter(choice=[4, 8, 16]),
    "optimization.learning_rate": Parameter(log_uniform=(1e-4, 1e-2)),
    "adapter.dropout": Parameter(uniform=(0.0, 0.1), when={"adapter.rank": [16]}),
}
CHOICES = {
    "adapter.targets": Parameter(choice=[["q_proj"], ["q_proj", "v_proj"]]),
    "adapter.rank": Parameter(choice=[4, 8]),
}


def run(search: Search, trials: int, seed: int = 0) -> list[TrialRecord]:
    """Trials whose loss grows with the distance of the learning rate from 1e-3 and of the rank from 16."""
    records: list[TrialRecord] = []
    for number in range(1, trials + 1):
        settings = next_settings(search, seed, records)
        if settings is None:
            break
        rate = settings.get("optimization.learning_rate", 1e-3)
        loss = abs(rate / 1e-3 - 1) + (16 - settings["adapter.rank"]) / 16
        records.append(TrialRecord(number, f"s.{number}", settings, "finished", reports=[Report(1, 10, loss, 100.0)]))
    return records


@pytest.mark.parametrize("sampler", ["random", "optuna"])
def test_draws_lie_in_the_space(sampler: str) -> None:
    for record in run(Search(space=RANGES, sampler=sampler), 20):
        settings = record.settings
        assert settings["attention.group_size"] in (512, 1024)
        assert 1e-4 <= settings["optimization.learning_rate"] <= 1e-2
        assert ("adapter.dropout" in settings) == (settings["adapter.rank"] == 16)
        assert 0.0 <= settings.get("adapter.dropout", 0.0) <= 0.1


@pytest.mark.parametrize("sampler", ["random", "grid", "optuna"])
def test_no_settings_are_tried_twice_and_a_small_space_ends(sampler: str) -> None:
    records = run(Search(space=CHOICES, sampler=sampler), 10)
    assert len(records) == 4
    assert all(one.settings != other.settings for one in records for other in records if one is not other)


@pytest.mark.parametrize("sampler", ["random", "optuna"])
def test_the_same_trials_give_the_same_next_one(sampler: str) -> None:
    """A search that starts anew goes on as if it had not been stopped."""
    search = Search(space=RANGES, sampler=sampler)
    assert run(search, 12) == run(search, 12)
    assert run(search, 12, seed=1) != run(search, 12)


def test_optuna_learns_from_what_has_ended() -> None:
    learned = run(Search(space=RANGES, sampler="optuna", trials=40), 40)[20:]
    random = run(Search(space=RANGES, sampler="random"), 40)[20:]
    by_sampler = [sorted(record.loss for record in records) for records in (learned, random)]
    print(by_sampler)
    assert by_sampler[0][10] < 0.6 * by_sampler[1][10]


@pytest.mark.parametrize("status", ["running", "failed", "stopped"])
def test_trials_that_came_to_nothing_are_no_obstacle(status: str) -> None:
    search = Search(space=RANGES, objectives=["eval/loss", "train/tokens_per_second"])
    records = [replace(record, status=status, reports=[]) for record in run(search, 3)]
    assert next_settings(search, 0, records) is not None


def test_what_optuna_is_told_of_a_trial() -> None:
    """Tokens/s as the table has them, not those of the last steps alone; nothing of a trial that has diverged."""
    search = Search(space=CHOICES, objectives=["eval/loss", "train/tokens_per_second"])
    reports = [Report(step, step, 5.0 - step, rate) for step, rate in ((1, 900.0), (2, 1000.0), (3, 100.0))]
    trial = TrialRecord(1, "s.1", {}, "finished", reports=reports)
    assert _values(trial, search) == [2.0, 900.0]
    assert _values(replace(trial, reports=[Report(3, 3, float("inf"), 100.0)]), search) is None
