"""A trial: a training run of its own, told to Ray Tune validation by validation.

The actor that Tune makes of it is the run's driver, without CPUs; Ray Train asks for the workers. Its state is in the
run's folder, not in a checkpoint of Tune's: a trial that is started again goes on by its run's name.
"""

import threading
import time
from collections import deque
from contextlib import suppress
from math import inf, isnan
from typing import Any

import ray
from ray import tune
from ray.exceptions import RayActorError
from upath import UPath

from pipeline.config import ConfigError, parse_config
from pipeline.lease import HELD
from pipeline.ledger import Event, read_ledger
from pipeline.prepare import PreparedPacks
from pipeline.search_space import LOSS, THROUGHPUT
from pipeline.storage import one_line, run_folder, storage_error
from pipeline.train_driver import train

HEARTBEAT_S = 10.0
"""Between words of a trial whose training goes on."""
POLL_S = 0.2

Result = dict[str, Any]
"""To Tune: `tokens`, `worker_seconds`; of a validation also its `step` and the objectives; of the end also `ended`
(finished, interrupted or failed), `reason`, `passing` (as in a record), and `done`."""


class Trial(tune.Trainable):
    """Trains in a thread; `step` returns what is to be told next.

    It is never stopped by Tune: it asks whether it is to end, saves, and tells that it is done (`search_ends.py`).
    """

    def setup(self, config: dict[str, Any], ends: Any) -> None:  # type: ignore[override]  # as with_parameters calls it
        """config: `config`, the run's, as nested values, and folders `train_packs`, `validation_packs`; ends: whom to
        ask. Nothing here can fail: what the storage refuses is the training's error.
        """
        self.run, self.ends = parse_config(config["config"]), ends
        self.tokens_per_step = self.run.optimization.global_batch * self.run.context.length
        self.packs = PreparedPacks(UPath(config["train_packs"]), UPath(config["validation_packs"]))
        self.run_log: Any = None
        self.asked_to_end = self.log_closed = self.passing = False
        self.ended, self.reason = "", ""
        self.began = time.monotonic()
        self.told = 0
        self.pending: deque[Event] = deque()
        self.thread = threading.Thread(target=self._train, name="train", daemon=True)
        self.thread.start()

    def step(self) -> Result:
        """The next validation, or after a while a sign of life, or the end."""
        until = time.monotonic() + HEARTBEAT_S
        while True:
            trains = self.thread.is_alive()  # looked at before the log is: nothing that it tells last is missed
            self._end_if_asked()
            self._ask()
            if self.pending:
                return self._validation(self.pending.popleft())
            if not trains or self.log_closed:
                end = {"ended": self.ended or "interrupted", "reason": self.reason, "passing": self.passing}
                return self._progress() | end | {"done": True}
            if time.monotonic() > until:
                return self._progress()
            self.thread.join(POLL_S)

    def _train(self) -> None:
        try:
            folder = run_folder(self.run)
            # Of a trial that goes on: told again, in order, so that a scheduler that starts anew learns all of it.
            self.pending += validations(folder)
            train(self.run, folder, self.packs, started=self._started)
            early = self.asked_to_end and self._steps_done() < self.run.optimization.steps
            self.ended = "interrupted" if early else "finished"
        except Exception as error:  # one trial's, whatever it is: the others go on
            known = isinstance(error, ConfigError) or storage_error(error)
            self.reason = one_line(error) if known else f"{type(error).__name__}: {one_line(error)}"
            self.passing = passes(self.reason)
            self.ended = "failed"

    def _started(self, run_log: Any) -> None:
        self.run_log = run_log

    def _end_if_asked(self) -> None:
        """Asks whether the trial is to end; if so has the run's log see to it, until it has or the training ends."""
        with suppress(RayActorError):  # of a search that ends at once, or a run that has ended
            self.asked_to_end = self.asked_to_end or ray.get(self.ends.asked.remote(self.run.run.name))
            if self.asked_to_end and self.run_log is not None and not self.log_closed:
                self.log_closed = ray.get(self.run_log.end_early.remote())

    def _ask(self) -> None:
        """Takes up the validations since the last one."""
        if self.run_log is None:
            return
        last = self.pending[-1].step if self.pending else self.told
        with suppress(RayActorError):  # the run's log ends with the run, or with a driver that has failed
            self.pending += ray.get(self.run_log.evaluations.remote(last))

    def _validation(self, event: Event) -> Result:
        self.told = event.step
        loss = event.details["loss"]
        objectives = {LOSS: inf if isnan(loss) else loss, THROUGHPUT: event.details.get("tokens_per_second")}
        return {"step": event.step, **objectives, **self._spent(event.step)}

    def _progress(self) -> Result:
        return self._spent(max(self.told, self._steps_done()))

    def _steps_done(self) -> int:
        """As the run's log has it; 0 without one."""
        if self.run_log is not None:
            with suppress(RayActorError):
                return int(ray.get(self.run_log.status.remote()).step)
        return 0

    def _spent(self, step: int) -> Result:
        seconds = (time.monotonic() - self.began) * self.run.workers.min
        return {"tokens": step * self.tokens_per_step, "worker_seconds": seconds}


def validations(folder: UPath) -> list[Event]:
    """A run's validations in its ledger, the first of each step."""
    events = (line for _, line in read_ledger(folder) if isinstance(line, Event) and line.event == "evaluation")
    first: dict[int, Event] = {}
    for event in events:
        first.setdefault(event.step, event)
    return [first[step] for step in sorted(first)]


def passes(reason: str) -> bool:
    """Whether what a trial failed of may have passed when the search starts again: its storage, or another driver."""
    return reason.startswith("run.storage") or any(words in reason for words in HELD)
