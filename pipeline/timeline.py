"""Where the time of a run went, from its ledger: goodput, its losses by cause, and each recovery in its phases.

The categories are those of Google's ML goodput measurement. They tile the time from the first line of the ledger to the
last: each interval between two lines belongs to what the later line says was done in it.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from pipeline.ledger import Event, StepRecord

Line = StepRecord | Event

PRODUCTIVE = "productive"
PENDING = "not_yet_committed"
WASTED = "wasted_progress_from_disruption"
RECOVERY = "infrastructure_recovery_from_disruption"
RESTORE = "checkpoint_restore"
SAVE = "checkpoint_save"
STARTUP = "program_startup"
EVALUATION = "evaluation"
OTHER = "other"
BESIDE_THE_STEPS = ("checkpoint", "notice")  # written while a step goes on: they do not divide the time
CATEGORIES = (PRODUCTIVE, PENDING, WASTED, RECOVERY, RESTORE, SAVE, STARTUP, EVALUATION, OTHER)


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
    started, saving, before = False, 0.0, lines[0].time
    redone_from = _first_step_after(lines)
    for number, line in enumerate(lines):
        if isinstance(line, Event) and line.event in BESIDE_THE_STEPS:
            saving += line.details.get("seconds", 0.0)
            continue
        elapsed, before = line.time - before, line.time
        if isinstance(line, StepRecord):
            inside = min(elapsed, line.seconds)
            kind = PRODUCTIVE if number in counting else WASTED if line.step >= redone_from[number] else PENDING
        else:
            kind = _category(line, started)
            inside = min(elapsed, line.details.get("seconds", elapsed))
            started = started or line.event == "start"
        seconds[kind] += inside
        blocked = min(saving, elapsed - inside)
        seconds[SAVE] += blocked
        seconds[OTHER] += elapsed - inside - blocked
        saving = 0.0
    seconds[SAVE] += lines[-1].time - before  # the last checkpoint is waited for
    return {category: seconds[category] for category in CATEGORIES}


def goodput(seconds: dict[str, float]) -> float:
    """Share of the time in which steps were trained that a committed checkpoint contains."""
    return seconds[PRODUCTIVE] / max(sum(seconds.values()), 1e-9)


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
        events = {line.event: line for line in between if isinstance(line, Event)}
        noticed = events.get("failure") or events.get("resize") or events.get("driver")
        running = events.get("workers", lines[number]).time
        detected = min(noticed.time if noticed else running, running)
        start = lines[number]
        found.append(
            Recovery(
                step=start.step,
                cause=noticed.details.get("cause", noticed.event) if noticed else "unknown",
                redone=max(0, done[-1].step + 1 - start.step),
                detect=detected - done[-1].time,
                schedule=running - detected,
                restore=start.time - running,
                first_step=after.time - start.time,
            )
        )
    return found


def _category(event: Event, started: bool) -> str:
    if event.event == "evaluation":
        return EVALUATION
    if event.event in ("failure", "driver", "workers"):
        return RECOVERY if started else STARTUP
    if event.event == "start":
        return RESTORE if started else STARTUP
    return OTHER


def _first_step_after(lines: Sequence[Line]) -> list[float]:
    """For each line the lowest step that a later start went back to; infinity if none did."""
    lowest, result = float("inf"), []
    for line in reversed(lines):
        result.append(lowest)
        if isinstance(line, Event) and line.event == "start":
            lowest = min(lowest, line.step)
    return result[::-1]
