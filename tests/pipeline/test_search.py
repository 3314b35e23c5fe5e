"""ASHA, told of the trials of an earlier driver."""

from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from pipeline.config import load_config
from pipeline.search import _scheduler
from pipeline.search_space import LOSS
from pipeline.search_trials import Report, TrialRecord

CONFIG = load_config("configs/search-demo.yaml")  # rungs after 3 and after 9 of 12 steps of 8192 tokens
TOKENS = 8192


def record(number: int, status: str, losses: dict[int, float]) -> TrialRecord:
    reports = [Report(step, step * TOKENS, loss, None) for step, loss in losses.items()]
    return TrialRecord(number, f"search-demo.{number:04d}", {}, status, reports=reports)


EARLIER = [
    record(1, "finished", {3: 4.0, 6: 3.9, 9: 3.8, 12: 3.7}),
    record(2, "stopped", {3: 4.5}),
    record(3, "running", {3: 3.0}),  # goes on, and tells its own losses again
]


def decision(scheduler: Any, step: int, loss: float, name: str = "new") -> str:
    trial = SimpleNamespace(trial_id=name)
    if name not in scheduler._trial_info:
        scheduler.on_trial_add(None, trial)
    return scheduler.on_trial_result(None, trial, {"tokens": step * TOKENS, LOSS: loss})


@pytest.mark.parametrize(
    ("step", "loss", "expected"),
    [
        (3, 3.9, TrialScheduler.CONTINUE),
        (3, 4.2, TrialScheduler.STOP),  # of 4.0, 4.5 and 4.2 the best third goes on
        (2, 9.9, TrialScheduler.CONTINUE),  # before the first rung
        (6, 9.9, TrialScheduler.STOP),  # reaches the first rung late
        (9, 3.7, TrialScheduler.CONTINUE),
        (9, 3.9, TrialScheduler.STOP),
    ],
)
def test_new_trials_are_held_against_earlier_ones(step: int, loss: float, expected: str) -> None:
    assert decision(_scheduler(CONFIG, EARLIER), step, loss) == expected


def test_the_first_trial_has_nothing_to_fall_behind() -> None:
    scheduler = _scheduler(CONFIG, [])
    assert [decision(scheduler, step, 9.9) for step in (3, 6, 9, 12)] == [TrialScheduler.CONTINUE] * 4


def test_a_sign_of_life_decides_nothing() -> None:
    scheduler = _scheduler(CONFIG, EARLIER)
    trial = SimpleNamespace(trial_id="new")
    scheduler.on_trial_add(None, trial)
    assert scheduler.on_trial_result(None, trial, {"tokens": 9 * TOKENS}) == TrialScheduler.CONTINUE


def test_without_asha_all_train_to_the_end() -> None:
    config = load_config("configs/search-demo.yaml", ["search.asha=null"])
    assert type(_scheduler(config, EARLIER)) is FIFOScheduler
