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

from pipeline.capacity import room_for_workers
from pipeline.config import Config, ConfigError, parse_config
from pipeline.ledger import Event, read_ledger
from pipeline.prepare import PreparedPacks
from pipeline.search_space import LOSS, THROUGHPUT
from pipeline.storage import run_folder, storage_error
from pipeline.train_driver import train

HEARTBEAT_S = 10.0
"""Between words of a trial whose training goes on: it can be stopped only then."""
POLL_S = 0.2
END_TIMEOUT_S = 600.0
"""How long a trial that is stopped has for its last step and checkpoint."""

Result = dict[str, Any]
"""To Tune: `tokens`, `worker_seconds`; of a validation also its `step` and the objectives; of the end also `ended`
(finished or failed), `reason`, and `done`."""


class Trial(tune.Trainable):
    """Trains in a thread; `step` returns what is to be told next."""

    def setup(self, config: dict[str, Any]) -> None:
        """config: `config`, the run's, as nested values, and folders `train_packs`, `validation_packs`."""
        self.run = parse_config(config["config"])
        self.folder = run_folder(self.run)
        self.tokens_per_step = self.run.optimization.global_batch * self.run.context.length
        self.packs = PreparedPacks(UPath(config["train_packs"]), UPath(config["validation_packs"]))
        self.run_log: Any = None
        self.stopping = False
        self.ended, self.reason = "", ""
        self.began = time.monotonic()
        self.told = 0
        # Of a trial that goes on: told again, in order, so that a scheduler that starts anew learns all of it.
        self.pending = deque(validations(self.folder))
        self.thread = threading.Thread(target=self._train, name="train", daemon=True)
        self.thread.start()

    def step(self) -> Result:
        """The next validation, or after a while a sign of life, or the end."""
        until = time.monotonic() + HEARTBEAT_S
        while True:
            trains = self.thread.is_alive()  # looked at before the log is: nothing that it tells last is missed
            self._ask()
            if self.pending:
                return self._validation(self.pending.popleft())
            if not trains:
                return self._progress() | {"ended": self.ended, "reason": self.reason, "done": True}
            if time.monotonic() > until:
                return self._progress()
            self.thread.join(POLL_S)

    def cleanup(self) -> None:
        """Called by Tune when the trial has ended or is to end: saves, and ends the run as KILLED if it is not done."""
        self.stopping = True
        if self.run_log is not None:
            with suppress(RayActorError):
                ray.get(self.run_log.end_early.remote())
        self.thread.join(END_TIMEOUT_S)

    def _train(self) -> None:
        try:
            check_room(self.run)
            train(self.run, self.folder, self.packs, started=self._started)
            self.ended = "finished"
        except Exception as error:  # one trial's, whatever it is: the others go on
            known = isinstance(error, ConfigError)
            text = storage_error(error) or " ".join(str(error).split()) or type(error).__name__
            self.ended, self.reason = "failed", text if known else f"{type(error).__name__}: {text}"

    def _started(self, run_log: Any) -> None:
        self.run_log = run_log
        if self.stopping:
            ray.get(run_log.end_early.remote())

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
        done = self.told
        if self.run_log is not None:
            with suppress(RayActorError):
                done = max(done, ray.get(self.run_log.status.remote()).step)
        return self._spent(done)

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


def check_room(config: Config) -> None:
    """ConfigError if the cluster cannot hold the run's workers, which would be waited for without end."""
    room = room_for_workers(config)
    if room < config.workers.min:
        raise ConfigError(
            f"workers.min is {config.workers.min}: the cluster has room for {room} such workers; lower it, or add nodes"
        )
