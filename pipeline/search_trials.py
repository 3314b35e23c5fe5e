"""The trials of a search, one JSON file each: what was tried, how it went, where it stands.

    <search>/trials/<number>.json

They are the search's memory: one that starts anew finds finished trials finished, and goes on with the others. The
state of a trial's training is in the folder of its run, `<run.storage>/<search>.<number>`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from math import isfinite
from statistics import median
from typing import Any, Literal

from upath import UPath

from pipeline.config import Config, parse_config
from pipeline.search_space import Search, Settings
from pipeline.storage import make_folder, read_json, write_json

Status = Literal["running", "finished", "stopped", "failed"]
"""running: or interrupted, to be gone on with; stopped: by ASHA, for good, though it may still be saving."""


@dataclass(frozen=True)
class Report:
    """A validation of a trial."""

    step: int
    """Steps done."""
    tokens: int
    """Tokens trained."""
    loss: float
    """`eval/loss`, nats a target token."""
    tokens_per_second: float | None
    """Over the last steps; None where it was not recorded."""


@dataclass(frozen=True)
class TrialRecord:
    """One trial."""

    number: int
    """From 1."""
    run: str
    """Name of its run."""
    settings: Settings
    """The values of the space's keys that it tries."""
    status: Status = "running"
    reason: str = ""
    """Why it was stopped, interrupted or failed, in one line."""
    tokens: int = 0
    """Tokens trained so far."""
    worker_seconds: float = 0.0
    """Time of its workers that has to be paid, from the trial's start to its end."""
    reports: list[Report] = field(default_factory=list)
    passing: bool = False
    """Failed of what may pass: no room, no storage, another driver. The next start of the search tries it again."""

    @property
    def loss(self) -> float:
        """The newest `eval/loss`; infinite before the first."""
        return self.reports[-1].loss if self.reports else float("inf")

    @property
    def throughput(self) -> float | None:
        """Tokens/s of the trial's workers together, the median of what its validations saw; None before the first."""
        rates = [report.tokens_per_second for report in self.reports if report.tokens_per_second is not None]
        return median(rates) if rates else None

    @property
    def result(self) -> Report | None:
        """The newest report: what the trial has come to."""
        return self.reports[-1] if self.reports else None


class TrialStore:
    """Reads and writes the records of a search; one driver at a time."""

    def __init__(self, search_folder: UPath) -> None:
        self.folder = search_folder / "trials"
        make_folder(self.folder)

    def read(self) -> dict[int, TrialRecord]:
        """All trials by number, ascending."""
        if not self.folder.exists():  # on an object store, before the first trial
            return {}
        paths = [path for path in self.folder.iterdir() if path.name.endswith(".json")]
        records = [_record(read_json(path)) for path in paths]
        return {record.number: record for record in sorted(records, key=lambda record: record.number)}

    def write(self, record: TrialRecord) -> None:
        write_json(self.folder / f"{record.number:04d}.json", asdict(record))


def trial_config(config: Config, settings: Settings, number: int = 0) -> Config:
    """The config of a trial's run: the search's, with these settings, a fixed number of workers, and a name of its own.

    Every trial trains on `workers.min` workers: elastic ones would take each other's nodes. ConfigError for settings
    that are illegal together.
    """
    values = config.model_dump(mode="json")
    for key, value in settings.items():
        section, _, name = key.partition(".")
        *path, last = name.split(".")
        target = values.setdefault(section, {})
        for part in path:
            target = target.setdefault(part, {})
        target[last] = value
    values["workers"]["max"] = values["workers"]["min"]
    values["run"]["name"] = run_name(config, number)
    values["tracking"]["tags"] |= {"longlora.search": config.run.name, "longlora.trial": str(number)}
    values["search"] = Search().model_dump(mode="json")
    return parse_config(values)


def run_name(config: Config, number: int) -> str:
    return f"{config.run.name}.{number:04d}"


def described(settings: Settings) -> str:
    """`group_size 512, rank 8, learning_rate 0.0021`"""
    return ", ".join(f"{key.rpartition('.')[2]} {shown(value)}" for key, value in settings.items())


def shown(value: Any) -> str:
    """A setting as short as it can be read."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def best_trial(records: Sequence[TrialRecord]) -> TrialRecord | None:
    """Of the trials that have finished, the one with the lowest held-out loss."""
    finished = [record for record in records if record.status == "finished" and isfinite(record.loss)]
    return min(finished, key=lambda record: record.loss, default=None)


def pareto_front(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The finished trials that no other beats in held-out loss and in throughput; ascending in throughput."""
    finished = [
        record
        for record in records
        if record.status == "finished" and record.throughput is not None and isfinite(record.loss)
    ]
    fastest_first = sorted(finished, key=lambda record: (-(record.throughput or 0.0), record.loss))
    front: list[TrialRecord] = []
    for record in fastest_first:
        if not front or record.loss < front[-1].loss:
            front.append(record)
    return front[::-1]


def _record(values: dict[str, Any]) -> TrialRecord:
    record = TrialRecord(**values)
    return replace(record, reports=[Report(**report) for report in values["reports"]])
