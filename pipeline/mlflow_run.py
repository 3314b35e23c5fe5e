"""A training run's run on the tracking server: found or made, and what it lacks sent.

Every call may raise whatever MLflow, its transport and its database raise. Importing this file imports MLflow, seconds.
"""

import os
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from upath import UPath

from pipeline.config import Config, ConfigError
from pipeline.run_metrics import Point
from pipeline.storage import create_once, is_local, json_bytes, read_json, write_json
from pipeline.tracking_tags import KEY_TAG, tags_of

# Set before MLflow is imported: a server that does not answer must cost seconds, and lines of ours, not of transports.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import mlflow.store.db.utils
from mlflow import MlflowClient
from mlflow.entities import LifecycleStage, Metric, Param, Run, RunTag, ViewType
from mlflow.exceptions import MlflowException

from pipeline.dataset_inputs import dataset_inputs

mlflow.store.db.utils.MAX_RETRY_COUNT = (
    1  # trying again is done by who calls; MLflow would sleep here for up to an hour
)

METRICS_LIMIT = 1000  # in one request
PARAMS_LIMIT = 100  # tags too
PARAM_LIMIT = 6000  # characters of a param's value
MISTAKES = ("UNAUTHENTICATED", "PERMISSION_DENIED", "ENDPOINT_NOT_FOUND", "INVALID_PARAMETER_VALUE")
"""Answers of a server that is there, and that trying again would not change."""


def open_run(config: Config, uri: str, run_folder: UPath) -> "MlflowRun":
    """The run, with its params and tags; ConfigError for what only the user can mend, other errors for an outage."""
    try:
        client = MlflowClient(uri)
        run = _find_or_create(client, config, run_folder)
        _log_params_and_tags(client, run, config)
        return MlflowRun(client, client.get_run(run.info.run_id))
    except ImportError as error:
        raise ConfigError(f"MLflow at {uri!r} cannot be used: {error}; install the database's driver") from None
    except MlflowException as error:
        if error.error_code in MISTAKES:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(f"MLflow at {uri!r} cannot be used: {reason}") from None
        raise


class MlflowRun:
    """A run on the server, and what the server has of it."""

    def __init__(self, client: MlflowClient, run: Run) -> None:
        self.client, self.run_id = client, run.info.run_id
        self.status, self.tags = run.info.status, run.data.tags
        self.last_step = {metric.key: metric.step for metric in run.data.to_proto().metrics}
        """The last step of each metric that the server has."""
        # Points are sent in the order of their steps, so that it has all before it too, unless it has lost some.
        self._steps: dict[str, set[int]] = {}
        if len(self._steps_of("train/loss")) <= self.last_step.get("train/loss", -1):
            self._steps = {metric: self._steps_of(metric) for metric in self.last_step}
        self._config_kept = False
        kept = run.inputs.dataset_inputs if run.inputs else []
        self._packs_kept = {(made.dataset.name, made.dataset.digest) for made in kept}

    def lacks(self, point: Point) -> bool:
        """Whether the server has no value of this metric at this step."""
        if point.step > self.last_step.get(point.metric, -1):
            return True
        return point.metric in self._steps and point.step not in self._steps[point.metric]

    def send(self, points: Sequence[Point]) -> None:
        """Logs the points that the server lacks. points: ascending in step, within each metric."""
        lacking = [point for point in points if self.lacks(point)]
        for start in range(0, len(lacking), METRICS_LIMIT):
            batch = lacking[start : start + METRICS_LIMIT]
            self.client.log_batch(self.run_id, metrics=[_metric(point) for point in batch])
            for point in batch:
                self.last_step[point.metric] = max(point.step, self.last_step.get(point.metric, -1))
                self._steps.get(point.metric, set()).add(point.step)

    def describe(self, tags: dict[str, str], status: str | None, ended: float) -> None:
        """Sets tags and status where they are others; `ended`: Unix time, seconds, of a run that is not RUNNING."""
        changed = {key: value for key, value in tags.items() if self.tags.get(key) != value}
        if changed:
            self.client.log_batch(self.run_id, tags=[RunTag(key, value) for key, value in changed.items()])
            self.tags |= changed
        if status is not None and status != self.status:
            if status == "RUNNING":
                self.client.update_run(self.run_id, status=status)
            else:
                self.client.set_terminated(self.run_id, status, end_time=round(1000 * ended))
            self.status = status

    def keep_packs(self, config: Config, packs: Mapping[tuple[str, str], dict[str, Any]]) -> None:
        """Logs what the run was trained and validated on as inputs, once. packs: as in `RunMetrics`."""
        inputs = {(made.dataset.name, made.dataset.digest): made for made in dataset_inputs(config, packs)}
        lacking = [made for key, made in inputs.items() if key not in self._packs_kept]
        if lacking:
            try:
                self.client.log_inputs(self.run_id, datasets=lacking)
            except MlflowException:  # another run has logged the same packs at this moment: now they are known
                self.client.log_inputs(self.run_id, datasets=lacking)
            self._packs_kept |= inputs.keys()

    def keep_config(self, config: Config) -> None:
        """Keeps the config as an artifact."""
        if not self._config_kept and "config.yaml" not in [
            file.path for file in self.client.list_artifacts(self.run_id)
        ]:
            self.client.log_text(self.run_id, config.to_yaml(), "config.yaml")
        self._config_kept = True

    def keep_evaluation(self, folder: UPath, values: dict[str, float], step: int, time: float) -> None:
        """Uploads a folder, under its name, and then logs the metrics, which so tell that its files are there."""
        if all(self._has(metric, step, value) for metric, value in values.items()):
            return
        with tempfile.TemporaryDirectory() as scratch:
            if not is_local(folder):
                folder.fs.get(folder.path, scratch, recursive=True)
            local = str(folder) if is_local(folder) else str(Path(scratch) / folder.name)
            self.client.log_artifacts(self.run_id, local, artifact_path=folder.name)
        metrics = [_metric(Point(metric, step, value, time)) for metric, value in values.items()]
        self.client.log_batch(self.run_id, metrics=metrics)

    def _steps_of(self, metric: str) -> set[int]:
        return {point.step for point in self.client.get_metric_history(self.run_id, metric)}

    def _has(self, metric: str, step: int, value: float) -> bool:
        points = self.client.get_metric_history(self.run_id, metric)
        return (step, value) in [(point.step, point.value) for point in points]


def _metric(point: Point) -> Metric:
    return Metric(point.metric, point.value, round(1000 * point.time), point.step)


def _find_or_create(client: MlflowClient, config: Config, run_folder: UPath) -> Run:
    """The run that `run.json` names, or that carries its key, or a new one.

    The key is recorded before a run is made, and the id after it: a crash, or an answer that is lost, between the two
    does not leave a second run.
    """
    record = run_folder / "run.json"
    create_once(record, json_bytes({"mlflow_key": uuid.uuid4().hex}))
    known: dict[str, Any] = read_json(record)
    if "mlflow_key" not in known:  # a run of an earlier version
        known["mlflow_key"] = uuid.uuid4().hex
        write_json(record, known)
    run = _named(client, known.get("mlflow_run_id")) or _keyed(client, config, known["mlflow_key"])
    if run.info.lifecycle_stage == LifecycleStage.DELETED:
        raise ConfigError(
            f"MLflow run {run.info.run_id} of {config.run.name!r} is deleted; restore it "
            f"(mlflow runs restore --run-id {run.info.run_id}), or give this run another name"
        )
    if known.get("mlflow_run_id") != run.info.run_id:
        write_json(record, known | {"mlflow_run_id": run.info.run_id})
    return run


def _named(client: MlflowClient, run_id: str | None) -> Run | None:
    """The run of that id; None if this server never had it, and gets the whole run anew from the ledger."""
    try:
        return client.get_run(run_id) if run_id else None
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def _keyed(client: MlflowClient, config: Config, key: str) -> Run:
    """The run with that key, or a new one; of several, from requests whose answer was lost, the first stays."""
    experiment_id = _experiment(client, config)
    query = ([experiment_id], f"tags.`{KEY_TAG}` = '{key}'", ViewType.ALL)
    found = client.search_runs(*query)
    if not found:
        client.create_run(experiment_id, run_name=config.run.name, tags={KEY_TAG: key})
        found = client.search_runs(*query)
    active = [run for run in found if run.info.lifecycle_stage == LifecycleStage.ACTIVE]
    first, *others = sorted(active or found, key=lambda run: (run.info.start_time, run.info.run_id))
    for run in others if active else []:
        client.delete_run(run.info.run_id)
    return first


def _experiment(client: MlflowClient, config: Config) -> str:
    """Id of the experiment, made if there is none; ConfigError if it is deleted."""
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    if experiment is None:
        try:
            return client.create_experiment(config.tracking.experiment, artifact_location=_artifacts(client))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            return _experiment(client, config)  # another run has made it at this moment
    if experiment.lifecycle_stage == LifecycleStage.DELETED:
        raise ConfigError(
            f"tracking.experiment = {config.tracking.experiment!r} is deleted; name another, or restore it "
            f"(mlflow experiments restore --experiment-id {experiment.experiment_id})"
        )
    return experiment.experiment_id


def _artifacts(client: MlflowClient) -> str | None:
    """Beside a SQLite file, not in the working directory; a server has its own place."""
    file = str(client.tracking_uri).removeprefix("sqlite:///")
    return None if file == client.tracking_uri else str(Path(file).absolute().parent / "mlartifacts")


def _log_params_and_tags(client: MlflowClient, run: Run, config: Config) -> None:
    """Logs the settings that the run has no param of, for one that has been logged cannot be changed; tags can."""
    known = {*run.data.params, "tracking.tags"}  # which are tags, and differ between runs whose settings do not
    params = [Param(key, str(value)[:PARAM_LIMIT]) for key, value in config.flat().items() if key not in known]
    for start in range(0, len(params), PARAMS_LIMIT):
        client.log_batch(run.info.run_id, params=params[start : start + PARAMS_LIMIT])
    tags = [RunTag(key, value) for key, value in tags_of(config).items() if run.data.tags.get(key) != value]
    for start in range(0, len(tags), PARAMS_LIMIT):
        client.log_batch(run.info.run_id, tags=tags[start : start + PARAMS_LIMIT])
