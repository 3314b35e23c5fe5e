"""Ray Train around the loop: workers in an elastic range, failures retried, one line for what cannot be."""

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayActorError

# ray.train exports these under the types of its first version, which type checkers then see.
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from upath import UPath

from pipeline import checkpoints
from pipeline.assignment import Assignment
from pipeline.capacity import worker_resources
from pipeline.config import Config, ConfigError, local_path
from pipeline.disturbances import EndOnFinalError, NoticeOnSigterm, TellDisturbances, last_line
from pipeline.elastic import ElasticTrainer
from pipeline.packs import Packs, check_enough
from pipeline.prepare import PreparedPacks
from pipeline.progress import show_progress
from pipeline.rendezvous import OneAddressTorchConfig
from pipeline.run_config import keep_config
from pipeline.run_log import RunLog
from pipeline.session import private_folder, uses_gpu
from pipeline.tracking import deliver, tracking_uri
from pipeline.tracking_uri import how_to_look
from pipeline.train_worker import train_worker


def train(
    config: Config, run_folder: UPath, packs: PreparedPacks, started: Callable[[Any], None] = lambda run_log: None
) -> None:
    """Trains from the newest checkpoint to the last step; ConfigError if the run cannot go on, with the reason.

    started: is given the run's log, once there is one.
    """
    train_packs = Packs.open(packs.train)
    check_enough(train_packs, config.optimization.global_batch)
    base = checkpoints.base_fingerprint(local_path(config.model.base)) if config.model.base else "random"
    newest = checkpoints.newest(run_folder)
    if newest is not None:
        state = checkpoints.read_state(newest)
        checkpoints.check_resumable(state, train_packs.fingerprint, base)
        if state.step >= config.optimization.steps:
            deliver(config, run_folder)  # what MLflow has missed
            return
    run_log = start_run_log(config, run_folder)
    keep_config(config, run_folder)
    print(how_to_look(tracking_uri(config)), flush=True)
    started(run_log)
    assignment = Assignment(
        config=config.model_dump(mode="json"),
        run_folder=str(run_folder),
        train_packs=str(packs.train),
        validation_packs=str(packs.validation) if packs.validation else None,
        base_fingerprint=base,
        run_log=run_log,
    )
    finished = threading.Event()
    progress = threading.Thread(target=show_progress, args=(run_log, finished), name="progress")
    progress.start()
    status = "FAILED"
    try:
        _trainer(config, run_folder, assignment).fit()
        status = "FINISHED"
    except TrainingFailedError as error:
        reason = ray.get(run_log.status.remote()).error
        raise ConfigError(reason) if reason else _plain(error) from None
    except KeyboardInterrupt:
        status = "KILLED"
        _save_before_the_end(run_log)
        raise
    finally:
        finished.set()
        progress.join()
        with suppress(RayActorError):  # without a log there is nothing to close
            undelivered = ray.get(run_log.close.remote(status))
            if undelivered:
                print(undelivered, flush=True)


def _save_before_the_end(run_log: Any) -> None:
    """Ctrl-C loses nothing: the workers save the step that they are in, and wait. A second one ends this at once."""
    with suppress(RayActorError):
        asked = ray.get(run_log.ask_for_checkpoint.remote(hold=True))
        if asked:
            print("saving; Ctrl-C again stops at once", flush=True)
        while asked and not ray.get(run_log.has_checkpointed.remote(asked)):
            time.sleep(0.2)


def _trainer(config: Config, run_folder: UPath, assignment: Assignment) -> ElasticTrainer:
    workers, run_log = config.workers, assignment.run_log
    gpu = uses_gpu(config)
    return ElasticTrainer(
        train_worker,
        run=str(run_folder),
        run_log=run_log,
        train_loop_config={"assignment": assignment},
        torch_config=OneAddressTorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=(workers.min, workers.max) if workers.elastic else workers.min,
            use_gpu=gpu,
            resources_per_worker=dict(worker_resources(config)),
            elastic_resize_monitor_interval_s=workers.resize_interval_s,
        ),
        run_config=RunConfig(
            # Ray's own state, of which nothing is needed again: the run's state is in our checkpoints. On this node's
            # disk, since Ray reaches object stores by another library, and workers look at it only to report a file.
            name=f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}",
            storage_path=str(private_folder()),
            failure_config=FailureConfig(max_failures=workers.max_failures, max_preemption_failures=-1),
            # Ray hides no GPU from a worker that has asked for none, and DeepSpeed takes one that it sees.
            worker_runtime_env={} if gpu else {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}},
            callbacks=[EndOnFinalError(run_log), TellDisturbances(run_log), NoticeOnSigterm(run_log)],  # type: ignore[list-item]  # takes internal ones too
        ),
    )


def start_run_log(config: Config, run_folder: UPath) -> Any:
    """The RunLog actor, without CPUs, on this node: it lives as long as the driver, and holds the run's lease.

    ConfigError if another driver holds it, or `tracking.uri` cannot be used.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(RunLog).options(num_cpus=0, scheduling_strategy=here)
    run_log = actor.remote(config.model_dump(mode="json"), str(run_folder), os.getpid())
    try:
        ray.get(run_log.status.remote())
    except RayActorError as error:
        reason = last_line(error).partition("ConfigError: ")[2]
        raise ConfigError(reason) if reason else error from None
    return run_log


def _plain(error: TrainingFailedError) -> RuntimeError:
    """The worker's own error, without the frames of Ray."""
    return RuntimeError(f"training failed after all retries: {last_line(error)}")
