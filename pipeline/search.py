"""The stage `search`: Ray Tune over the space, each trial a training run on the same packs.

    source     which trial is next, and the records of all               (search_source.py)
    Tune       how many at once; ASHA (search_asha.py); starts the trials' drivers
    trial      one training run, told validation by validation           (search_trial.py)
    ends       which trials are to end early: trials ask                  (search_ends.py)

A search that starts anew does not read Tune's own state, which is pickled: finished trials are in its records, and ASHA
is told what they were.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import ray
from ray import tune
from ray.tune.execution.placement_groups import PlacementGroupFactory
from upath import UPath

from pipeline.capacity import LargestCluster, check_resources, lack_of_room, room_for_workers
from pipeline.config import Config, ConfigError
from pipeline.lease import Holder, Lease
from pipeline.prepare import PreparedPacks
from pipeline.run_config import keep_config
from pipeline.search_asha import scheduler
from pipeline.search_budget import Budget
from pipeline.search_check import keep_packs
from pipeline.search_ends import start_ends
from pipeline.search_records import Records
from pipeline.search_report import print_result, write_result
from pipeline.search_source import TrialSource
from pipeline.search_tracking import SearchTracker
from pipeline.search_trial import Trial
from pipeline.search_trials import TrialStore, trial_config
from pipeline.session import private_folder

ACTOR_FAILURES = 3
"""How often a trial's driver may die before the trial counts as failed; its workers' failures are another matter."""
# Read by Tune when it starts.
TUNE_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no CSV, JSON and TensorBoard files beside our records
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # not every word of a trial is a validation
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is ours: it must be told from the end of the budget
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # of a state that nobody reads
    "RAY_AIR_NEW_OUTPUT": "0",  # its tables cannot be turned off: what happens is told in lines of ours
}


def search(config: Config, folder: UPath, packs: PreparedPacks) -> None:
    """Searches until space or budget is exhausted, and writes the result to `<search>/result`.

    ConfigError if another driver works on this search or takes it over, the packs are not those that it was begun on,
    no trial fits the cluster, all trials fail, or the storage does not take the records. KeyboardInterrupt after
    Ctrl-C, when all trials have ended.
    """
    _check_room(config)
    taken_over = threading.Event()
    lease = Lease(folder, Holder.here(os.getpid()), lost=taken_over.set)
    try:
        keep_packs(packs, folder)
        keep_config(config, folder)
        records = Records(TrialStore(folder), Budget(config, folder), lease.check, taken_over)
        tracker = SearchTracker(config, folder, records)
        tracker.start()
        source = TrialSource(config, records, packs, start_ends(), LargestCluster(), say=_say)
        with _interruptible(source):
            _tune(config, source)
        records.finish()
        trials = list(records.all.values())
        write_result(config, folder, trials, records.budget)
        print_result(config, folder, trials, records.budget)
        tracker.close()
    finally:
        lease.release()
    if source.ends_because == INTERRUPT:
        raise KeyboardInterrupt
    if trials and all(record.status == "failed" for record in trials):
        raise ConfigError(f"all {len(trials)} trials failed; the first: {trials[0].reason}")


INTERRUPT = "Ctrl-C"


def _tune(config: Config, source: TrialSource) -> None:
    os.environ.update(TUNE_SETTINGS)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a trial that fails is told in a line of ours
    tune.Tuner(
        tune.with_resources(tune.with_parameters(Trial, ends=source.ends), _driver_place()),
        tune_config=tune.TuneConfig(
            search_alg=source,
            scheduler=scheduler(config, source.records.all.values(), source.fell_behind),
            num_samples=-1,  # the source says when to end
            max_concurrent_trials=_concurrent(config),
        ),
        run_config=tune.RunConfig(
            name=f"search-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}",
            storage_path=str(private_folder()),
            failure_config=tune.FailureConfig(max_failures=ACTOR_FAILURES),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # the runs' folders have the state
            callbacks=[Watch(source)],
            verbose=0,
        ),
    ).fit()


class Watch(tune.Callback):
    """Has the source look several times a second whether the search is to end."""

    def __init__(self, source: TrialSource) -> None:
        self.source = source

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self.source.watch()


def _driver_place() -> PlacementGroupFactory:
    """A trial's driver: on this node, which does not come and go, without CPUs: no worker waits for one."""
    here = ray.get_runtime_context().get_node_id()
    resource = f"node:{ray.util.get_node_ip_address()}"
    return PlacementGroupFactory([{resource: 0.001}], bundle_label_selector=[{"ray.io/node-id": here}])


def _concurrent(config: Config) -> int:
    """Trials at once: as many as have room for all their workers, so that none waits with some of them; or one."""
    fixed = trial_config(config, {})
    room = room_for_workers(fixed) // fixed.workers.min
    return max(1, min(room, config.search.concurrent or room))


def _check_room(config: Config) -> None:
    """ConfigError if the cluster cannot hold one worker, or all those of a trial where all have as many."""
    fixed = trial_config(config, {})
    check_resources(fixed)
    lacks = lack_of_room(fixed, room_for_workers(fixed))
    if lacks and not any(key.startswith("workers.") for key in config.search.space):
        raise ConfigError(lacks)


@contextmanager
def _interruptible(source: TrialSource) -> Iterator[None]:
    """The first Ctrl-C ends all trials, which save; the second ends this process at once."""

    def end(number: int, frame: FrameType | None) -> None:
        if source.ends_because == INTERRUPT:
            raise KeyboardInterrupt
        source.ends_because = INTERRUPT
        _say("all trials save and end; Ctrl-C again stops at once")

    before = signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _say(line: str) -> None:
    print(line, flush=True)
