"""ASHA, told of the trials of an earlier driver; it asks trials to end."""

from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from pipeline.config import load_config
from pipeline.search_asha import scheduler
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


def behind_after(records: list[TrialRecord], told: dict[int, float], name: str = "new") -> list[int]:
    """The steps after which a trial with these losses is asked to end; Tune is never told to stop it."""
    asked: list[int] = []
    asha: Any = scheduler(CONFIG, records, lambda trial_id, result: asked.append(result["tokens"] // TOKENS))
    trial = SimpleNamespace(trial_id=name)
    asha.on_trial_add(None, trial)
    for step, loss in told.items():
        answer = asha.on_trial_result(None, trial, {"tokens": step * TOKENS, LOSS: loss})
        assert answer == TrialScheduler.CONTINUE, "Tune would kill it before it has saved"
    assert asha.on_trial_result(None, trial, {"tokens": 12 * TOKENS}) == TrialScheduler.CONTINUE, "a sign of life"
    return asked


@pytest.mark.parametrize(
    ("step", "loss", "behind"),
    [
        (3, 3.9, False),
        (3, 4.2, True),  # of 4.0, 4.5 and 4.2 the best third goes on
        (2, 9.9, False),  # before the first rung
        (6, 9.9, True),  # reaches the first rung late
        (9, 3.7, False),
        (9, 3.9, True),
    ],
)
def test_new_trials_are_held_against_earlier_ones(step: int, loss: float, behind: bool) -> None:
    assert behind_after(EARLIER, {step: loss}) == [step] * behind


def test_the_first_trial_has_nothing_to_fall_behind() -> None:
    assert behind_after([], dict.fromkeys((3, 6, 9, 12), 9.9)) == []


def test_without_asha_all_train_to_the_end() -> None:
    config = load_config("configs/search-demo.yaml", ["search.asha=null"])
    assert type(scheduler(config, EARLIER, lambda trial_id, result: None)) is FIFOScheduler
