"""A run's disturbances, told to the run's log: failures, notices and resizes, as Ray Train sees them; SIGTERM.

Ray calls these hooks in the controller, on the driver's node, and in the workers. `ControllerCallback` is an internal
interface of Ray, the only one that tells of a resize before it happens; the range of Ray versions is pinned for it.
"""

import signal
import threading
import time
from typing import Any

import ray
import torch.distributed as dist
from ray.exceptions import RayActorError
from ray.train import UserCallback
from ray.train.v2._internal.exceptions import WorkerHealthCheckTimeoutError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerCallback
from ray.train.v2._internal.execution.controller.state import (
    ErroredState,
    PreemptingState,
    ReschedulingState,
    ResizingState,
    RestartingState,
    ShuttingDownState,
    TrainControllerState,
)
from ray.train.v2.api.exceptions import PreemptionError, TrainingFailedError, WorkerGroupError

SAVE_TIMEOUT_S = 600.0
"""How long a resize waits for the checkpoint that it asked for; afterwards steps are redone instead."""


class EndOnFinalError(UserCallback):
    """Ends the run on an error that trying again would repeat: a worker said so, or it came twice without progress."""

    def __init__(self, run_log: Any) -> None:
        self.run_log = run_log

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        own = [error for error in worker_exceptions.values() if not lost_a_worker(error)]
        repeated = own and len(own) == len(worker_exceptions) and last_line(own[0])
        error = ray.get(self.run_log.final_error.remote(repeated or ""))
        if error:
            raise RuntimeError(error)  # an exception in a callback is what Ray Train does not retry


class TellDisturbances(ControllerCallback):
    """Tells the log what happens to the worker group; has checkpoints made at a notice and before a stop."""

    def __init__(self, run_log: Any) -> None:
        self.run_log = run_log
        self._last_call = False

    def after_controller_state_update(
        self, previous_state: TrainControllerState, current_state: TrainControllerState
    ) -> None:
        if isinstance(current_state, RestartingState | ReschedulingState):
            error = current_state.training_failed_error
            self.run_log.happened.remote("failure", {"cause": cause(error), "error": last_line(error)[:300]})
        elif isinstance(current_state, PreemptingState):
            info = current_state.preemption_info
            left = info.deadline_ms / 1000 - time.time() if info.deadline_ms else None
            if not isinstance(previous_state, PreemptingState):
                self._last_call = False
                self.run_log.noticed.remote({"ranks": sorted(info.preempted_ranks), "seconds_left": left})
            elif left is not None and not self._last_call and left < ray.get(self.run_log.save_seconds.remote()):
                # The workers are stopped at the deadline: what they did since the first checkpoint is kept too.
                self._last_call = True
                self.run_log.ask_for_checkpoint.remote(hold=True)
        elif isinstance(current_state, ShuttingDownState | ErroredState):
            self.run_log.workers_ended.remote(None)
        elif isinstance(current_state, ResizingState):
            workers = getattr(current_state.scaling_decision, "num_workers", None)
            self.run_log.happened.remote("resize", {"cause": f"resize to {workers}", "workers": workers})

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        """Workers are restarted at a resize without a word: what they have done is made safe first, and they wait."""
        asked = ray.get(self.run_log.ask_for_checkpoint.remote(hold=True))
        until = time.monotonic() + SAVE_TIMEOUT_S
        while asked and time.monotonic() < until and not ray.get(self.run_log.has_checkpointed.remote(asked)):
            time.sleep(0.2)


class NoticeOnSigterm(WorkerCallback):
    """Takes SIGTERM on a worker for a notice: all ranks save the same step at once, and train on while they may."""

    def __init__(self, run_log: Any) -> None:
        self.run_log = run_log

    def after_init_train_context(self) -> None:
        """Called in the worker's main thread, as signals need it; Ray's own handler would end the worker."""
        rank = ray.train.get_context().get_world_rank()

        def tell() -> None:
            self.run_log.noticed.remote({"ranks": [rank], "seconds_left": None, "signal": "SIGTERM"})

        # A handler interrupts any line of this thread, in Ray too; a thread of its own may call Ray.
        signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=tell, daemon=True).start())


def cause(error: TrainingFailedError) -> str:
    """What ended a worker group, in a few words."""
    if isinstance(error, PreemptionError):
        return "preempted"
    if isinstance(error, WorkerGroupError):
        failures = error.worker_failures.values()
        if any("process has died" in str(failure) for failure in failures):
            return "worker died"
        if any(isinstance(failure, WorkerHealthCheckTimeoutError) for failure in failures):
            return "no sign of life of a worker"
        if any(lost_a_worker(failure) for failure in failures):
            return "connection to a worker lost"
        return "error in a worker"
    return "workers could not start"


def lost_a_worker(error: BaseException) -> bool:
    """Whether an error in a worker group tells of a process or a connection that is gone, not of our code."""
    text = str(error)
    return isinstance(error, RayActorError | WorkerHealthCheckTimeoutError | dist.DistError) or any(
        word in text for word in ("gloo/", "NCCL", "Connection closed by peer", "process has died")
    )


def last_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[-1].strip() if str(error).strip() else type(error).__name__
