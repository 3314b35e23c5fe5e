"""Where the time of a run went, from its ledger: goodput, its losses by cause, and each recovery in its phases.

The losses carry the names of Google's ML goodput measurement (`BadputType`). With productive time they tile the time
from the first line of the ledger to the last: each interval between two lines belongs to what the later line says was
done in it.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from statistics import fmean, median

import numpy as np

from pipeline.ledger import Event, StepRecord

Line = StepRecord | Event

PRODUCTIVE = "PRODUCTIVE"
"""Steps that a committed checkpoint contains."""
PENDING = "NOT_YET_COMMITTED"
"""Steps that no checkpoint contains yet; 0 once a run has ended."""
WASTED = "WASTED_PROGRESS_FROM_DISRUPTION"
"""Steps that had to be trained again."""
RECOVERY = "INFRASTRUCTURE_RECOVERY_FROM_DISRUPTION"
"""From the last step until code ran in new workers, as many as before."""
RESTORE = "UNPRODUCTIVE_CHECKPOINT_RESTORE_TIME"
"""Model built and checkpoint read in them."""
SHRINK = "ELASTIC_SLICE_DOWN"
"""As RECOVERY, to fewer workers."""
GROW = "ELASTIC_SCALE_UP"
"""As RECOVERY, to more workers."""
REINITIALIZATION = "ELASTIC_REINITIALIZATION"
"""As RESTORE, in fewer or more workers than before."""
SAVE = "UNPRODUCTIVE_CHECKPOINT_SAVE_TIME"
"""Steps waited for a checkpoint."""
STARTUP = "PROGRAM_STARTUP"
"""Until code ran in the first workers."""
PREPARATION = "TRAINING_PREP"
"""Model built in them."""
EVALUATION = "CUSTOM_BADPUT_EVENTS"
"""Validation losses."""
OTHER = "OTHER"
CATEGORIES = (
    *(PRODUCTIVE, PENDING, WASTED, RECOVERY, RESTORE, SHRINK, GROW, REINITIALIZATION),
    *(SAVE, STARTUP, PREPARATION, EVALUATION, OTHER),
)
IN_STEADY_STATE = (PRODUCTIVE, PENDING, WASTED, SAVE, EVALUATION, OTHER)
"""What goes on between two disturbances."""
# They do not divide the time: most are written during a step.
BESIDE_THE_STEPS = ("checkpoint", "notice", "system", "end")
NOTICED = ("failure", "resize", "driver")
PHASES = ("detect", "schedule", "restore", "first_step", "seconds")


@dataclass(frozen=True)
class Recovery:
    """From the last step before a disturbance to the first step after it; seconds."""

    step: int
    """The step that training went on from."""
    cause: str
    redone: int
    """Steps that were done before and had to be done again."""
    detect: float
    """Last step → failure noticed (or, where a driver died, until another one was started)."""
    schedule: float
    """Noticed → code runs in the new workers."""
    restore: float
    """Model built and checkpoint read."""
    first_step: float

    @property
    def seconds(self) -> float:
        return self.detect + self.schedule + self.restore + self.first_step


def seconds_by_category(lines: Sequence[Line], counting: set[int]) -> dict[str, float]:
    """Seconds of each category; they add up to the time between the first line and the last.

    lines: in the order written. counting: indices into `lines` of the steps that a committed checkpoint contains.
    """
    seconds: dict[str, float] = defaultdict(float)
    times = list(accumulate((line.time for line in lines), max))  # clocks of two machines may differ a little
    starting = {start: kinds for interval, kinds in _starts(lines) for start in interval}
    redone_from = _first_step_after(lines)
    saving, before = 0.0, times[0]
    for number, (line, time) in enumerate(zip(lines, times, strict=True)):
        if isinstance(line, Event) and line.event in BESIDE_THE_STEPS:
            saving += line.details.get("seconds", 0.0)
            continue
        elapsed, before = time - before, time
        if isinstance(line, StepRecord):
            inside = min(elapsed, line.seconds)
            kind = PRODUCTIVE if number in counting else WASTED if line.step >= redone_from[number] else PENDING
        else:
            inside = min(elapsed, line.details.get("seconds", elapsed))
            kind = _category(line, starting.get(number, (RECOVERY, RESTORE)))
        seconds[kind] += inside
        blocked = min(saving, elapsed - inside)
        seconds[SAVE] += blocked
        seconds[OTHER] += elapsed - inside - blocked
        saving = 0.0
    saves = [
        time for line, time in zip(lines, times, strict=True) if isinstance(line, Event) and line.event == "checkpoint"
    ]
    waited = max(0.0, max(saves, default=before) - before)  # for the last checkpoint
    seconds[SAVE] += waited
    seconds[OTHER] += times[-1] - before - waited
    return {category: seconds[category] for category in CATEGORIES}


def goodput(seconds: dict[str, float]) -> float:
    """Share of the time in which steps were trained that a committed checkpoint contains."""
    return seconds[PRODUCTIVE] / max(sum(seconds.values()), 1e-9)


def goodput_at(mtbf_seconds: float, seconds: dict[str, float], lost_per_disturbance: float) -> float:
    """Goodput of a long run with one disturbance every `mtbf_seconds`, by what was measured in this one:

        (share of steps in the time without disturbances) × (1 − lost seconds of a disturbance ÷ mean time between two)

    The share is that of steps, redone ones too, in the time that is neither start nor recovery: what keeps it below 1
    is saving and evaluating. lost_per_disturbance: see `lost_seconds`.
    """
    stepping = seconds[PRODUCTIVE] + seconds[PENDING] + seconds[WASTED]
    steady = stepping / max(sum(seconds[category] for category in IN_STEADY_STATE), 1e-9)
    return steady * max(0.0, 1 - lost_per_disturbance / mtbf_seconds)


def lost_seconds(lines: Sequence[Line], found: Sequence[Recovery]) -> float:
    """Mean seconds that a recovery cost; 0 without any.

    All of its phases, and its redone steps at the median time of a step, less one step that the first one is worth.
    """
    if not found:
        return 0.0
    step = median(line.seconds for line in lines if isinstance(line, StepRecord))
    return fmean(recovery.seconds - min(step, recovery.first_step) + recovery.redone * step for recovery in found)


def percentiles(found: Sequence[Recovery]) -> dict[str, dict[str, float]]:
    """p50 and p95 of each phase of the recoveries, and of all of it, in seconds; empty without any."""
    if not found:
        return {}
    columns = {phase: [getattr(recovery, phase) for recovery in found] for phase in PHASES}
    return {
        phase: {f"p{percent}": float(np.percentile(values, percent)) for percent in (50, 95)}
        for phase, values in columns.items()
    }


def recoveries(lines: Sequence[Line]) -> list[Recovery]:
    """One for each time that workers started again after a step had been trained."""
    found = []
    starts = [number for number, line in enumerate(lines) if isinstance(line, Event) and line.event == "start"]
    for previous, number in pairwise(starts):
        between = lines[previous + 1 : number]
        done = [line for line in between if isinstance(line, StepRecord)]
        after = next((line for line in lines[number:] if isinstance(line, StepRecord)), None)
        if not done or after is None:
            continue
        start, last = lines[number], done[-1]
        told = [line for line in between if isinstance(line, Event) and line.event in NOTICED]
        workers = [line for line in between if isinstance(line, Event) and line.event == "workers"]
        # Steps may be done after a resize is told; a failure may come after the first one, until workers can start.
        noticed = next((event for event in told if event.time >= last.time), told[-1] if told else None)
        running = max((workers[-1] if workers else start).time, last.time)
        detected = min(max(noticed.time, last.time) if noticed else running, running)
        found.append(
            Recovery(
                step=start.step,
                cause=noticed.details.get("cause", noticed.event) if noticed else "unknown",
                redone=max(0, last.step + 1 - start.step),
                detect=detected - last.time,
                schedule=running - detected,
                restore=start.time - running,
                first_step=after.time - start.time,
            )
        )
    return found


def _starts(lines: Sequence[Line]) -> Iterator[tuple[range, tuple[str, str]]]:
    """For each start the lines since the one before it, and the categories of its waiting and of its restoring."""
    previous, size = -1, 0
    for number, line in enumerate(lines):
        if isinstance(line, Event) and line.event == "start":
            now = line.details["world_size"]
            kinds = (RECOVERY, RESTORE) if now == size else (SHRINK if now < size else GROW, REINITIALIZATION)
            yield range(previous + 1, number + 1), kinds if size else (STARTUP, PREPARATION)
            previous, size = number, now


def _category(event: Event, of_start: tuple[str, str]) -> str:
    """of_start: categories of waiting and restoring of the start that the event leads to."""
    waiting, restoring = of_start
    if event.event == "evaluation":
        return EVALUATION
    if event.event in (*NOTICED, "workers"):
        return waiting
    return restoring if event.event == "start" else OTHER


def _first_step_after(lines: Sequence[Line]) -> list[float]:
    """For each line the lowest step that a later start went back to; infinity if none did."""
    lowest, result = float("inf"), []
    for line in reversed(lines):
        result.append(lowest)
        if isinstance(line, Event) and line.event == "start":
            lowest = min(lowest, line.step)
    return result[::-1]
