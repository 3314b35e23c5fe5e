"""MLflow: one run per training, whatever restarts; fed from the ledger, never in the way of a step."""

import os
import queue
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from upath import UPath

from pipeline.config import Config
from pipeline.storage import is_local, read_json, storage_root, write_json

# Set before MLflow is imported: a tracking server that does not answer must cost seconds, not minutes.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

PARAM_LIMIT = 6000  # characters of a param's value that MLflow accepts
BATCH_LIMIT = 1000  # metrics in one request


def tracking_uri(config: Config) -> str:
    """`tracking.uri`, or a SQLite file in local `run.storage` (an object store cannot hold one: then `~/longlora`)."""
    if config.tracking.uri is not None:
        return config.tracking.uri
    root = storage_root(config)
    folder = Path(str(root)) if is_local(root) else Path("~/longlora").expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{folder}/mlflow.db"


class Tracker:
    """The MLflow run of a training run. Its id is kept in `run.json`, so that a restart goes on with the same run.

    Metrics are queued and sent by a thread; a server that is down or slow delays them and nothing else.
    """

    def __init__(self, config: Config, run_folder: UPath) -> None:
        self.client = MlflowClient(tracking_uri(config))
        self.run_id = _mlflow_run(self.client, config, run_folder)
        self._queue: queue.Queue[list[Metric] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._send, name="mlflow", daemon=True)
        self._thread.start()

    def metrics(self, values: dict[str, float], step: int, tokens: int | None = None) -> None:
        """Queues metrics against the step and, where `tokens` (trained so far) is given, again against tokens.

        The second series is `<name>_by_tokens`, whose step axis counts tokens.
        """
        now = int(time.time() * 1000)
        metrics = [Metric(key, value, now, step) for key, value in values.items()]
        if tokens is not None:
            metrics += [Metric(f"{key}_by_tokens", value, now, tokens) for key, value in values.items()]
        self._queue.put(metrics)

    def last_step(self, metric: str) -> int:
        """The last step of `metric` that the server has; -1 if it has none."""
        return max((point.step for point in self.client.get_metric_history(self.run_id, metric)), default=-1)

    def has(self, values: dict[str, float], step: int) -> bool:
        """Whether the server has all these values at `step`."""
        for key, value in values.items():
            points = self.client.get_metric_history(self.run_id, key)
            if (step, value) not in [(point.step, point.value) for point in points]:
                return False
        return True

    def artifacts(self, folder: UPath) -> None:
        """Uploads the files of a folder, local or on an object store, under its name."""
        with tempfile.TemporaryDirectory() as scratch:
            if not is_local(folder):
                folder.fs.get(folder.path, scratch, recursive=True)
            local = str(folder) if is_local(folder) else str(Path(scratch) / folder.name)
            self.client.log_artifacts(self.run_id, local, artifact_path=folder.name)

    def close(self, status: str, patience_s: float = 30.0) -> None:
        """Sends what is queued, waiting at most `patience_s`, and ends the run as FINISHED, FAILED or KILLED."""
        self._queue.put(None)
        self._thread.join(patience_s)
        try:
            self.client.set_terminated(self.run_id, status)
        except Exception as error:  # the run has ended as it has, whether or not the server learns of it
            print(f"MLflow was not told that the run is {status} ({type(error).__name__})", flush=True)

    def _send(self) -> None:
        while (metrics := self._queue.get()) is not None:
            ended = False
            while len(metrics) < BATCH_LIMIT and not self._queue.empty():
                more = self._queue.get()
                ended = more is None
                if more is None:
                    break
                metrics += more
            self._log_until_delivered(metrics)
            if ended:
                return

    def _log_until_delivered(self, metrics: Sequence[Metric]) -> None:
        delay = 1.0
        while True:
            try:
                for start in range(0, len(metrics), BATCH_LIMIT):
                    self.client.log_batch(self.run_id, metrics=metrics[start : start + BATCH_LIMIT])
                return
            except Exception as error:
                # Whatever a tracking server does, training goes on; what it missed is sent when it is back.
                print(
                    f"MLflow does not take metrics ({type(error).__name__}); trying again in {delay:.0f} s", flush=True
                )
                time.sleep(delay)
                delay = min(60.0, 2 * delay)


def _mlflow_run(client: MlflowClient, config: Config, run_folder: UPath) -> str:
    """The run's id: that of `run.json`, or a new run with the config as params, recorded there."""
    record = run_folder / "run.json"
    known: dict[str, Any] = read_json(record) if record.exists() else {}
    if "mlflow_run_id" in known:
        client.update_run(known["mlflow_run_id"], status="RUNNING")
        return known["mlflow_run_id"]
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    experiment_id = experiment.experiment_id if experiment else _new_experiment(client, config)
    run = client.create_run(experiment_id, run_name=config.run.name)
    params = [Param(key, str(value)[:PARAM_LIMIT]) for key, value in config.flat().items()]
    client.log_batch(run.info.run_id, params=params)
    client.log_text(run.info.run_id, config.to_yaml(), "config.yaml")
    write_json(record, {**known, "mlflow_run_id": run.info.run_id})
    return run.info.run_id


def _new_experiment(client: MlflowClient, config: Config) -> str:
    """Creates the experiment; beside our own SQLite file its artefacts go there too, not to the working directory."""
    uri = tracking_uri(config)
    beside = None if config.tracking.uri else str(Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts")
    return client.create_experiment(config.tracking.experiment, artifact_location=beside)
