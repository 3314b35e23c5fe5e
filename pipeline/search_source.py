"""What stands between Ray Tune and the search's records: which trial is next, and what trials tell."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ray.tune.search import Searcher

from pipeline.capacity import LargestCluster, lack_of_room
from pipeline.config import Config, ConfigError
from pipeline.prepare import PreparedPacks
from pipeline.search_records import TAKEN_OVER, Records
from pipeline.search_sampler import next_settings
from pipeline.search_space import LOSS, THROUGHPUT
from pipeline.search_trials import Report, TrialRecord, described, run_name, trial_config

DRIVER_LOST: dict[str, Any] = {
    "ended": "failed",
    "reason": "its driver failed again and again: the error is in Ray's log folder",
}
"""In place of the last result of a trial that could not tell any."""


class TrialSource(Searcher):
    """Interrupted trials first, then new ones, while the budget lasts. Keeps the records of all of them."""

    def __init__(
        self,
        config: Config,
        records: Records,
        packs: PreparedPacks,
        ends: Any,
        cluster: LargestCluster,
        say: Callable[[str], None],
    ) -> None:
        """ends: the actor that trials ask whether they are to end."""
        super().__init__()
        self.config, self.records, self.packs, self.ends, self.cluster = config, records, packs, ends, cluster
        self.budget, self.say = records.budget, say
        self.ends_because = ""
        """Why the whole search ends before its trials do, or ""."""
        self._all_asked = False
        self._again = [number for number, record in records.all.items() if record.status == "running" or record.passing]
        self._number_of: dict[str, int] = {}
        self._earlier = {number: record.worker_seconds for number, record in records.all.items()}
        self._seconds: dict[int, float] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]  # FINISHED is a str
        """The next trial's config, as `Trial.setup` takes it; None while the storage takes no record."""
        while not self.must_end():
            if self.records.problem and not self.records.write():
                return None
            record = self._next()
            if record is None:
                break
            config = self._config_if_possible(record)
            if config is None:
                continue
            if not self.records.begin(replace(record, status="running", reason="", passing=False)):
                return None
            self._number_of[trial_id] = record.number
            verb = "goes on" if self._dequeue(record) else "starts"
            self.say(f"trial {record.number} {verb}: {described(record.settings)}")
            return {
                "config": config.model_dump(mode="json"),
                "train_packs": str(self.packs.train),
                "validation_packs": str(self.packs.validation),
            }
        return Searcher.FINISHED

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self.cluster.look()
        self._keep(self._taken(self._record(trial_id), result))

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """The trial has ended: at its last step, because it was asked to, or with an error.

        result: the last one, which says how it ended; Tune gives it to this method alone.
        """
        record = self._record(trial_id)
        last = DRIVER_LOST if error or result is None else result
        if "tokens" in last:
            record = self._taken(record, last)
        if last["ended"] == "finished":
            record = replace(record, status="finished", reason="")  # also one that was to end just then
        elif last["ended"] == "failed" and record.status == "running":
            record = replace(record, status="failed", reason=last["reason"], passing=last.get("passing", False))
        elif record.status == "running":
            record = replace(record, reason=f"interrupted: {self.ends_because}")
        self._keep(record)
        self.say(f"trial {record.number} {_outcome(record)}")

    def fell_behind(self, trial_id: str, result: dict[str, Any]) -> None:
        """ASHA's decision, obeyed if the result is news.

        A trial that goes on tells its earlier validations again: when they were news it was let go on.
        """
        record = self._record(trial_id)
        if record.status == "running" and (record.result is None or result["step"] > record.result.step):
            record = self._taken(record, result)
            self._keep(replace(record, status="stopped", reason=_behind(record)))
            self.ends.end.remote(record.run)

    def watch(self) -> None:
        """Asks all trials to end when it is time to; called several times a second."""
        if self.must_end() and not self._all_asked:
            self.ends.end_all.remote()
            self._all_asked = True

    def must_end(self) -> bool:
        """Whether all trials are to end now."""
        if self.records.taken_over.is_set():
            self.ends_because = TAKEN_OVER
        spent = self.budget.exhausted(self.records.all.values())
        self.ends_because = self.ends_because or spent  # Ctrl-C may have set it since
        return bool(self.ends_because)

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: what Tune pickles of a search is never read."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the records are kept as they come, and as JSON."""

    def restore(self, checkpoint_path: str) -> None:
        raise RuntimeError("a search goes on from its records: start it again by the same command")

    def _next(self) -> TrialRecord | None:
        """A trial that has been begun before, or a new one; None if there is to be no more."""
        if self._again:
            return self.records.all[self._again[0]]
        known = self.records.all
        refusal = self.budget.refuses_another(known.values())
        if refusal:
            self.say(f"no further trial: {refusal}")
            return None
        settings = next_settings(self.config.search, self.config.run.seed, known.values())
        if settings is None:
            return None
        number = max(known, default=0) + 1
        return TrialRecord(number, run_name(self.config, number), settings)

    def _config_if_possible(self, record: TrialRecord) -> Config | None:
        """The config of a trial's run; None, and the trial has failed, if it is illegal or larger than the cluster."""
        try:
            config = trial_config(self.config, record.settings, record.number)
            refusal, passing = lack_of_room(config, self.cluster.room_for_workers(config)), True
        except ConfigError as error:  # settings that are illegal together; the next ones may not be
            config, refusal, passing = None, str(error), False
        if refusal:
            self._dequeue(record)
            self._keep(replace(record, status="failed", reason=refusal, passing=passing))
            self.say(f"trial {record.number} cannot be: {refusal}")
            return None
        return config

    def _dequeue(self, record: TrialRecord) -> bool:
        """Takes a trial off those that go on; whether it was one."""
        again = self._again[:1] == [record.number]
        self._again = self._again[again:]
        return again

    def _record(self, trial_id: str) -> TrialRecord:
        return self.records.all[self._number_of[trial_id]]

    def _keep(self, record: TrialRecord) -> None:
        known = self.records.problem
        if not self.records.keep(record) and self.records.problem and not known:
            self.say(f"records wait to be written: {self.records.problem}")

    def _taken(self, record: TrialRecord, result: dict[str, Any]) -> TrialRecord:
        """A record with what its trial has told. Told again, after a restart of its driver, it is the same."""
        reports = record.reports
        if "step" in result and result["step"] > max((report.step for report in reports), default=-1):
            report = Report(result["step"], result["tokens"], result[LOSS], result[THROUGHPUT])
            reports = [*reports, report]
        tokens = max(record.tokens, result["tokens"])
        seconds = self._worker_seconds(record.number, result["worker_seconds"])
        return replace(record, reports=reports, tokens=tokens, worker_seconds=seconds)

    def _worker_seconds(self, number: int, seconds: float) -> float:
        """Of all starts of a trial: its clock begins anew with each."""
        if seconds < self._seconds.get(number, 0.0):
            self._earlier[number] = self._earlier.get(number, 0.0) + self._seconds[number]
        self._seconds[number] = seconds
        return self._earlier.get(number, 0.0) + seconds


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
