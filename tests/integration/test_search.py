"""Searches through the command line: trials beside each other, one that cannot be, a killed driver, a lost node."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run as TrackedRun
from spot_cluster import SLOT, DisturbedRun, SpotCluster, raylet_pid, workers_of
from upath import UPath

from pipeline import checkpoints
from pipeline.audit import audit_run
from pipeline.config import load_config
from pipeline.lease import Holder
from pipeline.run_config import run_config
from pipeline.search_trials import TrialRecord, TrialStore
from pipeline.storage import create_once, json_bytes

SPACE = {"attention.group_size": {"choice": [32, 64]}, "workers.min": {"choice": [1, 50]}}
WAIT_S = 300
LONG_STEP_S = 25
"""Longer than Tune lets a trial that it stops at the end of a search live."""


def settings(tmp_path: Path, **search: Any) -> dict[str, dict[str, Any]]:
    """Trials of one worker, long enough to be disturbed, with a validation every 20 steps."""
    return {
        "data": {"validation": [str(tmp_path / "book.txt")]},
        "optimization": {"steps": 200, "global_batch": 2, "micro_batch": 1},
        "workers": {"min": 1, "max": 1},
        "checkpoint": {"every_steps": 20},
        "evaluation": {"every_steps": 20, "rows": 2},
        "search": {"space": SPACE, "sampler": "grid", "asha": None, **search},
    }


def wait_for(what: str, condition: Callable[[], bool], driver: "subprocess.Popen[str]") -> None:
    until = time.monotonic() + WAIT_S
    while not condition():
        assert driver.poll() is None, driver.communicate()[0]
        assert time.monotonic() < until, f"{what}: not in {WAIT_S} s"
        time.sleep(0.1)


def trials(folder: UPath) -> dict[int, TrialRecord]:
    return TrialStore(folder).read()


def tracked(folder: UPath) -> dict[str, TrackedRun]:
    """All runs of the MLflow database beside the search, by name; every name once."""
    client = MlflowClient(f"sqlite:///{folder.parent}/mlflow.db")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert len({run.info.run_name for run in runs}) == len(runs), "a trial has two runs"
    return {run.info.run_name: run for run in runs}


@pytest.mark.timeout(900)
def test_a_search_goes_on_after_its_driver_was_killed(make_run: Callable, tmp_path: Path) -> None:
    """Four trials, two at once. Two ask for more workers than there can be: a clear line, and the others go on."""
    run = make_run("tried", **settings(tmp_path))
    driver = run.start("search")
    wait_for("two validations", lambda: sum(len(trial.reports) for trial in trials(run.folder).values()) >= 2, driver)
    os.kill(driver.pid, signal.SIGKILL)
    driver.communicate()
    before = trials(run.folder)
    output = run.finish("search")

    after = trials(run.folder)
    assert sorted(trial.settings["attention.group_size"] for trial in after.values()) == [32, 32, 64, 64]
    for trial in after.values():
        if trial.settings["workers.min"] == 50:
            assert trial.status == "failed"
            assert trial.reason.startswith("workers.min is 50: the cluster has room for 2 such workers")
        else:
            assert (trial.status, trial.tokens) == ("finished", 200 * 2 * 128)
            assert [report.step for report in trial.reports] == list(range(20, 201, 20))
            folder = run.folder.parent / trial.run
            assert audit_run(run_config(folder), folder).whole
    started = [trial for trial in before.values() if trial.reports]
    assert started and all(f"trial {trial.number} goes on" in output for trial in started)
    assert all(after[trial.number].reports[: len(trial.reports)] == trial.reports for trial in started)
    _check_result(run.folder, after)

    again = run.finish("search")
    assert "starts" not in again and trials(run.folder) == after, "nothing is done twice"


def _check_result(folder: UPath, records: dict[int, TrialRecord]) -> None:
    finished = [trial for trial in records.values() if trial.status == "finished"]
    best = min(finished, key=lambda trial: trial.loss)
    config = load_config(str(folder / "result" / "best.yaml"))
    assert config.run.name == best.run and config.attention.group_size == best.settings["attention.group_size"]
    runs = tracked(folder)
    assert runs.keys() == {folder.name, *(trial.run for trial in finished)}
    parent = runs[folder.name]
    assert parent.data.metrics["search/best_eval_loss"] == best.loss
    for trial in finished:
        tags = runs[trial.run].data.tags
        assert tags["mlflow.parentRunId"] == parent.info.run_id
        assert (tags["longlora.status"], tags["longlora.trial"]) == ("finished", str(trial.number))
        assert runs[trial.run].info.status == "FINISHED"
    artifacts = MlflowClient(f"sqlite:///{folder.parent}/mlflow.db").list_artifacts(parent.info.run_id, "result")
    names = {Path(file.path).name for file in artifacts}
    assert names == {"best.yaml", "effects.png", "pareto.png", "report.html", "trials.csv"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ctrl_c_and_a_spent_budget_save_and_what_is_granted_later_goes_on(make_run: Callable, tmp_path: Path) -> None:
    """Optuna, two objectives, a condition; the first trials are far from their end when everything has to end, in a
    step that takes long."""
    space = {
        "attention.group_size": {"choice": [32, 64]},
        "adapter.rank": {"choice": [2, 4]},
        "adapter.alpha": {"log_uniform": [4, 16], "when": {"adapter.rank": [4]}},
    }
    objectives = ["eval/loss", "train/tokens_per_second"]
    values = settings(tmp_path, space=space, sampler="optuna", objectives=objectives, trials=2)
    values["optimization"]["steps"] = 4000
    values["checkpoint"]["every_steps"] = 4000  # so that what is saved was asked for
    run = make_run("tried", **values)
    driver = run.start("search")
    wait_for("validations", lambda: sum(bool(trial.reports) for trial in trials(run.folder).values()) == 2, driver)
    workers = workers_of(driver.pid)
    assert len(workers) == 2
    for worker in workers:
        worker.suspend()
    os.kill(driver.pid, signal.SIGINT)
    time.sleep(LONG_STEP_S)
    for worker in workers:
        worker.resume()
    output, _ = driver.communicate(timeout=120)
    assert driver.returncode == 130 and "all trials save and end" in output, output
    _check_interrupted(run.folder, "interrupted: Ctrl-C")

    spent = json.loads((run.folder / "spent.json").read_text())["seconds"]
    limit = f"search.max_hours={(spent + 40) / 3600}"
    output = run.finish("search", limit)
    assert "trial 1 goes on" in output and "trial 2 goes on" in output and "no trial has finished" in output
    _check_interrupted(run.folder, "interrupted: search.max_hours")
    assert "goes on" not in run.finish("search", limit), "nothing is granted"


def _check_interrupted(folder: UPath, reason: str) -> None:
    for trial in trials(folder).values():
        assert trial.status == "running" and trial.reason.startswith(reason)
        saved = checkpoints.steps(folder.parent / trial.run)
        assert saved and saved[-1] * 2 * 128 >= trial.reports[-1].tokens, "the step under way is saved"
        assert tracked(folder)[trial.run].info.status == "KILLED"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_trial_whose_node_is_killed_comes_to_the_same_result(make_run: Callable, tmp_path: Path) -> None:
    values = settings(tmp_path)
    values["search"]["space"] = {"attention.group_size": {"choice": [32, 64]}}
    values["workers"] |= {"resources": SLOT}
    with SpotCluster() as cluster:
        cluster.add(), cluster.add(), cluster.add()
        made = make_run("tried", **values)
        made.environment["RAY_ADDRESS"] = cluster.address
        driver = made.start("search")
        runs = [DisturbedRun(made.config, made.folder.parent / f"tried.{number:04d}") for number in (1, 2)]
        wait_for("training", lambda: all(run.trains(1, 30) for run in runs), driver)
        cluster.remove(next(node for node in cluster.nodes if workers_of(raylet_pid(node))))
        output, _ = driver.communicate(timeout=600)
        assert driver.returncode == 0, output
    audits = [audit_run(run_config(run.folder), run.folder) for run in runs]
    assert all(audit.whole for audit in audits)
    assert sorted(audit.attempts for audit in audits) == [1, 2]
    [disturbed] = [run for run, audit in zip(runs, audits, strict=True) if audit.attempts == 2]
    group_size = run_config(disturbed.folder).attention.group_size
    values["workers"]["resources"] = {}
    alone = make_run("alone", **{**values, "search": {}, "attention": {"group_size": group_size}})
    alone.finish("train")
    assert _weights(disturbed.folder) == _weights(alone.folder), "the same to the last bit"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_driver_that_has_lost_the_search_ends_its_trials_and_writes_no_more(
    make_run: Callable, tmp_path: Path
) -> None:
    values = settings(tmp_path)
    values["search"]["space"] = {"attention.group_size": {"choice": [32]}}
    values["optimization"]["steps"] = 4000
    run = make_run("tried", **values)
    driver = run.start("search")
    wait_for("a validation", lambda: any(trial.reports for trial in trials(run.folder).values()), driver)
    assert create_once(run.folder / "lease" / "2.json", json_bytes(asdict(Holder.here(os.getpid()))))
    time.sleep(1)  # what was being written when the other driver came
    before = trials(run.folder), (run.folder / "spent.json").read_bytes()
    output, _ = driver.communicate(timeout=120)
    assert driver.returncode == 2 and "error: another driver has taken over this search" in output, output
    assert (trials(run.folder), (run.folder / "spent.json").read_bytes()) == before
    assert not (run.folder / "result").exists()
    assert tracked(run.folder)["tried.0001"].info.status == "KILLED"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_trial_that_waits_for_nodes_does_not_hold_up_the_end(make_run: Callable, tmp_path: Path) -> None:
    """Its node is gone, and none comes in its place: nobody is in a step, and there is nothing to save."""
    values = settings(tmp_path)
    values["search"]["space"] = {"attention.group_size": {"choice": [32]}}
    values["optimization"]["steps"] = 4000
    values["workers"] |= {"resources": SLOT}
    with SpotCluster() as cluster:
        node = cluster.add()
        made = make_run("tried", **values)
        made.environment["RAY_ADDRESS"] = cluster.address
        driver = made.start("search")
        trial = DisturbedRun(made.config, made.folder.parent / "tried.0001")
        wait_for("a checkpoint", lambda: bool(checkpoints.steps(trial.folder)), driver)
        cluster.remove(node)
        time.sleep(LONG_STEP_S)
        os.kill(driver.pid, signal.SIGINT)
        output, _ = driver.communicate(timeout=60)
    assert driver.returncode == 130 and "trial 1 interrupted: Ctrl-C" in output, output
    [record] = trials(made.folder).values()
    assert record.status == "running" and tracked(made.folder)[record.run].info.status == "KILLED"


def _weights(folder: UPath) -> Any:
    manifest = json.loads((checkpoints.step_folder(folder, 200) / "manifest.json").read_text())
    return manifest["files"]["adapter_model.safetensors"]
