"""What can befall the workers of one machine: SIGTERM is a notice, a kill costs the steps since the last checkpoint."""

import signal
from collections.abc import Callable

import pytest
from spot_cluster import DisturbedRun, send, workers_of

from pipeline import checkpoints
from pipeline.audit import audit_run
from pipeline.config import load_config
from pipeline.ledger import Event

SETTINGS = {
    "optimization": {"steps": 1_000_000, "learning_rate": 1e-3},  # more than there is time for
    "checkpoint": {"every_steps": 1_000_000},  # so that what is saved was asked for
    "workers": {"hang_timeout_s": 5},
}


@pytest.mark.timeout(900)
def test_a_terminated_a_stopped_and_a_killed_worker(make_run: Callable) -> None:
    made = make_run("run", **SETTINGS)
    run = DisturbedRun(made.config, made.folder)
    driver = run.start()
    run.wait_for("training", lambda: run.trains(2, 3))

    [terminated, _] = workers_of(driver.pid)
    send([terminated], signal.SIGTERM)
    run.wait_for("a checkpoint", lambda: bool(run.events("checkpoint")))
    [notice], [saved] = run.events("notice"), run.events("checkpoint")
    assert notice.details["signal"] == "SIGTERM" and saved.step - notice.step <= 3, "at the end of the step under way"
    before = run.trained()
    run.wait_for("the next steps", lambda: run.trained() > before + 3)
    assert run.newest()[0] == 1 and terminated.is_running(), "training goes on while it may"

    send(workers_of(driver.pid)[:1], signal.SIGKILL)
    run.wait_for("new workers", lambda: run.newest()[0] == 2 and run.trains(2, 3))
    [restored] = [line for line in run.newest()[1] if isinstance(line, Event) and line.event == "start"]
    assert restored.step == saved.step

    [stopped, _] = workers_of(driver.pid)
    send([stopped], signal.SIGSTOP)
    run.wait_for("new workers again", lambda: run.newest()[0] == 3 and run.trains(2, 3))
    assert not stopped.is_running()

    driver.send_signal(signal.SIGINT)
    assert driver.wait(timeout=120) == 130, run.tail()
    assert "stopped; the same command goes on from the last checkpoint" in run.tail()
    assert checkpoints.steps(run.folder) == [saved.step, run.trained() + 1], "Ctrl-C saves the step under way"
    result = audit_run(load_config(run.config), run.folder)
    assert result.whole and result.attempts == 3
    assert [recovery.cause for recovery in result.recoveries][-1] == "no sign of life of a worker"
