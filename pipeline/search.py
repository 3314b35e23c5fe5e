"""The stage `search`: Ray Tune over the space, each trial a training run on the same packs.

    source     which trial is next, and the records of all               (search_source.py)
    Tune       how many at once; ASHA; starts and ends the trials' drivers
    trial      one training run, told validation by validation           (search_trial.py)

A search that starts anew does not read Tune's own state, which is pickled: finished trials are in its records, and ASHA
is told what they were.
"""

import logging
import os
import signal
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType, SimpleNamespace
from typing import Any, cast

import ray
from ray import tune
from ray.tune.execution.placement_groups import PlacementGroupFactory
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from upath import UPath

from pipeline.capacity import check_resources, room_for_workers
from pipeline.config import Config, ConfigError
from pipeline.lease import Holder, Lease
from pipeline.prepare import PreparedPacks
from pipeline.run_config import keep_config
from pipeline.search_budget import Budget
from pipeline.search_report import print_result, write_result
from pipeline.search_source import EndWithBudget, TrialSource
from pipeline.search_space import LOSS
from pipeline.search_tracking import SearchTracker
from pipeline.search_trial import Trial, check_room
from pipeline.search_trials import TrialRecord, TrialStore, trial_config

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

    ConfigError if another driver works on this search, no trial fits the cluster, or all trials fail. KeyboardInterrupt
    after Ctrl-C, when all trials have ended.
    """
    check_resources(trial_config(config, {}))
    lease = Lease(folder, Holder.here(os.getpid()))
    keep_config(config, folder)
    source = TrialSource(config, TrialStore(folder), packs, Budget(config, folder), say=_say)
    tracker = SearchTracker(config, folder, source.records)
    try:
        tracker.start()
        with _interruptible(source):
            _tune(config, source)
        source.interrupt()
        records = list(source.records.values())
        write_result(config, folder, records, source.budget)
        print_result(config, folder, records, source.budget)
        tracker.close()
    finally:
        try:
            source.budget.keep()
        finally:
            lease.release()
    if source.ends_because == INTERRUPT:
        raise KeyboardInterrupt
    if records and all(record.status == "failed" for record in records):
        raise ConfigError(f"all {len(records)} trials failed; the first: {records[0].reason}")


INTERRUPT = "Ctrl-C"


def _tune(config: Config, source: TrialSource) -> None:
    os.environ.update(TUNE_SETTINGS)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a trial that fails is told in a line of ours
    tune.Tuner(
        tune.with_resources(Trial, _driver_place()),
        tune_config=tune.TuneConfig(
            search_alg=source,
            scheduler=_scheduler(config, source.records.values()),
            num_samples=-1,  # the source says when to end
            max_concurrent_trials=_concurrent(config),
        ),
        run_config=tune.RunConfig(
            name=f"search-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}",
            storage_path=os.path.join(tempfile.gettempdir(), "longlora-ray"),
            failure_config=tune.FailureConfig(max_failures=ACTOR_FAILURES),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # the runs' folders have the state
            stop=EndWithBudget(source),
            verbose=0,
        ),
    ).fit()


def _driver_place() -> PlacementGroupFactory:
    """A trial's driver: on this node, which does not come and go, without CPUs: no worker waits for one."""
    here = ray.get_runtime_context().get_node_id()
    resource = f"node:{ray.util.get_node_ip_address()}"
    return PlacementGroupFactory([{resource: 0.001}], bundle_label_selector=[{"ray.io/node-id": here}])


def _concurrent(config: Config) -> int:
    """Trials at once: as many as have room for all their workers, so that none waits with some of them."""
    fixed = trial_config(config, {})
    check_room(fixed)
    room = room_for_workers(fixed) // fixed.workers.min
    return min(room, config.search.concurrent or room)


def _scheduler(config: Config, records: Iterable[TrialRecord]) -> TrialScheduler:
    """ASHA that knows what earlier drivers' trials were at its rungs; those that go on tell it themselves."""
    asha, optimization = config.search.asha, config.optimization
    if asha is None or config.evaluation.every_steps is None:
        return FIFOScheduler()
    tokens_per_step = optimization.global_batch * config.context.length
    grace = asha.grace_tokens or config.evaluation.every_steps * tokens_per_step
    whole = optimization.steps * tokens_per_step
    scheduler = ASHAScheduler(
        time_attr="tokens",
        metric=LOSS,
        mode="min",
        grace_period=min(grace, whole),
        reduction_factor=asha.reduction_factor,
        max_t=whole,
        stop_last_trials=False,  # a trial that comes so far has ended
    )
    for record in records:
        if record.status in ("finished", "stopped"):
            _tell(scheduler, record)
    return scheduler


def _tell(scheduler: ASHAScheduler, record: TrialRecord) -> None:
    trial = cast(Any, SimpleNamespace(trial_id=record.run))  # ASHA knows trials by their ids
    scheduler.on_trial_add(cast(Any, None), trial)
    for report in record.reports:
        scheduler.on_trial_result(cast(Any, None), trial, {"tokens": report.tokens, LOSS: report.loss})


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
