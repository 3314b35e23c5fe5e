"""Which runs are compared, and what MLflow has of them. Only reads; importing this file imports MLflow, seconds."""

import difflib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import copysign, inf, isnan
from pathlib import Path

import mlflow.store.db.utils as database
from mlflow.entities import LifecycleStage, Run
from rich.console import Console
from rich.progress import track
from sqlalchemy.exc import SQLAlchemyError

from pipeline.compare_values import PARENT_TAG, ComparedRun, History, Sample, families, wanted
from pipeline.config import ConfigError

# MLflow comes from there because that file bounds its waiting before it imports it.
from pipeline.mlflow_run import MISTAKES, MlflowClient, MlflowException

PAGE = 1000  # runs in an answer
RUN_ID = re.compile(r"[0-9a-f]{32}")
INFINITE = 1.7e308  # how MLflow keeps infinity


@dataclass(frozen=True)
class Selection:
    """Which runs of an experiment: all, or those with these names or ids and their children, that match the filter."""

    experiment: str
    names: Sequence[str] = ()
    filter: str = ""
    tags: Sequence[str] = ()
    """`key=value`"""

    def query(self) -> str:
        """Filter and tags in MLflow's language; ConfigError for a tag that it cannot express."""
        terms = [self.filter] if self.filter else []
        for tag in self.tags:
            key, equals, value = tag.partition("=")
            if not equals or not key or "`" in key:
                raise ConfigError(f"--tag {tag}: give it as key=value")
            terms.append(f"tags.`{key}` = {_quoted(value)}")
        return " AND ".join(terms)


def read_runs(uri: str, selection: Selection, chosen: Sequence[str], curves: bool) -> list[ComparedRun]:
    """The chosen runs, children after their parents, with the histories that table and (if wanted) curves need.

    Raises ConfigError, one line, for a server that cannot be used or does not answer, for what is not there, and for a
    selection that leaves nothing.
    """
    query = selection.query()
    with _reachable(uri):
        _check_database(uri)
        client = MlflowClient(uri)
        experiment = _experiment(client, selection.experiment, uri) if _by_name(selection.names) else None
        runs = _named(client, experiment, selection) if selection.names else _search(client, [experiment], query)
        if selection.names and query:
            matching = _search(client, list({run.info.experiment_id for run in runs}), query)
            identities = {run.info.run_id for run in matching}
            runs = [run for run in runs if run.info.run_id in identities]
        if not runs:
            of = f"experiment {selection.experiment!r}" if not selection.names else ", ".join(selection.names)
            raise ConfigError(f"no run of {of} matches: {query}" if query else f"{of} at {uri} has no runs")
        compared = families([_compared(run) for run in runs])
        _check_metrics(compared, chosen)
        shown = Console(stderr=True)
        return [
            replace(run, histories={metric: _history(client, run, metric) for metric in wanted(run, chosen, curves)})
            for run in track(compared, "reading", console=shown, transient=True, disable=not shown.is_terminal)
        ]


@contextmanager
def _reachable(uri: str) -> Iterator[None]:
    """Turns what MLflow, its transport and its database raise into a line."""
    try:
        yield
    except ImportError as error:
        raise ConfigError(f"MLflow at {uri!r} cannot be used: {error}; install the database's driver") from None
    except (MlflowException, SQLAlchemyError, OSError) as error:
        if isinstance(error, MlflowException) and error.error_code in MISTAKES:
            raise ConfigError(f"MLflow at {uri!r} cannot be used: {_first_line(error)}") from None
        reason: BaseException = error
        while inner := reason.__cause__ or reason.__context__:
            reason = inner
        raise ConfigError(f"MLflow at {uri!r} does not answer: {_first_line(reason)}") from None


def _first_line(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__


def _check_database(uri: str) -> None:
    """ConfigError where MLflow would make a database, or bring an old one up to date: comparing changes nothing."""
    if not re.match(r"(sqlite|postgresql|mysql|mssql)\b", uri):
        return
    file = uri.removeprefix("sqlite:///")
    if file != uri and not Path(file).is_file():
        raise ConfigError(f"no runs yet: {file} is not there")
    engine = database.create_sqlalchemy_engine_with_retry(uri)
    try:
        if not database._all_tables_exist(engine):
            raise ConfigError(
                f"{uri} holds no runs, or those of an older MLflow: `mlflow db upgrade {uri}` brings them up to date"
            )
    finally:
        engine.dispose()


def _by_name(names: Sequence[str]) -> bool:
    """Whether the experiment matters: an id is enough without."""
    return not names or any(not RUN_ID.fullmatch(name) for name in names)


def _experiment(client: MlflowClient, name: str, uri: str) -> str:
    """Id of the experiment."""
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        known = [one.name for one in client.search_experiments(max_results=PAGE)]
        raise ConfigError(f"no experiment {name!r} at {uri}; there are {', '.join(map(repr, known[:10])) or 'none'}")
    if experiment.lifecycle_stage == LifecycleStage.DELETED:
        raise ConfigError(f"experiment {name!r} is deleted (mlflow experiments restore -x {experiment.experiment_id})")
    return experiment.experiment_id


def _search(client: MlflowClient, experiments: Sequence[str | None], query: str) -> list[Run]:
    """All runs that match, the oldest first."""
    runs: list[Run] = []
    token: str | None = None
    while True:
        try:
            page = client.search_runs(
                [experiment for experiment in experiments if experiment is not None],
                query,
                max_results=PAGE,
                order_by=["attributes.start_time ASC"],
                page_token=token,
            )
        except MlflowException as error:
            if query and error.error_code == "INVALID_PARAMETER_VALUE":
                raise ConfigError(f"--filter: {_first_line(error)}; the whole filter is: {query}") from None
            raise
        runs += page
        token = page.token
        if not token:
            return runs


def _named(client: MlflowClient, experiment: str | None, selection: Selection) -> list[Run]:
    """Runs of each name or id in the order given, and the children of each, theirs too."""
    found: dict[str, Run] = {}
    for name in selection.names:
        waiting = _of_name(client, experiment, name, selection.experiment)
        while waiting:
            run = waiting.pop(0)
            if run.info.run_id not in found:
                found[run.info.run_id] = run
                children = f"tags.`{PARENT_TAG}` = '{run.info.run_id}'"
                waiting += _search(client, [run.info.experiment_id], children)
    return list(found.values())


def _of_name(client: MlflowClient, experiment: str | None, name: str, experiment_name: str) -> list[Run]:
    """The run with that id, or all runs with that name; ConfigError if there is none."""
    if RUN_ID.fullmatch(name):
        try:
            run = client.get_run(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
        else:
            if run.info.lifecycle_stage == LifecycleStage.DELETED:
                raise ConfigError(f"run {name} is deleted (mlflow runs restore --run-id {name})")
            return [run]
    if experiment is None:
        raise ConfigError(f"no run has the id {name}")
    runs = _search(client, [experiment], f"attributes.run_name = {_quoted(name)}")
    if not runs:
        newest = client.search_runs([experiment], max_results=PAGE)
        close = difflib.get_close_matches(name, [run.info.run_name or "" for run in newest], n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"no run {name!r} in experiment {experiment_name!r}{hint}")
    return runs


def _quoted(text: str) -> str:
    """A string of MLflow's filter language, which has no escapes."""
    if "'" in text and '"' in text:
        raise ConfigError(f"{text}: MLflow cannot search for a text with both kinds of quotes; give the run's id")
    return f'"{text}"' if "'" in text else f"'{text}'"


def _compared(run: Run) -> ComparedRun:
    metrics = {key: _value(value) for key, value in run.data.metrics.items()}
    name, parent = run.info.run_name or "", run.data.tags.get(PARENT_TAG)
    return ComparedRun(run.info.run_id, name, run.info.status, dict(run.data.params), metrics, parent)


def _check_metrics(runs: Sequence[ComparedRun], chosen: Sequence[str]) -> None:
    known = sorted({metric for run in runs for metric in run.metrics})
    for metric in chosen:
        if metric not in known:
            there = difflib.get_close_matches(metric, known, n=10, cutoff=0.3) or known[:10]
            raise ConfigError(f"--metrics: no run has {metric!r}; there are {', '.join(there) or 'none'}")


def _history(client: MlflowClient, run: ComparedRun, metric: str) -> History:
    points = client.get_metric_history(run.run_id, metric)
    return History.of([Sample(point.step, point.timestamp / 1000, _value(point.value)) for point in points])


def _value(value: float) -> float:
    return value if isnan(value) or abs(value) < INFINITE else copysign(inf, value)
