"""The one writer of a run: ledger, status and MLflow, in one actor on the driver's node.

Workers come and go; what they trained is told here, once a step, by rank 0.
"""

from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from upath import UPath

from pipeline.assignment import CheckpointRequest, FinalError
from pipeline.config import ConfigError, parse_config
from pipeline.lease import Holder, Lease
from pipeline.ledger import Event, LedgerWriter, StepRecord
from pipeline.storage import storage_error
from pipeline.tracking import Tracker, usable_tracking_uri

TRAINING, ENDING = "training", "ending"
Files = dict[str, dict[str, int | str]]  # as in checkpoints.py, whose torch would slow down the start
RATE_WINDOW = 10  # steps over which tokens/s and the remaining time are estimated


SETUP = ("attention", "activations", "fused")


@dataclass
class Status:
    """What the status line shows. Times in seconds."""

    phase: str = "starting workers"
    step: int = 0
    steps: int = 0
    loss: float | None = None
    eval_loss: float | None = None
    tokens_per_second: float | None = None
    world_size: int = 0
    remaining_s: float | None = None
    attempt: int = 0
    setup: dict[str, str] = field(default_factory=dict)
    """How the workers compute: the attention backend and why not another, activations kept, fused operators."""
    error: str = ""
    """One line if the run must end: a mistake in config or data, or no memory, which trying again would not mend."""
    messages: list[str] = field(default_factory=list)
    """Lines for the user, in the order they came: an outage of MLflow, and its end."""


class RunLog:
    """Ledger, MLflow metrics and status of one run. Made a Ray actor by the driver; plain Python otherwise."""

    def __init__(self, config_values: dict[str, Any], run_folder: str, driver: int) -> None:
        """driver: process id of the driver, on this machine. Raises ConfigError if another driver holds the run."""
        config = parse_config(config_values)
        self.folder = UPath(run_folder)
        self.status_now = Status(steps=config.optimization.steps)
        self.tracker = Tracker(config, usable_tracking_uri(config), self.folder)
        self._lost = False
        self.lease = Lease(self.folder, Holder.here(driver), lost=self._lease_lost)
        self.ledger = LedgerWriter(self.folder)
        self.tracker.start(self.ledger.attempt, say=self.status_now.messages.append)
        self._recent: deque[StepRecord] = deque(maxlen=RATE_WINDOW)
        self._before_the_first_attempt = [Event("driver", 0)]
        self._offers: dict[tuple[int, int], dict[int, tuple[Files, list[Any]]]] = {}
        self._request = CheckpointRequest()
        self._answered = 0
        self._failed_with: tuple[str, int] = ("", -1)
        self._newest_checkpoint = -1
        self._may_commit = 0
        self._last_save_s = 0.0
        self._evaluations: list[Event] = []
        self._ends_early = self._closed = False

    def start_attempt(self, world_size: int, step: int, details: dict[str, Any]) -> int:
        """A worker group has started and goes on from `step`; returns the attempt's number.

        ConfigError if MLflow's server has answered that it cannot be used, where no step has been trained yet.
        RuntimeError if the run was ended before it had these workers.
        """
        if self._closed:
            raise RuntimeError("the run has been ended")
        if not self.status_now.attempt:
            self._refuse_mistake()
        attempt = self._may_commit = self.ledger.start_attempt()
        for event in self._before_the_first_attempt:
            self._write(event)
        self._before_the_first_attempt.clear()
        self._answered, self._offers = self._request.number, {}  # those workers are gone
        self._write(Event("start", step, details={"world_size": world_size, **details}))
        self._recent.clear()
        status = self.status_now
        status.phase, status.step, status.world_size, status.attempt = TRAINING, step, world_size, attempt
        status.setup = {key: details[key] for key in SETUP if key in details}
        return attempt

    def step(self, attempt: int, record: StepRecord) -> None:
        """A step is done. What replaced workers tell counts for nothing: no commit can contain it."""
        if attempt != self.status_now.attempt:
            return
        self._write(record)
        self._recent.append(record)
        status = self.status_now
        status.step, status.loss, status.world_size = record.step + 1, record.loss, record.world_size
        seconds = sum(r.seconds for r in self._recent)
        status.tokens_per_second = sum(r.tokens for r in self._recent) / seconds
        status.remaining_s = (status.steps - status.step) * seconds / len(self._recent)

    def sampled(self, attempt: int, details: dict[str, Any]) -> None:
        """What a node's system is doing, of workers that have not been replaced; see `system_metrics.py`."""
        if attempt == self.status_now.attempt:
            self.event("system", self.status_now.step, details)

    def evaluated(self, step: int, loss: float, tokens: int, seconds: float) -> None:
        """The validation loss after `step` steps, a mean over `tokens` target tokens."""
        self.status_now.eval_loss = loss
        rate = self.status_now.tokens_per_second
        details = {"loss": loss, "tokens": tokens, "seconds": seconds, "tokens_per_second": rate}
        line = Event("evaluation", step, details=details)
        self._evaluations.append(line)
        self._write(line)

    def evaluations(self, after: int) -> list[Event]:
        """The validations after more than `after` steps that this driver's workers have made."""
        return [line for line in self._evaluations if line.step > after]

    def checkpointed(self, save: tuple[int, int], request: int, details: dict[str, Any]) -> None:
        """A save, (attempt, step), is committed, an answer to the request of that number.

        RuntimeError if it was stale by then: it may be a mixture, and must not push out older checkpoints.
        """
        attempt, step = save
        self._check_current(attempt)
        self._answered = max(self._answered, request)
        # A rank may have offered its part of the next save already.
        self._offers = {save: parts for save, parts in self._offers.items() if save[1] > step}
        self._newest_checkpoint, self._last_save_s = step, details["write_seconds"]
        self.event("checkpoint", step, details)

    def offer(self, save: tuple[int, int], rank: int, files: Files, masters: list[Any]) -> None:
        """A rank's part of a save, (attempt, step). `masters`: a Ray reference to its share of them; `files`: none yet,
        then, told again, what it has written.
        """
        self._offers.setdefault(save, {})[rank] = (files, masters)

    def offers(self, save: tuple[int, int]) -> dict[int, tuple[Files, list[Any]]]:
        """What ranks have offered for this save, so far."""
        return self._offers.get(save, {})

    def ask_for_checkpoint(self, hold: bool = False) -> int:
        """Asks the workers for a checkpoint at the end of the step they are in; 0 if there are none in training.

        With `hold` they wait after it, for they are about to be stopped. The number is for `has_checkpointed`.
        """
        if self.status_now.phase != TRAINING:
            return 0
        self._request = CheckpointRequest(self._request.number + 1, hold)
        return self._request.number

    def request(self) -> CheckpointRequest:
        """What the workers are asked for; number 0 if no checkpoint is."""
        open_request = self._request if self._request.number > self._answered else CheckpointRequest()
        return replace(open_request, end=self._ends_early)

    def end_early(self) -> bool:
        """Has the workers save the step that they are in and end the run as KILLED; may be asked again.

        While there are none to do so (they start, or wait for nodes) the log is closed at once; True if it has been.
        """
        self._ends_early = True
        if self._closed or self.status_now.phase in (TRAINING, ENDING):
            return False
        with suppress(Exception):  # the storage's: what it has not got the next driver trains again
            self.close("KILLED")
        return True

    def has_checkpointed(self, request: int) -> bool:
        """Whether a request has been answered, or its workers are gone."""
        return self._answered >= request or self.status_now.phase != TRAINING

    def workers_ended(self, attempt: int | None) -> None:
        """A worker of that attempt has ended, well or not, or all have (None): nobody answers requests any more."""
        if attempt in (None, self.status_now.attempt):
            self.status_now.phase = ENDING

    def happened(self, event: str, details: dict[str, Any]) -> None:
        """A disturbance, as the controller sees it, or new workers that are about to start."""
        if event == "workers":
            self._may_commit = 0
        if event == "failure":
            self.status_now.phase = "recovering"
        if event in ("failure", "resize"):
            self.status_now.messages.append(
                f"{details['cause']} after {self.status_now.step} steps: workers start anew"
            )
        self.event(event, self.status_now.step, details)

    def say(self, line: str) -> None:
        """A line for the user."""
        self.status_now.messages.append(line)

    def noticed(self, details: dict[str, Any]) -> None:
        """A worker's machine is about to be taken away: the workers save the step that they are in."""
        self.status_now.messages.append(f"workers {details['ranks']} are about to be taken away: saving")
        self.happened("notice", details)
        self.ask_for_checkpoint()

    def save_seconds(self) -> float:
        """How long before a deadline the last checkpoint must be asked for: two steps and twice the last save."""
        step = max((record.seconds for record in self._recent), default=0.0)
        return 2 * (step + self._last_save_s) + 2.0

    def waiting(self, reason: str) -> None:
        """Why no workers are started yet."""
        self.status_now.phase = reason

    def final_error(self, repeated: str) -> str:
        """Why the run must end, or "": a worker named a reason, or the same error came twice without a checkpoint.

        repeated: the error of the workers, if it is one of our code; "" for one that comes from outside.
        """
        if repeated and self._failed_with == (repeated, self._newest_checkpoint):
            self.fail(f"the same error twice, without a checkpoint between: {repeated}")
        self._failed_with = (repeated, self._newest_checkpoint)
        return self.status_now.error

    def event(self, event: str, step: int, details: dict[str, Any]) -> None:
        """Something happened after `step` steps."""
        line = Event(event, step, details=details)
        if self.status_now.attempt:
            self._write(line)
        else:
            self._before_the_first_attempt.append(line)

    def sync(self, attempt: int) -> None:
        """Returns when the ledger is on disk, and that attempt may commit.

        RuntimeError if another driver has the run, or newer workers: nothing more is committed. FinalError for an error
        of the storage, whose cause would be lost on the way to the worker.
        """
        try:
            self.lease.check()
            self._check_current(attempt)
            self.ledger.sync()
        except Exception as error:
            if storage_error(error):
                raise FinalError(storage_error(error)) from None
            raise

    def fail(self, error: str) -> None:
        """Records the reason for which the run must end; the first that is named counts."""
        if not self.status_now.error:
            self.status_now.error = error
            self.event("error", self.status_now.step, {"error": error})

    def status(self) -> Status:
        return self.status_now

    def close(self, status: str) -> str:
        """Ends the MLflow run as FINISHED, FAILED or KILLED, and the ledger; one line if MLflow has not got all, or "".

        A driver that has lost the run ends nothing but itself. What is closed stays as it is.
        """
        if self._closed:
            return ""
        self._closed = True
        if self._ends_early and status == "FINISHED" and self.status_now.step < self.status_now.steps:
            status = "KILLED"
        try:
            if not self._lost:
                self._end(status)
            with suppress(OSError):  # of a full disk, which has ended the run: its error is not this one
                self.ledger.close()
            return self.tracker.close()
        finally:
            self.lease.release()

    def _write(self, line: StepRecord | Event) -> None:
        self.ledger.write(line)
        self.tracker.take(self.ledger.attempt, line)

    def _end(self, status: str) -> None:
        """Tells MLflow also where the ledger has no attempt to write it into, or no room on its disk."""
        line = Event("end", self.status_now.step, details={"status": status})
        with suppress(OSError):
            if self.status_now.attempt:
                self.ledger.write(line)
        self.tracker.take(self.ledger.attempt, line)

    def _refuse_mistake(self) -> None:
        try:
            self.tracker.refuse_mistake()
        except ConfigError as error:
            self.fail(str(error))
            raise

    def _check_current(self, attempt: int) -> None:
        if attempt != self._may_commit:
            raise RuntimeError(f"the workers of attempt {attempt} have been replaced")

    def _lease_lost(self) -> None:
        self._lost = True
        self.tracker.give_up()
        self.fail("another driver has taken over this run")
