"""MLflow, kept up to a run's ledger and never in the way of a step.

A thread does all of it: it imports MLflow, finds or makes the run, asks what the server has, and sends what it lacks. A
server that is down or slow delays that and nothing else. What is missing at the end is in the ledger, for the next
`train` or `evaluate` of the run to deliver.

Only a mistake refuses a run, and only before its first step: a URI that cannot be used (config.py; a SQLite file that
cannot be opened, here), or an answer by which the server itself refuses (`mlflow_run.MISTAKES`: credentials, no MLflow
at that address, an experiment or a run that is deleted). No answer is waited for; no connection, no answer in time and
an internal error are outages, and so is anything after the first step.
"""

import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from upath import UPath

from pipeline.config import Config, ConfigError
from pipeline.ledger import Event, StepRecord, read_ledger
from pipeline.run_metrics import Point, RunMetrics, goodput_so_far
from pipeline.storage import absolute_path, is_local

if TYPE_CHECKING:  # both bring in what takes seconds to import
    from pipeline.evaluation import Evaluated
    from pipeline.mlflow_run import MlflowRun

SEND_INTERVAL_S = 1.0
"""Steps of this time are sent together."""
FIRST_DELAY_S, LONGEST_DELAY_S = 1.0, 60.0
"""Between tries to reach a server that does not take anything; doubled each time."""
PATIENCE_S = 30.0
"""How long the end of a run waits for the server."""
POINTS_AT_ONCE = 1000
UNUSABLE = ("SQLITE_CANTOPEN", "SQLITE_NOTADB", "SQLITE_READONLY", "SQLITE_PERM")


def tracking_uri(config: Config) -> str:
    """`tracking.uri`, or a SQLite file in local `run.storage` (an object store cannot hold one: then `~/longlora`)."""
    root = absolute_path(config.run.storage)
    folder = Path(str(root)) if is_local(root) else Path("~/longlora").expanduser()
    return config.tracking.uri or f"sqlite:///{folder}/mlflow.db"


def usable_tracking_uri(config: Config) -> str:
    """The same, to be written to: ConfigError if it is a SQLite file that cannot be."""
    uri = tracking_uri(config)
    if uri.startswith("sqlite:///"):
        _check_sqlite(uri)
    return uri


def deliver(config: Config, run_folder: UPath, evaluated: "Evaluated | None" = None) -> None:
    """Brings MLflow up to the ledger and the evaluation of a run; prints one line if that is not possible now."""
    if evaluated is None and not any(read_ledger(run_folder)):
        return
    line = Tracker(config, usable_tracking_uri(config), run_folder, evaluated).close()
    if line:
        print(line, flush=True)


class Tracker:
    """Keeps the MLflow run of a training run up to its ledger."""

    def __init__(self, config: Config, uri: str, run_folder: UPath, evaluated: "Evaluated | None" = None) -> None:
        """evaluated: an evaluation to deliver too, whose files are in `<run>/evaluation`."""
        self.config, self.uri, self.folder, self.evaluated = config, uri, run_folder, evaluated
        self._attempts: int | None = None
        self._lines: deque[tuple[int, StepRecord | Event]] = deque()
        self._metrics: RunMetrics | None = None  # None until the ledger is read
        self._points: list[Point] = []
        self._sent: dict[str, int] = {}  # last step of each metric that a server has taken
        self._run: MlflowRun | None = None
        self._problem, self._mistake = "", ""
        self._accepted = self._given_up = False
        self._wake, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._keep_up, name="mlflow", daemon=True)

    def start(self, attempts: int, say: Callable[[str], None]) -> None:
        """Begins. Lines of attempts after the first `attempts` come by `take`, before or after the ledger has them.

        `say` gets a line when the server begins to fail, and one when it is back.
        """
        self._attempts, self._say = attempts, say
        self._thread.start()

    def take(self, attempt: int, line: StepRecord | Event) -> None:
        """A line that has been written to the ledger; never waits."""
        # A step's sequences are not MLflow's, and most of the memory that an outage fills.
        self._lines.append((attempt, replace(line, sequences=[]) if isinstance(line, StepRecord) else line))
        self._wake.set()

    def refuse_mistake(self) -> None:
        """ConfigError if the server has answered with one by now; from here on a mistake ends nothing."""
        self._accepted = True
        if self._mistake:
            self.give_up()
            raise ConfigError(self._mistake)

    def give_up(self) -> None:
        """Sends nothing more: the run is refused, or another driver has it, and its metrics are that one's to send."""
        self._given_up = True
        self._closing.set()
        self._wake.set()

    def close(self) -> str:
        """Tries once more to deliver what is left, for `PATIENCE_S` at most; one line if it stays, or ""."""
        self._closing.set()
        self._wake.set()
        if self._thread.ident is None:
            self._thread.start()
        self._thread.join(PATIENCE_S)
        problem = f"no answer in {PATIENCE_S:.0f} s" if self._thread.is_alive() else self._problem
        if not problem or self._given_up:
            return ""
        return f"MLflow at {self.uri} has not got all of this run ({problem}): its next train or evaluate delivers it"

    def _keep_up(self) -> None:
        delay, closing = FIRST_DELAY_S, False
        while not closing and not self._given_up:
            closing = self._closing.is_set()
            try:
                self._bring_up_to_date_or_reconnect()
            except Exception as error:  # whatever MLflow, the network or a database raises: training goes on
                self._failed(error)
                self._closing.wait(delay)
                delay = min(LONGEST_DELAY_S, 2 * delay)
            else:
                self._succeeded()
                delay = FIRST_DELAY_S
                if not self._closing.wait(SEND_INTERVAL_S):
                    self._wake.wait()

    def _bring_up_to_date_or_reconnect(self) -> None:
        """A failure with a server that took everything so far is looked at again: it closes connections that rest."""
        if self._run is not None:
            with suppress(Exception):
                return self._bring_up_to_date()
            self._run = None  # ask again what the server has: a request without an answer may have reached it
        self._bring_up_to_date()

    def _bring_up_to_date(self) -> None:
        """Sends everything that there is to send."""
        self._wake.clear()
        run = self._run = self._run or self._connect()
        metrics = self._metrics or self._read_ledger(run)
        while self._lines or self._points:
            while self._lines and len(self._points) < POINTS_AT_ONCE:
                self._points += metrics.take(*self._lines.popleft())
            run.send(self._points[:POINTS_AT_ONCE])
            self._sent |= run.last_step
            del self._points[:POINTS_AT_ONCE]
        if metrics.status not in (None, "RUNNING") and self._closing.is_set():  # the ledger has been closed by then
            numbered = list(read_ledger(self.folder))
            run.send([goodput_so_far(numbered)] if numbered else [])
        run.describe(metrics.tags(), metrics.status, metrics.ended)
        run.keep_packs(self.config, metrics.packs)
        run.keep_config(self.config)
        if self.evaluated is not None:
            step, values = self.evaluated.step, self.evaluated.metrics
            run.keep_evaluation(self.folder / "evaluation", values, step, time.time())
            if metrics.status is None:  # evaluated without having been trained here
                run.describe({}, "FINISHED", time.time())

    def _connect(self) -> "MlflowRun":
        from pipeline.mlflow_run import open_run

        run = open_run(self.config, self.uri, self.folder)
        if any(run.last_step.get(metric, -1) < step for metric, step in self._sent.items()):
            self._read_ledger(run)  # the server has lost what it had, or all of it: a database without a disk
            self._sent = {}
        return run

    def _read_ledger(self, run: "MlflowRun") -> RunMetrics:
        """Puts what the server lacks of the ledger before what is to be sent.

        Returns the state after the attempts that were there at the start; `take` goes on from it. What both it and the
        ledger bring is sent once.
        """
        tokens_per_step = self.config.optimization.global_batch * self.config.context.length
        whole, before = RunMetrics(tokens_per_step), RunMetrics(tokens_per_step)
        points: list[Point] = []
        for attempt, line in read_ledger(self.folder):
            points += [point for point in whole.take(attempt, line) if run.lacks(point)]
            if self._attempts is None or attempt <= self._attempts:
                before.take(attempt, line)
        self._points = points + self._points
        self._metrics = self._metrics or before
        return self._metrics

    def _failed(self, error: Exception) -> None:
        self._run = None
        self._mistake = str(error) if isinstance(error, ConfigError) else ""
        known, self._problem = bool(self._problem), self._mistake or _reason(error)
        if not known and not self._closing.is_set() and (self._accepted or not self._mistake):
            self._say(
                f"MLflow at {self.uri} fails ({self._problem}): training goes on, and what it misses is delivered "
                "when it is back"
            )

    def _succeeded(self) -> None:
        if self._problem and not self._closing.is_set():
            self._say(f"MLflow at {self.uri} is back, and has everything")
        self._mistake = self._problem = ""


def _reason(error: BaseException) -> str:
    """What is at the bottom of an error, in one line: transports wrap it several times."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    text = getattr(error, "strerror", None) or " ".join(str(error).split())
    return text[:200] or type(error).__name__


def _check_sqlite(uri: str) -> None:
    """ConfigError if a SQLite file cannot be used; one that is locked, or on a disk that is full, may be later."""
    path = Path(uri.removeprefix("sqlite:///"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as database:
            database.execute("BEGIN IMMEDIATE").execute("ROLLBACK")
    except (OSError, sqlite3.Error) as error:
        if isinstance(error, OSError) or getattr(error, "sqlite_errorname", "") in UNUSABLE:
            raise ConfigError(f"MLflow at {uri!r} cannot be used: {error}") from None
