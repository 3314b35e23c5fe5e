"""The one writer of a run: ledger, status and MLflow, in one actor on the driver's node.

Workers come and go; what they trained is told here, once a step, by rank 0.
"""

from collections import deque
from dataclasses import dataclass
from typing import Any

from upath import UPath

from pipeline.assignment import CheckpointRequest
from pipeline.config import Config, ConfigError, parse_config
from pipeline.lease import Holder, Lease
from pipeline.ledger import Event, LedgerWriter, StepRecord
from pipeline.tracking import Tracker, tracking_uri

TRAINING = "training"
Files = dict[str, dict[str, int | str]]  # as in checkpoints.py, whose torch would slow down the start
RATE_WINDOW = 10  # steps over which tokens/s and the remaining time are estimated


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
    attention: str = ""
    """The attention backend, and why those preferred to it do not run."""
    error: str = ""
    """One line if the run must end: a mistake in config or data, or no memory, which trying again would not mend."""


class RunLog:
    """Ledger, MLflow metrics and status of one run. Made a Ray actor by the driver; plain Python otherwise."""

    def __init__(self, config_values: dict[str, Any], run_folder: str, driver: int) -> None:
        """driver: process id of the driver, on this machine. Raises ConfigError if another driver holds the run."""
        config = parse_config(config_values)
        self.folder = UPath(run_folder)
        self.lease = Lease(self.folder, Holder.here(driver), lost=self._lease_lost)
        self.ledger = LedgerWriter(self.folder)
        self.tracker = _tracker(config, self.folder)
        self.status_now = Status(steps=config.optimization.steps)
        # A step that is redone after a restart has the same metrics: MLflow gets each once.
        self._logged = self.tracker.last_step("train/loss")
        self._tokens_per_step = config.optimization.global_batch * config.context.length
        self._recent: deque[StepRecord] = deque(maxlen=RATE_WINDOW)
        self._before_the_first_attempt = [Event("driver", 0)]
        self._offers: dict[tuple[int, int], dict[int, tuple[Files, list[Any]]]] = {}
        self._request = CheckpointRequest()
        self._answered = 0
        self._failed_with: tuple[str, int] = ("", -1)
        self._newest_checkpoint = -1
        self._may_commit = 0

    def start_attempt(self, world_size: int, step: int, details: dict[str, Any]) -> int:
        """A worker group has started and goes on from `step`; returns the attempt's number."""
        attempt = self._may_commit = self.ledger.start_attempt()
        for event in self._before_the_first_attempt:
            self.ledger.write(event)
        self._before_the_first_attempt.clear()
        self._answered, self._offers = self._request.number, {}  # those workers are gone
        self.ledger.write(Event("start", step, details={"world_size": world_size, **details}))
        self._recent.clear()
        status = self.status_now
        status.phase, status.step, status.world_size, status.attempt = TRAINING, step, world_size, attempt
        status.attention = details["attention"]
        return attempt

    def step(self, record: StepRecord) -> None:
        """A step is done."""
        self.ledger.write(record)
        self._recent.append(record)
        status = self.status_now
        status.step, status.loss, status.world_size = record.step + 1, record.loss, record.world_size
        seconds = sum(r.seconds for r in self._recent)
        status.tokens_per_second = sum(r.tokens for r in self._recent) / seconds
        status.remaining_s = (status.steps - status.step) * seconds / len(self._recent)
        if record.step > self._logged:
            self._logged = record.step
            self.tracker.metrics(
                {
                    "train/loss": record.loss,
                    "train/learning_rate": record.learning_rate,
                    "train/gradient_norm": record.gradient_norm,
                    "train/tokens_per_second": record.tokens / record.seconds,
                    "train/world_size": record.world_size,
                },
                step=record.step,
                tokens=(record.step + 1) * self._tokens_per_step,
            )

    def evaluated(self, step: int, loss: float, tokens: int, seconds: float) -> None:
        """The validation loss after `step` steps, a mean over `tokens` target tokens."""
        self.status_now.eval_loss = loss
        self.ledger.write(Event("evaluation", step, details={"loss": loss, "tokens": tokens, "seconds": seconds}))
        self.tracker.metrics({"eval/loss": loss}, step=step, tokens=step * self._tokens_per_step)

    def checkpointed(self, save: tuple[int, int], request: int, details: dict[str, Any]) -> None:
        """A save, (attempt, step), is committed, an answer to the request of that number.

        RuntimeError if it was stale by then: it may be a mixture, and must not push out older checkpoints.
        """
        attempt, step = save
        self._check_current(attempt)
        self._answered = max(self._answered, request)
        # A rank may have offered its part of the next save already.
        self._offers = {save: parts for save, parts in self._offers.items() if save[1] > step}
        self._newest_checkpoint = step
        self.event("checkpoint", step, details)

    def offer(self, save: tuple[int, int], rank: int, files: Files, masters: list[Any]) -> None:
        """A rank has written its part of a save, (attempt, step); `masters`: a Ray reference to its share of them."""
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
        """What the workers are asked for; number 0 if nothing is open."""
        return self._request if self._request.number > self._answered else CheckpointRequest()

    def has_checkpointed(self, request: int) -> bool:
        """Whether a request has been answered, or its workers are gone."""
        return self._answered >= request or self.status_now.phase != TRAINING

    def workers_ended(self, attempt: int) -> None:
        """A worker of that attempt has ended, well or not: nobody answers requests any more."""
        if attempt == self.status_now.attempt:
            self.status_now.phase = "ending"

    def happened(self, event: str, details: dict[str, Any]) -> None:
        """A disturbance, as the controller sees it, or new workers that are about to start."""
        if event == "workers":
            self._may_commit = 0
        if event == "failure":
            self.status_now.phase = "recovering"
        self.event(event, self.status_now.step, details)

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
            self.ledger.write(line)
        else:
            self._before_the_first_attempt.append(line)

    def sync(self, attempt: int) -> None:
        """Returns when the ledger is on disk, and that attempt may commit.

        RuntimeError if another driver has the run, or newer workers: nothing more is committed.
        """
        self.lease.check()
        self._check_current(attempt)
        self.ledger.sync()

    def fail(self, error: str) -> None:
        """Records the reason for which the run must end; the first that is named counts."""
        if not self.status_now.error:
            self.status_now.error = error
            self.event("error", self.status_now.step, {"error": error})

    def status(self) -> Status:
        return self.status_now

    def close(self, status: str) -> None:
        """Ends the MLflow run as FINISHED, FAILED or KILLED, and the ledger."""
        try:
            self.ledger.close()
            self.tracker.close(status)
        finally:
            self.lease.release()

    def _check_current(self, attempt: int) -> None:
        if attempt != self._may_commit:
            raise RuntimeError(f"the workers of attempt {attempt} have been replaced")

    def _lease_lost(self) -> None:
        self.fail("another driver has taken over this run")


def _tracker(config: Config, folder: UPath) -> Tracker:
    """The run's Tracker; ConfigError if MLflow cannot be used, whatever it and its database raise."""
    try:
        return Tracker(config, folder)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"MLflow at {tracking_uri(config)!r} cannot be used: {reason}") from None
