"""The entry point of a worker: runs the loop, and says of an error whether trying again can help."""

import sys

import ray
import ray.train
import torch
from upath import UPath

from pipeline.assignment import Assignment, FinalError
from pipeline.config import ConfigError
from pipeline.storage import storage_error
from pipeline.storage_probe import check_here


def train_worker(settings: dict[str, Assignment]) -> None:
    """What Ray Train calls on each worker. Errors that would repeat are named to the run's log, which ends the run."""
    assignment = settings["assignment"]
    if ray.train.get_context().get_world_rank() == 0:
        assignment.run_log.happened.remote("workers", {})
    try:
        # DeepSpeed's autotuner, which is not used, would import MLflow: seconds of every start of a worker.
        sys.modules.setdefault("mlflow", None)  # type: ignore[arg-type]  # None makes the import fail, which it expects
        from pipeline.train_loop import train_loop  # DeepSpeed with it, for which the driver would wait in vain

        check_here(UPath(assignment.run_folder))
        train_loop(assignment)
    except Exception as error:
        reason = final_reason(error)
        if reason:
            ray.get(assignment.run_log.fail.remote(reason))
        raise


def final_reason(error: Exception) -> str:
    """One line for an error that a restart would meet again; empty for one that it may not."""
    error = getattr(error, "cause", None) or error  # an actor's, which Ray shows with its traceback
    text = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError):
        return (
            f"out of GPU memory: {text[:160]}; lower optimization.micro_batch or context.length, "
            "or set model.activations: recompute"
        )
    if storage_error(error):
        return storage_error(error)
    if "process group has not been initialized" in text:
        return ""  # Ray ends the group of the others when one is lost: this worker met the end in mid-step
    if isinstance(error, FinalError | ConfigError | ValueError):
        return text
    return ""
