"""Times worked out by hand on a ledger of a few lines."""

import random
from dataclasses import replace

import pytest

from pipeline.ledger import Event, StepRecord
from pipeline.timeline import (
    CATEGORIES,
    GROW,
    OTHER,
    PENDING,
    PREPARATION,
    PRODUCTIVE,
    RECOVERY,
    REINITIALIZATION,
    RESTORE,
    SAVE,
    SHRINK,
    STARTUP,
    WASTED,
    Line,
    goodput,
    goodput_at,
    lost_seconds,
    percentiles,
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


def start(number: int, time: float, workers: int = 2) -> Event:
    return Event("start", number, time, {"world_size": workers})


# Two steps, a checkpoint after the first; killed during the third; steps 1 and 2 again, and the last not committed.
LINES: list[Line] = [
    Event("driver", 0, 100.0),
    Event("workers", 0, 105.0),
    start(0, 110.0),
    step(0, 112.0),
    Event("checkpoint", 1, 113.5, {"seconds": 1.0}),
    step(1, 115.5),
    Event("failure", 2, 118.0, {"cause": "worker died"}),
    Event("workers", 1, 124.0),
    start(1, 127.0),
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
        STARTUP: 5.0,
        PREPARATION: 5.0,
        OTHER: 0.5,
    }
    assert sum(seconds.values()) == LINES[-1].time - LINES[0].time
    assert goodput(seconds) == pytest.approx(5 / 33)


def test_samples_of_the_system_take_no_time() -> None:
    for place, time in ((0, 99.0), (4, 113.0), (len(LINES), 133.0)):
        lines = [*LINES[:place], Event("system", 1, time), *LINES[place:]]
        counting = {number + (number >= place) for number in COUNTING}
        before = time < LINES[0].time  # a second of its own, of which nothing says what was done in it
        expected = seconds_by_category(LINES, COUNTING)
        expected[STARTUP] += before
        assert seconds_by_category(lines, counting) == expected


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


def test_categories_have_the_names_of_googles_goodput_measurement() -> None:
    """Of its BadputType; productive time is no badput, and a run that goes on has steps that are not yet either."""
    assert set(CATEGORIES) - {PRODUCTIVE, PENDING} == {
        "WASTED_PROGRESS_FROM_DISRUPTION",
        "INFRASTRUCTURE_RECOVERY_FROM_DISRUPTION",
        "UNPRODUCTIVE_CHECKPOINT_RESTORE_TIME",
        "UNPRODUCTIVE_CHECKPOINT_SAVE_TIME",
        "ELASTIC_SLICE_DOWN",
        "ELASTIC_SCALE_UP",
        "ELASTIC_REINITIALIZATION",
        "PROGRAM_STARTUP",
        "TRAINING_PREP",
        "CUSTOM_BADPUT_EVENTS",
        "OTHER",
    }


def test_fewer_and_more_workers_are_elastic() -> None:
    """2 → 1 → 3 workers: a failure after step 0, waited for 3 + 4 s; then a resize, 1 + 2 s."""
    lines = [
        start(0, 0.0),
        step(0, 2.0),
        Event("failure", 1, 5.0, {"cause": "worker died"}),
        Event("workers", 1, 9.0),
        start(1, 11.0, workers=1),
        step(1, 13.0),
        Event("resize", 2, 14.0, {"cause": "resize to 3"}),
        Event("workers", 2, 16.0),
        start(2, 19.0, workers=3),
        step(2, 21.0),
    ]
    seconds = seconds_by_category(lines, {1, 5, 9})
    assert {name: value for name, value in seconds.items() if value} == {
        PRODUCTIVE: 6.0,
        SHRINK: 7.0,
        GROW: 3.0,
        REINITIALIZATION: 5.0,
    }


def test_a_start_that_fails_is_part_of_the_recovery() -> None:
    lines = [*LINES[:7], Event("workers", 1, 119.0), Event("failure", 1, 120.0), *LINES[7:]]
    [recovery] = recoveries(lines)
    assert (recovery.cause, recovery.detect, recovery.schedule) == ("worker died", 2.5, 6.0)


def test_steps_after_a_resize_is_told_delay_nothing() -> None:
    lines = [
        start(0, 0.0),
        Event("resize", 0, 1.0, {"cause": "resize to 3"}),
        step(0, 2.0),
        start(1, 6.0, 3),
        step(1, 9.0),
    ]
    [recovery] = recoveries(lines)
    assert (recovery.cause, recovery.redone) == ("resize to 3", 0)
    assert (recovery.detect, recovery.schedule, recovery.restore, recovery.first_step) == (0.0, 4.0, 0.0, 3.0)


def test_goodput_of_a_long_run_by_hand() -> None:
    """The recovery took 14.5 s; its first step is worth the median step's 2 s, and a step of 2 s was redone.

    Without disturbances 9 of 11.5 s are steps: 2 s are saves, and 0.5 s nothing in particular.
    """
    found, seconds = recoveries(LINES), seconds_by_category(LINES, COUNTING)
    assert lost_seconds(LINES, found) == 14.5 - 2 + 2
    assert goodput_at(3600.0, seconds, 14.5) == pytest.approx(9 / 11.5 * (1 - 14.5 / 3600))
    assert goodput_at(29.0, seconds, 14.5) == pytest.approx(9 / 11.5 / 2)
    assert goodput_at(10.0, seconds, 14.5) == 0.0, "no step is ever kept"
    assert lost_seconds(LINES[:6], []) == 0.0


def test_percentiles_by_hand() -> None:
    [one] = recoveries(LINES)
    found = [replace(one, detect=float(value)) for value in range(21)]
    assert percentiles(found)["detect"] == {"p50": 10.0, "p95": 19.0}
    assert percentiles(found)["schedule"] == {"p50": 6.0, "p95": 6.0}
    assert percentiles(found)["seconds"]["p50"] == 10 + 6 + 3 + 3
    assert percentiles([]) == {}


@pytest.mark.parametrize("seed", range(50))
def test_the_categories_of_any_ledger_add_up_to_its_time(seed: int) -> None:
    """Whatever happens in whatever order, with clocks that are up to half a second apart."""
    draw = random.Random(seed)
    lines: list[Line] = []
    time, done = 1000.0, 0
    for _ in range(draw.randrange(1, 120)):
        time += draw.choice((0.0, 0.1, draw.uniform(0, 20)))
        told = time + draw.uniform(-0.5, 0)
        match draw.choice(("step", "step", "step", "start", "checkpoint", "evaluation", "other")):
            case "step":
                lines.append(step(done, told, seconds=draw.uniform(0, 10)))
                done += 1
            case "start":
                done = draw.randrange(done + 1)
                lines.append(start(done, told, workers=draw.randrange(1, 5)))
            case "other":
                lines.append(
                    Event(draw.choice(("driver", "workers", "failure", "resize", "notice", "end")), done, told)
                )
            case event:
                lines.append(Event(event, done, told, {"seconds": draw.uniform(0, 10)}))
    steps = [number for number, line in enumerate(lines) if isinstance(line, StepRecord)]
    seconds = seconds_by_category(lines, set(draw.sample(steps, draw.randrange(len(steps) + 1))))
    assert tuple(seconds) == CATEGORIES
    assert all(value >= -1e-9 for value in seconds.values())
    assert sum(seconds.values()) == pytest.approx(max(line.time for line in lines) - lines[0].time)
    assert 0 <= goodput(seconds) <= 1 + 1e-9
    assert all(value >= -1.0 for one in recoveries(lines) for value in (one.detect, one.schedule, one.restore))


def test_what_follows_the_last_checkpoint_is_no_saving() -> None:
    lines: list[Line] = [
        start(0, 10.0),
        step(0, 12.0),
        Event("checkpoint", 1, 13.0, {"seconds": 0.5}),
        Event("end", 1, 15.0, {"status": "FINISHED"}),
    ]
    seconds = seconds_by_category(lines, {1})
    assert (seconds[SAVE], seconds[OTHER]) == (1.0, 2.0)
