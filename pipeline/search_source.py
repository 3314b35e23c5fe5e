"""What stands between Ray Tune and the search's records: which trial is next, and what trials tell."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ray.tune import Stopper
from ray.tune.search import Searcher

from pipeline.config import Config, ConfigError
from pipeline.prepare import PreparedPacks
from pipeline.search_budget import Budget
from pipeline.search_sampler import next_settings
from pipeline.search_space import LOSS, THROUGHPUT
from pipeline.search_trials import Report, TrialRecord, TrialStore, described, run_name, trial_config


class TrialSource(Searcher):
    """Interrupted trials first, then new ones, while the budget lasts. Keeps the records of all of them."""

    def __init__(
        self, config: Config, store: TrialStore, packs: PreparedPacks, budget: Budget, say: Callable[[str], None]
    ) -> None:
        super().__init__()
        self.config, self.store, self.packs, self.budget, self.say = config, store, packs, budget, say
        self.records = store.read()
        self.ends_because = ""
        """Why the whole search ends before its trials do, or ""."""
        self._interrupted = [number for number, record in self.records.items() if record.status == "running"]
        self._number_of: dict[str, int] = {}
        self._earlier = {number: record.worker_seconds for number, record in self.records.items()}
        self._seconds: dict[int, float] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]  # FINISHED is a str
        """The next trial's config, as `Trial.setup` takes it."""
        while not self.must_end():
            record, again = self._next()
            if record is None:
                break
            try:
                config = trial_config(self.config, record.settings, record.number)
            except ConfigError as error:  # settings that are illegal together; the next ones may not be
                self._keep(replace(record, status="failed", reason=str(error)))
                self.say(f"trial {record.number} cannot be: {error}")
                continue
            self._number_of[trial_id] = record.number
            self._keep(replace(record, reason=""))
            self.say(f"trial {record.number} {'goes on' if again else 'starts'}: {described(record.settings)}")
            return {
                "config": config.model_dump(mode="json"),
                "train_packs": str(self.packs.train),
                "validation_packs": str(self.packs.validation),
            }
        return Searcher.FINISHED

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self._keep(self._taken(self.records[self._number_of[trial_id]], result))
        self.budget.keep()

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """The trial has ended, or Tune ends it: ASHA, or all trials at the end of the budget and at Ctrl-C.

        result: the last one, which Tune gives to this method alone where ASHA or the trial itself ends with it.
        """
        last, record = result or {}, self.records[self._number_of[trial_id]]
        if "tokens" in last:
            record = self._taken(record, last)
        if error:
            reason = "its driver failed again and again: the error is in Ray's log folder"
            record = replace(record, status="failed", reason=reason)
        elif "ended" in last:
            record = replace(record, status=last["ended"], reason=last["reason"])
        elif self.ends_because:
            record = replace(record, reason=f"interrupted: {self.ends_because}")
        else:
            record = replace(record, status="stopped", reason=_behind(record))
        self._keep(record)
        self.say(f"trial {record.number} {_outcome(record)}")

    def _taken(self, record: TrialRecord, result: dict[str, Any]) -> TrialRecord:
        """A record with what its trial has told. Told again, after a restart of its driver, it is the same."""
        reports = record.reports
        if "step" in result and result["step"] > max((report.step for report in reports), default=-1):
            report = Report(result["step"], result["tokens"], result[LOSS], result[THROUGHPUT])
            reports = [*reports, report]
        tokens = max(record.tokens, result["tokens"])
        seconds = self._worker_seconds(record.number, result["worker_seconds"])
        return replace(record, reports=reports, tokens=tokens, worker_seconds=seconds)

    def interrupt(self) -> None:
        """Says of the trials that were ended with the search that they will go on; Tune tells nothing of them."""
        for number in self._number_of.values():
            record = self.records[number]
            if record.status == "running" and not record.reason:
                self._keep(replace(record, reason=f"interrupted: {self.ends_because}"))
                self.say(f"trial {number} {self.records[number].reason}")

    def must_end(self) -> bool:
        """Whether all trials are to end now."""
        spent = self.budget.exhausted(self.records.values())
        self.ends_because = self.ends_because or spent  # Ctrl-C may have set it since
        return bool(self.ends_because)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the records are kept as they come, and as JSON."""

    def restore(self, checkpoint_path: str) -> None:
        raise RuntimeError("a search goes on from its records: start it again by the same command")

    def _next(self) -> tuple[TrialRecord | None, bool]:
        """A trial, and whether it has been begun before; None if there is to be no more."""
        if self._interrupted:
            return self.records[self._interrupted.pop(0)], True
        refusal = self.budget.refuses_another(self.records.values())
        if refusal:
            self.say(f"no further trial: {refusal}")
            return None, False
        settings = next_settings(self.config.search, self.config.run.seed, self.records.values())
        if settings is None:
            return None, False
        number = max(self.records, default=0) + 1
        return TrialRecord(number, run_name(self.config, number), settings), False

    def _keep(self, record: TrialRecord) -> None:
        self.records[record.number] = record
        self.store.write(record)

    def _worker_seconds(self, number: int, seconds: float) -> float:
        """Of all starts of a trial: its clock begins anew with each."""
        if seconds < self._seconds.get(number, 0.0):
            self._earlier[number] = self._earlier.get(number, 0.0) + self._seconds[number]
        self._seconds[number] = seconds
        return self._earlier.get(number, 0.0) + seconds


class EndWithBudget(Stopper):
    """Ends all trials when the source says so; a single one never."""

    def __init__(self, source: TrialSource) -> None:
        self.source = source

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.source.must_end()


def _behind(record: TrialRecord) -> str:
    if record.result is None:
        return "before its first validation"
    return f"behind after {record.result.tokens:,} tokens"


def _outcome(record: TrialRecord) -> str:
    if record.status == "finished" and record.result is not None:
        return f"finished: eval/loss {record.result.loss:.4f}, {record.result.tokens:,} tokens"
    if record.status == "running":
        return record.reason
    loss = f", eval/loss {record.loss:.4f}" if record.reports else ""
    return f"{record.status}: {record.reason}{loss}"
