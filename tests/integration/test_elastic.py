"""Nodes come and go under a run, with a notice and without: the same data, nothing lost, nothing twice."""

import signal
from collections.abc import Callable, Iterator

import pytest
from spot_cluster import SLOT, DisturbedRun, SpotCluster

from pipeline.audit import audit_run
from pipeline.config import load_config

SETTINGS = {
    "optimization": {"steps": 1_000_000, "learning_rate": 1e-3},  # more than there is time for
    "workers": {"min": 1, "max": 2, "resources": SLOT, "resize_interval_s": 2},
    "checkpoint": {"every_steps": 50},
}
NOTICE_S = 15  # half of the shortest that a cloud gives


@pytest.fixture
def cluster() -> Iterator[SpotCluster]:
    with SpotCluster() as cluster:
        yield cluster


def lose(run: DisturbedRun, cluster: SpotCluster, notice: bool) -> None:
    """A node of two goes; then another one comes."""
    leaving = cluster.nodes[-1]
    if notice:
        cluster.give_notice(leaving, NOTICE_S)
        run.wait_for("the deadline", lambda: bool(run.all_events("failure")))
        assert run.all_events("notice"), run.story()
    cluster.remove(leaving)
    run.wait_for("one worker", lambda: run.trains(1))
    cluster.add()
    run.wait_for("two workers again", lambda: run.trains(2))


@pytest.mark.timeout(900)
def test_nodes_go_and_others_come(make_run: Callable, cluster: SpotCluster) -> None:
    cluster.add(), cluster.add()
    made = make_run("run", **SETTINGS)
    run = DisturbedRun(made.config, made.folder, RAY_ADDRESS=cluster.address)
    driver = run.start()
    run.wait_for("two workers", lambda: run.trains(2))
    lose(run, cluster, notice=True)
    lose(run, cluster, notice=False)
    driver.send_signal(signal.SIGINT)
    assert driver.wait(timeout=120) == 130, run.tail()

    result = audit_run(load_config(run.config), run.folder)
    assert result.whole and result.attempts == 5
    noticed, grown, killed, grown_again = result.recoveries
    assert noticed.cause == "preempted" and noticed.redone == 0, "a checkpoint is made at the deadline"
    assert killed.cause != "preempted" and killed.redone <= 50, "at most the steps since the last checkpoint"
    for resize in (grown, grown_again):
        assert resize.cause == "resize to 2" and resize.redone == 0, "a checkpoint is made before a resize"
