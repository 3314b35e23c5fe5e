"""What MLflow shows of a run, as a function of its ledger: metrics, tags, status, packs. Nothing here talks to MLflow.

A step that is redone after a restart has the same metrics again; the first record of a step counts.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.ledger import Event, StepRecord

DISTURBANCES = ("failure", "notice", "resize")


@dataclass(frozen=True)
class Point:
    """One value of a metric. Everything in it comes from the ledger: sent again, it is the same point."""

    metric: str
    step: int
    """Position on the step axis: training steps; tokens in `…_by_tokens`; in `system/…` seconds of the run."""
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
        self.packs: dict[tuple[str, str], dict[str, Any]] = {}
        """What the run was trained and validated on, by (training or validation, fingerprint)."""
        self._tokens_per_step = tokens_per_step
        self._next_step, self._next_evaluation = 0, 0  # what lies before them has its points
        self._attempts, self._drivers, self._world_size = 0, 0, 0
        self._disturbances: Counter[str] = Counter()
        self._began: float | None = None
        self._peak_rate: float | None = None  # operations a second of a worker's GPU
        self._sampled: dict[str, int] = {}  # position of the last sample of each node

    def take(self, attempt: int, line: StepRecord | Event) -> list[Point]:
        """The points of a line: of a step or a validation the first of its number counts, of samples each."""
        self._began = line.time if self._began is None else self._began
        if isinstance(line, StepRecord):
            return self._step(attempt, line)
        if line.event == "evaluation":
            return self._evaluation(line)
        if line.event == "system":
            return self._system(line, self._began)
        if line.event == "start":
            self._attempts, self._world_size, self.status = attempt, line.details["world_size"], "RUNNING"
            self._peak_rate = line.details.get("peak_rate")
            for use, packs in line.details.get("packs", {}).items():  # missing in ledgers of earlier versions
                self.packs[use, packs["fingerprint"]] = packs
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

    def _performance(self, record: StepRecord) -> dict[str, float]:
        """What ledgers of earlier versions, and machines without a GPU, do not have is left out."""
        rate = record.operations / record.seconds / record.world_size
        told = {f"train/seconds_{part}": seconds for part, seconds in record.parts.items()}
        if rate:
            told["train/tflops_per_worker"] = rate / 1e12
        if rate and self._peak_rate:
            told["train/mfu"] = rate / self._peak_rate
        if record.peak_bytes:
            told["train/peak_memory_gib"] = record.peak_bytes / 2**30
        return told

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
        run = {"run/disturbances": self._disturbances.total(), "run/attempt": attempt, **self._performance(record)}
        tokens = (record.step + 1) * self._tokens_per_step
        return _points(trained | run, record.step, record.time) + _points(trained, tokens, record.time, "_by_tokens")

    def _evaluation(self, event: Event) -> list[Point]:
        if event.step < self._next_evaluation:
            return []
        self._next_evaluation = event.step + 1
        loss = {"eval/loss": event.details["loss"]}
        tokens = event.step * self._tokens_per_step
        return _points(loss, event.step, event.time) + _points(loss, tokens, event.time, "_by_tokens")

    def _system(self, event: Event, began: float) -> list[Point]:
        """A node's sample, at the second in which it was told, so that one that MLflow has is never another's."""
        node, nodes, values = (event.details[name] for name in ("node", "nodes", "values"))
        prefix = f"system/{node}/" if nodes > 1 else "system/"
        second = max(int(event.time - began), self._sampled.get(prefix, -1) + 1)  # clocks of drivers may differ
        self._sampled[prefix] = second
        return _points({prefix + name: value for name, value in values.items()}, second, event.time)


def goodput_so_far(numbered: Sequence[tuple[int, StepRecord | Event]]) -> Point:
    """`run/goodput` of a ledger's (attempt, line)s, at the steps that its newest checkpoint contains."""
    from pipeline.audit import counting_steps  # pyarrow with it, for which no start of a run waits
    from pipeline.timeline import goodput, seconds_by_category

    lines = [line for _, line in numbered]
    told = [line.step for line in lines if isinstance(line, Event) and line.event in ("start", "checkpoint")]
    committed = told[-1] if told else 0
    seconds = seconds_by_category(lines, counting_steps(numbered, committed))
    return Point("run/goodput", committed, goodput(seconds), lines[-1].time)


def _points(values: dict[str, float], step: int, time: float, suffix: str = "") -> list[Point]:
    return [Point(metric + suffix, step, value, time) for metric, value in values.items()]
