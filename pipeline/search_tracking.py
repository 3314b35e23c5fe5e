"""The search's own MLflow run, and the trials' runs as its children. Never in the way of a trial.

Everything is derived from the records and sent again until the server has it; a server that is down delays it, and what
is missing at the end is delivered by the next start of the same search.
"""

import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from upath import UPath

from pipeline.config import Config
from pipeline.search_records import Records
from pipeline.search_report import FOLDER
from pipeline.search_trials import TrialRecord, best_trial
from pipeline.storage import local_copy, read_json
from pipeline.tracking import PATIENCE_S, usable_tracking_uri

if TYPE_CHECKING:  # brings in MLflow, which takes seconds to import
    from pipeline.mlflow_run import MlflowRun

INTERVAL_S = 5.0
BEST = "search/best_eval_loss"
"""By the number of trials that had been begun."""
KINDS = ("running", "finished", "stopped", "failed")


class SearchTracker:
    """Keeps the parent run and the links to its children up to the records."""

    def __init__(self, config: Config, folder: UPath, records: Records) -> None:
        self.config, self.folder, self.records = config, folder, records
        self.uri = usable_tracking_uri(config)
        self._parent: MlflowRun | None = None
        self._told: dict[str, dict[str, str]] = {}  # tags that a child has, by its id
        self._closing = threading.Event()
        self._problem = ""
        self._thread = threading.Thread(target=self._keep_up, name="mlflow", daemon=True)

    def start(self) -> None:
        # Tune imports MLflow in this thread. Where ours does at the same time, Python finds them in a deadlock.
        from pipeline import mlflow_run  # noqa: F401

        self._thread.start()

    def close(self) -> None:
        """Delivers the result too, for `PATIENCE_S` at most; prints one line if the server has not got all then."""
        self._closing.set()
        self._thread.join(PATIENCE_S)
        if self._thread.is_alive() or self._problem:
            problem = self._problem or f"no answer in {PATIENCE_S:.0f} s"
            print(f"MLflow at {self.uri} has not got all of this search ({problem}): its next start delivers it")

    def _keep_up(self) -> None:
        while not self._closing.wait(INTERVAL_S):
            if self.records.taken_over.is_set():  # the parent run is the other driver's
                return
            self._try_to_deliver(status="RUNNING", result=False)
        going_on = any(record.status == "running" for record in self.records.all.values())
        self._try_to_deliver(status="KILLED" if going_on else "FINISHED", result=True)

    def _try_to_deliver(self, status: str, result: bool) -> None:
        try:
            self._deliver(status, result)
            self._problem = ""
        except Exception as error:  # whatever MLflow, the network or a database raises: the search goes on
            self._problem = " ".join(str(error).split())[:200] or type(error).__name__
            self._parent = None  # asked for again: the server may have lost what it had

    def _deliver(self, status: str, result: bool) -> None:
        from pipeline.mlflow_run import open_run

        parent = self._parent = self._parent or open_run(self.config, self.uri, self.folder)
        records = dict(self.records.all)
        for record in records.values():
            self._link(parent, record)
        count = {kind: sum(record.status == kind for record in records.values()) for kind in KINDS}
        tags = {"longlora.search": self.config.run.name, "longlora.trials": str(len(records))}
        tags |= {f"longlora.trials_{kind}": str(number) for kind, number in count.items()}
        parent.describe(tags, status, time.time())
        if not result:
            return
        best = best_trial(list(records.values()))
        if best is not None and parent.last_step.get(BEST, -1) < len(records):
            parent.client.log_metric(parent.run_id, BEST, best.loss, step=len(records))
        if (self.folder / FOLDER).exists():
            with local_copy(self.folder / FOLDER) as path:
                parent.client.log_artifacts(parent.run_id, path, artifact_path=FOLDER)

    def _link(self, parent: "MlflowRun", record: TrialRecord) -> None:
        """Makes a trial's run a child, and says how the trial stands; its own driver makes that run, maybe later."""
        known: dict[str, Any] = {}
        with suppress(FileNotFoundError):
            known = read_json(self.folder.parent / record.run / "run.json")
        child = known.get("mlflow_run_id")
        if child is None:
            return
        tags = {"mlflow.parentRunId": parent.run_id, "longlora.status": record.status, "longlora.reason": record.reason}
        told = self._told.setdefault(child, {})
        for key, value in tags.items():
            if told.get(key) != value:
                parent.client.set_tag(child, key, value)
                told[key] = value
