"""What runs are compared by: settings that differ, quantities under the names that codes give them, and their curves.

Pure functions over plain data: nothing here talks to MLflow, and nothing draws.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite
from statistics import median
from typing import Literal

import numpy as np

LONGEST_LINE = 1000
"""Points of a metric that are kept; longer histories are thinned evenly."""
TOKEN_COUNTERS = ("num_input_tokens_seen", "train/num_input_tokens_seen", "train/tokens", "tokens_seen", "tokens")
"""Metrics that say how many tokens a run had trained on at a step; the first is the Hugging Face Trainer's."""
BY_TOKENS = "_by_tokens"
"""Suffix of our metrics whose MLflow step is the number of tokens."""
PERPLEXITY = re.compile(r"(?:.*[/_])?(?:perplexity|ppl)[/_@-](\d+)")
PARENT_TAG = "mlflow.parentRunId"


@dataclass(frozen=True)
class Sample:
    """One logged value of a metric."""

    step: int
    time: float
    """Unix time, seconds."""
    value: float


@dataclass(frozen=True)
class History:
    """The values of a metric of a run, in the order of time."""

    samples: Sequence[Sample]
    """At most `LONGEST_LINE`, the first and the last among them."""
    peak: float
    """Of all values, also those that were left out; NaN if none is finite. So is the median."""
    median: float

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> "History":
        finite = [sample.value for sample in samples if isfinite(sample.value)]
        ordered = sorted(samples, key=lambda sample: (sample.time, sample.step))
        return cls(thin(ordered), max(finite, default=np.nan), median(finite) if finite else np.nan)


@dataclass(frozen=True)
class ComparedRun:
    """A run as MLflow has it."""

    run_id: str
    name: str
    status: str
    params: dict[str, str]
    metrics: dict[str, float]
    """The last value of each."""
    parent: str | None = None
    """Id of the run that this one is a child of."""
    histories: dict[str, History] = field(default_factory=dict)


@dataclass(frozen=True)
class Quantity:
    """Something that runs are compared by, whatever their code calls it."""

    title: str
    names: tuple[str, ...]
    """Metrics that mean it, as regular expressions; a run's first that matches counts."""
    summary: Literal["last", "median", "peak"]
    better: Literal["low", "high"]
    form: str
    """How a value is written."""
    unit: str = ""

    def sources(self, run: ComparedRun) -> list[str]:
        """Metrics of the run that mean it; several, if there is one for each device or node."""
        for name in self.names:
            if found := sorted(metric for metric in run.metrics if re.fullmatch(name, metric)):
                return found
        return []

    def source(self, run: ComparedRun) -> str | None:
        """The one that is drawn: of several devices, that with the highest peak."""
        read = [metric for metric in self.sources(run) if metric in run.histories]
        return max(read, key=lambda metric: run.histories[metric].peak * scale(metric), default=None)

    def value(self, run: ComparedRun) -> float | None:
        """The run's value; None if it has none. Median and peak are of the histories that have been read."""
        if self.summary == "last":
            return next((run.metrics[metric] for metric in self.sources(run)), None)
        metric = self.source(run)
        return None if metric is None else getattr(run.histories[metric], self.summary) * scale(metric)


TRAINING_LOSS = Quantity(
    "training loss",
    ("train/loss", "loss", "train_loss", "training_loss", "train_loss_step", "training/loss", "loss/train"),
    "last",
    "low",
    ".4f",
)
EVALUATION_LOSS = Quantity(
    "evaluation loss",
    ("eval/loss", "eval_loss", "val/loss", "val_loss", "valid_loss", "validation/loss", "validation_loss", "loss/val"),
    "last",
    "low",
    ".4f",
)
THROUGHPUT = Quantity(
    "tokens/s",
    ("train/tokens_per_second", "train_tokens_per_second", "tokens_per_second", "tokens_per_sec", "tokens/s"),
    "median",
    "high",
    ",.0f",
)
GPU_MEMORY = Quantity(
    "peak GPU memory", (r"system/(?:.*/)?gpu_\d+_memory_usage_(?:mega|giga)bytes",), "peak", "low", ",.2f", "GB"
)
HOST_MEMORY = Quantity(
    "peak host memory", (r"system/(?:.*/)?system_memory_usage_(?:mega|giga)bytes",), "peak", "low", ",.2f", "GB"
)
GOODPUT = Quantity("goodput", ("run/goodput", "goodput"), "last", "high", ".1%")
QUANTITIES = (TRAINING_LOSS, EVALUATION_LOSS, THROUGHPUT, GPU_MEMORY, HOST_MEMORY, GOODPUT)


@dataclass(frozen=True)
class Column:
    """A quantity or a metric, with one value a run."""

    title: str
    values: Sequence[float | None]
    form: str = ".6g"
    better: Literal["low", "high"] | None = None

    def text(self, run: int) -> str:
        """The value of a run as it is written; empty if there is none."""
        value = self.values[run]
        return "" if value is None else format(value, self.form)

    def best(self, run: int) -> bool:
        """Whether no other run has a better value, and some a worse one."""
        values = [value for value in self.values if value is not None and isfinite(value)]
        if self.better is None or len(set(values)) < 2:
            return False
        return self.values[run] == (min(values) if self.better == "low" else max(values))


def scale(metric: str) -> float:
    """Factor from a metric's unit to the one that is shown: memory is logged in MB, and shown in GB."""
    return 1e-3 if metric.endswith("_megabytes") else 1.0


def thin(samples: Sequence[Sample], limit: int = LONGEST_LINE) -> Sequence[Sample]:
    """At most `limit` of the samples, evenly spaced, with the first and the last."""
    if len(samples) <= limit:
        return samples
    return [samples[round(n * (len(samples) - 1) / (limit - 1))] for n in range(limit)]


def labels(runs: Sequence[ComparedRun]) -> list[str]:
    """Names of the runs; those that several have, with the beginning of their id."""
    names = Counter(run.name for run in runs)
    return [
        run.name if names[run.name] == 1 and run.name else f"{run.name} ({run.run_id[:8]})".lstrip() for run in runs
    ]


def families(runs: Sequence[ComparedRun]) -> list[ComparedRun]:
    """The runs in their order, but each one's children right after it."""
    known = {run.run_id for run in runs}
    ordered: list[ComparedRun] = []
    waiting = [run for run in runs if run.parent not in known][::-1]
    while waiting:
        ordered.append(run := waiting.pop())
        waiting += [child for child in runs if child.parent == run.run_id][::-1]
    return ordered


def differing(runs: Sequence[ComparedRun]) -> dict[str, list[str | None]]:
    """Settings of which at least two runs have different values: those of all runs, None where one has none.

    Numbers differ if their values do.
    """
    table = _settings(runs)
    return {
        key: values
        for key, values in table.items()
        if len({_number(value) for value in values if value is not None}) > 1
    }


def partial(runs: Sequence[ComparedRun]) -> dict[str, list[str | None]]:
    """Settings that some runs do not have, and in which the others agree: of other code, or another version."""
    different = differing(runs)
    return {key: values for key, values in _settings(runs).items() if None in values and key not in different}


def perplexities(run: ComparedRun) -> dict[int, float]:
    """Context length → perplexity."""
    found = ((PERPLEXITY.fullmatch(metric), value) for metric, value in run.metrics.items())
    return dict(sorted((int(match[1]), value) for match, value in found if match))


def columns(runs: Sequence[ComparedRun], chosen: Sequence[str] = ()) -> list[Column]:
    """The metrics that the user chose, or without a choice all quantities that some run has."""
    if chosen:
        return [Column(metric, [run.metrics.get(metric) for run in runs]) for metric in chosen]
    found = [
        Column(_headline(quantity), [quantity.value(run) for run in runs], quantity.form, quantity.better)
        for quantity in QUANTITIES
    ]
    measured = [perplexities(run) for run in runs]
    if lengths := [set(values) for values in measured if values]:
        length = max(set.intersection(*lengths) or set.union(*lengths))
        title, values = f"perplexity at {length:,}", [values.get(length) for values in measured]
        found.insert(2, Column(title, values, ",.2f", "low"))
    return [column for column in found if any(value is not None for value in column.values)]


def missing(runs: Sequence[ComparedRun]) -> list[str]:
    """Quantities that no run has."""
    absent = [quantity.title for quantity in QUANTITIES if not any(quantity.sources(run) for run in runs)]
    return absent + ([] if any(perplexities(run) for run in runs) else ["perplexity by length"])


def wanted(run: ComparedRun, chosen: Sequence[str], curves: bool) -> list[str]:
    """The metrics whose histories are needed: for medians and peaks, and for curves if they are drawn."""
    quantities = [quantity for quantity in QUANTITIES if curves or quantity.summary != "last"]
    names = [metric for quantity in quantities for metric in quantity.sources(run)]
    if curves:
        names += [metric for metric in chosen if metric in run.metrics]
        names += [metric + BY_TOKENS for metric in names if metric + BY_TOKENS in run.metrics]
        names += [metric for metric in TOKEN_COUNTERS if metric in run.metrics]
    return list(dict.fromkeys(names))


def by_step(run: ComparedRun, metric: str) -> list[tuple[float, float]]:
    """(step, value); of several values at a step the last, and nothing if the code gave no steps."""
    samples = run.histories[metric].samples
    points = {sample.step: sample.value for sample in samples}
    return _finite(points) if len(points) > 1 or len(samples) == 1 else []


def by_tokens(run: ComparedRun, metric: str) -> list[tuple[float, float]]:
    """(tokens, value), from our metrics by tokens or a counter of tokens; nothing if there is neither."""
    if metric + BY_TOKENS in run.histories:
        return by_step(run, metric + BY_TOKENS)
    counter = next((name for name in TOKEN_COUNTERS if name in run.histories), None)
    if counter is None:
        return []
    steps, tokens = zip(*by_step(run, counter), strict=True) if by_step(run, counter) else ((), ())
    inside = [(step, value) for step, value in by_step(run, metric) if steps and steps[0] <= step <= steps[-1]]
    return [(float(np.interp(step, steps, tokens)), value) for step, value in inside]


def by_time(run: ComparedRun, metric: str) -> list[tuple[float, float]]:
    """(seconds since the first value of any metric that was read, value), also of steps that were redone."""
    begin = min(history.samples[0].time for history in run.histories.values() if history.samples)
    samples = run.histories[metric].samples
    return [(sample.time - begin, sample.value) for sample in samples if isfinite(sample.value)]


def _finite(points: dict[int, float]) -> list[tuple[float, float]]:
    return [(step, value) for step, value in sorted(points.items()) if isfinite(value)]


def _settings(runs: Sequence[ComparedRun]) -> dict[str, list[str | None]]:
    """The values of each setting, but not of one that only repeats the runs' names."""
    keys = dict.fromkeys(key for run in runs for key in run.params if run.params[key] != run.name)
    return {key: [run.params.get(key) for run in runs] for key in keys}


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _headline(quantity: Quantity) -> str:
    summary = " (median)" if quantity.summary == "median" else ""
    return quantity.title + summary + (f" ({quantity.unit})" if quantity.unit else "")
