"""Nodes come and go under a run, with a notice and without: the same data, nothing lost, nothing twice."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from spot_cluster import SLOT, DisturbedRun, SpotCluster

from pipeline.audit import audit_run
from pipeline.config import load_config

STEPS = 1500
SETTINGS = {
    "optimization": {"steps": STEPS, "learning_rate": 1e-3},
    "workers": {"min": 1, "max": 2, "resources": SLOT, "resize_interval_s": 2},
    "checkpoint": {"every_steps": 500},
}


@pytest.fixture
def cluster() -> Iterator[SpotCluster]:
    with SpotCluster() as cluster:
        yield cluster


@pytest.mark.timeout(600)
@pytest.mark.parametrize("notice", [True, False], ids=["with notice", "without notice"])
def test_a_node_goes_and_another_comes(make_run: Callable, cluster: SpotCluster, notice: bool, tmp_path: Path) -> None:
    cluster.add()
    leaving = cluster.add()
    made = make_run("run", **SETTINGS)
    run = DisturbedRun(made.config, made.folder, cluster.address)
    run.start()
    run.wait_for("two workers", lambda: run.trains(2))
    if notice:
        cluster.give_notice(leaving, seconds=8)
        run.wait_for("a notice", lambda: bool(run.events("notice")))
        run.wait_for("the deadline", lambda: bool(run.events("failure")))
    cluster.remove(leaving)
    run.wait_for("one worker", lambda: run.trains(1))
    cluster.add()
    run.wait_for("two workers again", lambda: run.trains(2))
    run.finish()

    result = audit_run(load_config(run.config), run.folder)
    assert result.whole and result.committed == STEPS
    shrunk, grown = result.recoveries
    assert (shrunk.cause == "preempted") == notice
    assert grown.cause == "resize to 2" and grown.redone == 0, "a checkpoint is made before a resize"
    if notice:
        assert shrunk.redone == 0, "a checkpoint is made at the deadline"
    print(json.dumps([vars(recovery) for recovery in result.recoveries]))
