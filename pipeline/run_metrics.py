"""What MLflow shows of a run, as a function of its ledger: metrics, tags, status. Nothing here talks to MLflow.

A step that is redone after a restart has the same metrics again; the first record of a step counts.
"""

from collections import Counter
from dataclasses import dataclass

from pipeline.ledger import Event, StepRecord

DISTURBANCES = ("failure", "notice", "resize")


@dataclass(frozen=True)
class Point:
    """One value of a metric. Everything in it comes from the ledger: sent again, it is the same point."""

    metric: str
    step: int
    """Position on the step axis: training steps, or tokens in a metric `…_by_tokens`."""
    value: float
    time: float
    """Unix time, seconds."""


class RunMetrics:
    """Takes the lines of a run's ledger in order, and says what they add to what MLflow shows."""

    def __init__(self, tokens_per_step: int) -> None:
        self.status: str | None = None
        """As MLflow calls it: RUNNING, FINISHED, FAILED or KILLED; None before the first attempt."""
        self.ended = 0.0
        """Unix time of the end, seconds, where the run is not RUNNING."""
        self._tokens_per_step = tokens_per_step
        self._next_step, self._next_evaluation = 0, 0  # what lies before them has its points
        self._attempts, self._drivers, self._world_size = 0, 0, 0
        self._disturbances: Counter[str] = Counter()

    def take(self, attempt: int, line: StepRecord | Event) -> list[Point]:
        """The points of a line: a step's or a validation's, where it is the first of that step."""
        if isinstance(line, StepRecord):
            return self._step(attempt, line)
        if line.event == "evaluation":
            return self._evaluation(line)
        if line.event == "start":
            self._attempts, self._world_size, self.status = attempt, line.details["world_size"], "RUNNING"
        elif line.event == "end":
            self.status, self.ended = line.details["status"], line.time
        elif line.event == "driver":
            if self._drivers:
                self._disturbances["driver restart"] += 1
            self._drivers += 1
        elif line.event in DISTURBANCES:
            self._disturbances[line.event] += 1
        return []

    def tags(self) -> dict[str, str]:
        """`longlora.disturbances` (`3: 2 failure, 1 resize`), `longlora.attempts`, `longlora.world_size` (newest)."""
        if not self._attempts:
            return {}
        kinds = ", ".join(f"{count} {kind}" for kind, count in self._disturbances.most_common())
        return {
            "longlora.disturbances": f"{self._disturbances.total()}: {kinds}" if kinds else "0",
            "longlora.attempts": str(self._attempts),
            "longlora.world_size": str(self._world_size),
        }

    def _step(self, attempt: int, record: StepRecord) -> list[Point]:
        self._world_size = record.world_size
        if record.step < self._next_step:
            return []
        self._next_step = record.step + 1
        trained = {
            "train/loss": record.loss,
            "train/learning_rate": record.learning_rate,
            "train/gradient_norm": record.gradient_norm,
            "train/tokens_per_second": record.tokens / record.seconds,
            "train/world_size": record.world_size,
        }
        # How disturbed the run was when the step was trained: a staircase beside the loss.
        run = {"run/disturbances": self._disturbances.total(), "run/attempt": attempt}
        tokens = (record.step + 1) * self._tokens_per_step
        return _points(trained | run, record.step, record.time) + _points(trained, tokens, record.time, "_by_tokens")

    def _evaluation(self, event: Event) -> list[Point]:
        if event.step < self._next_evaluation:
            return []
        self._next_evaluation = event.step + 1
        loss = {"eval/loss": event.details["loss"]}
        tokens = event.step * self._tokens_per_step
        return _points(loss, event.step, event.time) + _points(loss, tokens, event.time, "_by_tokens")


def _points(values: dict[str, float], step: int, time: float, suffix: str = "") -> list[Point]:
    return [Point(metric + suffix, step, value, time) for metric, value in values.items()]
