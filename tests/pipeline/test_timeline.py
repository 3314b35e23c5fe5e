"""Times worked out by hand on a ledger of a few lines."""

import pytest

from pipeline.ledger import Event, StepRecord
from pipeline.timeline import (
    CATEGORIES,
    OTHER,
    PENDING,
    PRODUCTIVE,
    RECOVERY,
    RESTORE,
    SAVE,
    STARTUP,
    WASTED,
    Line,
    goodput,
    recoveries,
    seconds_by_category,
)


def step(number: int, time: float, seconds: float = 2.0) -> StepRecord:
    return StepRecord(
        step=number,
        world_size=2,
        first_position=0,
        sequences=[],
        token_hash="",
        loss=1.0,
        target_tokens=1,
        time=time,
        seconds=seconds,
    )


# Two steps, a checkpoint after the first; killed during the third; steps 1 and 2 again, and the last not committed.
LINES: list[Line] = [
    Event("driver", 0, 100.0),
    Event("workers", 0, 105.0),
    Event("start", 0, 110.0),
    step(0, 112.0),
    Event("checkpoint", 1, 113.5, {"seconds": 1.0}),
    step(1, 115.5),
    Event("failure", 2, 118.0, {"cause": "worker died"}),
    Event("workers", 1, 124.0),
    Event("start", 1, 127.0),
    step(1, 130.0, seconds=3.0),
    Event("checkpoint", 2, 131.0, {"seconds": 1.0}),
    step(2, 133.0),
]
COUNTING = {3, 9}


def test_every_second_has_one_category() -> None:
    seconds = seconds_by_category(LINES, COUNTING)
    assert tuple(seconds) == CATEGORIES
    assert {name: value for name, value in seconds.items() if value} == {
        PRODUCTIVE: 5.0,
        PENDING: 2.0,
        WASTED: 2.0,
        RECOVERY: 8.5,
        RESTORE: 3.0,
        SAVE: 2.0,
        STARTUP: 10.0,
        OTHER: 0.5,
    }
    assert sum(seconds.values()) == LINES[-1].time - LINES[0].time
    assert goodput(seconds) == pytest.approx(5 / 33)


def test_a_recovery_has_four_phases() -> None:
    [recovery] = recoveries(LINES)
    assert (recovery.step, recovery.cause, recovery.redone) == (1, "worker died", 1)
    assert (recovery.detect, recovery.schedule, recovery.restore, recovery.first_step) == (2.5, 6.0, 3.0, 3.0)
    assert recovery.seconds == 130.0 - 115.5


def test_a_driver_that_died_is_noticed_when_the_next_one_starts() -> None:
    lines = [line for line in LINES if not (isinstance(line, Event) and line.event == "failure")]
    lines.insert(6, Event("driver", 0, 120.0))
    [recovery] = recoveries(lines)
    assert (recovery.cause, recovery.detect, recovery.schedule) == ("driver", 4.5, 4.0)


def test_a_run_without_disturbance_has_no_recovery() -> None:
    assert recoveries(LINES[:6]) == []
    assert seconds_by_category(LINES[:1], set()) == dict.fromkeys(CATEGORIES, 0.0)
