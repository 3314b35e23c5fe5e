"""MLflow with its default store, a SQLite file beside the runs; with a server: tests/integration."""

import os
import shutil
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.utils.validation import _validate_metric_name
from upath import UPath

from pipeline import tracking
from pipeline.config import Config, ConfigError, parse_config
from pipeline.evaluation import Evaluated
from pipeline.ledger import Event, LedgerWriter, StepRecord
from pipeline.run_config import keep_config
from pipeline.run_log import RunLog
from pipeline.storage import read_json, write_json
from pipeline.tracking import Tracker, deliver, tracking_uri, usable_tracking_uri


@pytest.fixture
def config(tmp_path: Path, mlflow_database: Path) -> Config:
    shutil.copy(mlflow_database, tmp_path / "mlflow.db")
    return parse_config(
        {
            "run": {"name": "tracked", "storage": str(tmp_path)},
            "model": {"base": "some/model"},
            "context": {"length": 4096},
            "attention": {"group_size": 1024},
            "data": {"train": ["books"]},
            "optimization": {"steps": 8, "global_batch": 2, "warmup_steps": 0},
        }
    )


@pytest.fixture
def folder(tmp_path: Path) -> UPath:
    (tmp_path / "tracked").mkdir()
    return UPath(tmp_path) / "tracked"


def record(step: int) -> StepRecord:
    fields = {"world_size": 1, "first_position": 2 * step, "sequences": [0, 1], "token_hash": "00", "target_tokens": 9}
    return StepRecord(step=step, loss=2.0 + step, time=100.0 + step, seconds=1.0, **fields)  # type: ignore[arg-type]


def attempt(folder: UPath, steps: range, status: str | None) -> None:
    """An attempt in the ledger; without a status as a killed driver leaves it."""
    ledger = LedgerWriter(folder)
    ledger.start_attempt()
    ledger.write(Event("start", steps.start, details={"world_size": 1}))
    for step in steps:
        ledger.write(record(step))
    if status:
        ledger.write(Event("end", steps.stop, time=200.0, details={"status": status}))
    ledger.close()


def runs(config: Config) -> list[Run]:
    client = MlflowClient(tracking_uri(config))
    experiment = client.get_experiment_by_name("longlora")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id]))


def history(config: Config, metric: str) -> list[tuple[int, float]]:
    [run] = runs(config)
    points = MlflowClient(tracking_uri(config)).get_metric_history(run.info.run_id, metric)
    return sorted((point.step, point.value) for point in points)


def test_what_the_ledger_has_is_delivered_once(config: Config, folder: UPath) -> None:
    attempt(folder, range(2), status=None)
    deliver(config, folder)
    assert runs(config)[0].info.status == "RUNNING", "as far as the ledger tells"
    attempt(folder, range(1, 3), status="FINISHED")
    for _ in range(2):
        deliver(config, folder)
    [run] = runs(config)
    assert (run.info.run_name, run.info.status, run.info.end_time) == ("tracked", "FINISHED", 200_000)
    assert run.info.run_id == read_json(folder / "run.json")["mlflow_run_id"]
    assert history(config, "train/loss") == [(0, 2.0), (1, 3.0), (2, 4.0)]
    assert history(config, "train/loss_by_tokens") == [(8192, 2.0), (16384, 3.0), (24576, 4.0)]
    assert run.data.tags["longlora.attempts"] == "2"


def test_more_points_than_one_request_takes(config: Config, folder: UPath) -> None:
    attempt(folder, range(300), status="FINISHED")  # 12 points each
    deliver(config, folder)
    assert [step for step, _ in history(config, "train/loss")] == list(range(300))


def test_every_setting_is_a_param_and_the_config_an_artifact(config: Config, folder: UPath, tmp_path: Path) -> None:
    attempt(folder, range(1), status="FINISHED")
    deliver(config, folder)
    [run] = runs(config)
    settings = {key: str(value) for key, value in config.flat().items() if key != "tracking.tags"}
    assert run.data.params == settings
    client = MlflowClient(tracking_uri(config))
    saved = client.download_artifacts(run.info.run_id, "config.yaml", str(tmp_path))
    assert Path(saved).read_text() == config.to_yaml()
    assert (tmp_path / "mlartifacts").is_dir(), "artifacts belong beside the database, not into the working directory"


@pytest.mark.parametrize("lost", ["mlflow_run_id", "mlflow_key"])
def test_a_crash_beside_the_making_of_the_run_leaves_one_run(config: Config, folder: UPath, lost: str) -> None:
    """Without the id: after the run was made. Without the key: a run of a version that had none."""
    attempt(folder, range(1), status=None)
    deliver(config, folder)
    known = read_json(folder / "run.json")
    write_json(folder / "run.json", {key: value for key, value in known.items() if key != lost})
    deliver(config, folder)
    assert len(runs(config)) == 1
    assert read_json(folder / "run.json")["mlflow_run_id"] == known["mlflow_run_id"]


def test_of_two_runs_with_the_key_the_first_stays(config: Config, folder: UPath) -> None:
    """An answer that was lost: the request was sent again, and the server obeyed both."""
    attempt(folder, range(1), status=None)
    deliver(config, folder)
    [first] = runs(config)
    known = read_json(folder / "run.json")
    client = MlflowClient(tracking_uri(config))
    client.create_run(first.info.experiment_id, tags={"longlora.run": known["mlflow_key"]})
    write_json(folder / "run.json", {"mlflow_key": known["mlflow_key"]})
    deliver(config, folder)
    assert [run.info.run_id for run in runs(config)] == [first.info.run_id]


def test_another_server_gets_the_whole_run(config: Config, folder: UPath, tmp_path: Path) -> None:
    attempt(folder, range(2), status="FINISHED")
    deliver(config, folder)
    other = config.model_copy(
        update={"tracking": config.tracking.model_copy(update={"uri": f"sqlite:///{tmp_path}/other/mlflow.db"})}
    )
    (tmp_path / "other").mkdir()
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as source:
        source.execute("VACUUM INTO ?", [str(tmp_path / "other" / "mlflow.db")])
    with closing(sqlite3.connect(tmp_path / "other" / "mlflow.db")) as database, database:
        for table in ("metrics", "latest_metrics", "params", "tags", "runs"):
            database.execute(f"DELETE FROM {table}")
    deliver(other, folder)
    assert history(other, "train/loss") == [(0, 2.0), (1, 3.0)]
    deliver(config, folder)
    assert len(runs(config)) == 1, "and the first is found again by its key"


def test_what_a_server_has_lost_it_gets_again(config: Config, folder: UPath, tmp_path: Path) -> None:
    attempt(folder, range(5), status="FINISHED")
    deliver(config, folder)
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database, database:
        database.execute("DELETE FROM metrics WHERE step IN (1, 3)")
    deliver(config, folder)
    for metric in ("train/loss", "run/attempt"):
        assert [step for step, _ in history(config, metric)] == [0, 1, 2, 3, 4]


def test_an_evaluation_is_delivered_with_its_files_once(config: Config, folder: UPath) -> None:
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "perplexity.json").write_text("[]")
    for value in (38.2, 38.2, 36.7):  # the last measured with other settings
        deliver(config, folder, Evaluated(40, {"eval/perplexity_512": value, "eval/perplexity_4096": 36.7}))
    [run] = runs(config)
    assert run.info.status == "FINISHED"
    listed = MlflowClient(tracking_uri(config)).list_artifacts(run.info.run_id, "evaluation")
    assert [file.path for file in listed] == ["evaluation/perplexity.json"]
    assert history(config, "eval/perplexity_512") == [(40, 36.7), (40, 38.2)]


def with_tags(config: Config, tags: dict[str, str]) -> Config:
    return config.model_copy(update={"tracking": config.tracking.model_copy(update={"tags": tags})})


def test_tags_are_set_and_at_the_next_start_set_anew(config: Config, folder: UPath) -> None:
    attempt(folder, range(1), status=None)
    deliver(with_tags(config, {"team": "long", "note": "x" * 9000}), folder)
    assert (runs(config)[0].data.tags["team"], len(runs(config)[0].data.tags["note"])) == ("long", 5000)
    deliver(with_tags(config, {"team": "longer"}), folder)
    [run] = runs(config)
    assert run.data.tags["team"] == "longer"
    found = {key: run.data.tags[f"longlora.{key}"] for key in ("rank", "group_size", "context_length")}
    assert found == {"rank": "8", "group_size": "1024", "context_length": "4096"}


def test_settings_of_any_size_are_within_mlflows_limits(config: Config, folder: UPath) -> None:
    model = {"architecture": {f"setting_{n}": "x" * 100 for n in range(1000)}, "tokenizer": "t"}
    files = [f"s3://bucket/books/{n:06}.jsonl.zst" for n in range(10_000)]
    tags = {f"tag {n}": "y" * 100 for n in range(250)}  # more than one request takes
    values = config.model_dump(mode="json") | {"model": model}
    values["data"] |= {"train": files, "validation": files}
    large = with_tags(parse_config(values), tags)
    attempt(folder, range(1), status="FINISHED")
    deliver(large, folder)
    [run] = runs(config)
    assert run.info.status == "FINISHED"
    settings = {key: str(value)[:6000] for key, value in large.flat().items() if key != "tracking.tags"}
    assert run.data.params == settings
    assert run.data.tags.items() >= tags.items()


def test_packs_samples_and_goodput_are_delivered_once(config: Config, folder: UPath) -> None:
    counts = {"sequences": 3, "sequence_length": 4096, "tokens": 190, "target_tokens": 185, "documents": 5}
    packs = {
        use: {"uri": "s3://bucket/packs/0a", "fingerprint": fingerprint, **counts}
        for use, fingerprint in (("training", "0a"), ("validation", "1b"))
    }
    values = {"cpu_utilization_percentage": 35.0, "gpu_0_memory_usage_megabytes": 20_000}
    for number in range(2):
        ledger, began = LedgerWriter(folder), 1000.0 + 100 * number
        ledger.start_attempt()
        ledger.write(Event("start", number, began, {"world_size": 1, "packs": packs}))
        for second in (10, 20):
            ledger.write(Event("system", 0, began + second, {"node": 0, "nodes": 1, "values": values}))
        ledger.write(replace(record(number), time=began + 25, seconds=5.0))
        ledger.write(Event("checkpoint", number + 1, began + 26, {"seconds": 0.0}))
        ledger.write(Event("end", number + 1, began + 40, {"status": "KILLED"}))
        ledger.close()
        for _ in range(2):
            deliver(config, folder)
    for metric, value in values.items():
        assert history(config, f"system/{metric}") == [(second, value) for second in (10, 20, 110, 120)]
    assert history(config, "run/goodput") == [(1, 5 / 40), (2, 10 / 140)]
    [run] = runs(config)
    assert run.inputs is not None
    kept = sorted((one.dataset.name, one.dataset.digest, one.tags[0].value) for one in run.inputs.dataset_inputs)
    assert kept == [("books", "0a", "training"), ("packs", "1b", "validation")]
    for metric in run.data.metrics:
        _validate_metric_name(metric)


def test_no_secret_of_the_environment_is_written_anywhere(
    config: Config, folder: UPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "PGPASSWORD"):
        monkeypatch.setenv(name, "hunter2")
    values = config.model_dump(mode="json")
    for section, key, secret in (
        ("data", "train", ["s3://key:hunter2@bucket/books"]),
        ("data", "validation", ["s3://key:hunter2@bucket/books"]),
        ("run", "storage", "s3://key:hunter2@bucket/runs"),
        ("tracking", "uri", "https://me:hunter2@mlflow.example.com"),
    ):
        with pytest.raises(ConfigError, match="credentials") as caught:
            parse_config(values | {section: values[section] | {key: secret}})
        assert "hunter2" not in str(caught.value)
    log = RunLog(values, str(folder), os.getpid())
    log.start_attempt(1, 0, {"checkpoint": None, "attention": "sdpa"})
    log.step(1, record(0))
    assert log.close("FINISHED") == ""
    keep_config(config, folder)
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "perplexity.json").write_text("[]")
    deliver(config, folder, Evaluated(1, {"eval/perplexity_512": 38.2}))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"mlflow.db", "config.yaml", "attempt-1.jsonl", "run.json"} <= {path.name for path in files}
    assert [path for path in files if b"hunter2" in path.read_bytes()] == []


def test_nothing_is_made_for_a_run_without_a_ledger(config: Config, folder: UPath) -> None:
    deliver(config, folder)
    assert not (folder / "run.json").exists()


def test_an_outage_is_one_line(config: Config, folder: UPath, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    attempt(folder, range(2), status="FINISHED")
    with closing(sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)) as database:
        database.execute("BEGIN EXCLUSIVE")
        deliver(config, folder)
    [line] = capsys.readouterr().out.splitlines()
    assert line == (
        f"MLflow at sqlite:///{tmp_path}/mlflow.db has not got all of this run (database is locked): "
        "its next train or evaluate delivers it"
    )
    deliver(config, folder)
    assert history(config, "train/loss") == [(0, 2.0), (1, 3.0)]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("deleted", ["experiment", "run"])
def test_what_is_deleted_is_a_mistake(
    config: Config, folder: UPath, deleted: str, capsys: pytest.CaptureFixture
) -> None:
    attempt(folder, range(1), status="FINISHED")
    deliver(config, folder)
    [run] = runs(config)
    client = MlflowClient(tracking_uri(config))
    if deleted == "experiment":
        client.delete_experiment(run.info.experiment_id)
        (folder / "run.json").unlink()
    else:
        client.delete_run(run.info.run_id)
    said: list[str] = []
    tracker = Tracker(config, tracking_uri(config), folder)
    tracker.start(attempts=1, say=said.append)
    with pytest.raises(ConfigError, match=rf"deleted.*restore it \(mlflow {deleted}s? restore"):
        while tracker._thread.is_alive():
            tracker.refuse_mistake()
            tracker._thread.join(0.05)
    assert tracker.close() == "" and len(said) <= 1, "the error says it"
    deliver(config, folder)
    [line] = capsys.readouterr().out.splitlines()
    assert "deleted" in line, "after the first step it is a line, and ends nothing"


def test_a_sqlite_file_that_cannot_be_used_is_a_mistake(config: Config, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no database " * 100)
    for path in ("file/mlflow.db", "file"):
        config = config.model_copy(
            update={"tracking": config.tracking.model_copy(update={"uri": f"sqlite:///{tmp_path}/{path}"})}
        )
        with pytest.raises(ConfigError, match=r"MLflow at 'sqlite:.*cannot be used") as caught:
            usable_tracking_uri(config)
        assert "\n" not in str(caught.value)


def test_a_tracker_that_gave_up_sends_nothing(config: Config, folder: UPath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "SEND_INTERVAL_S", 0.0)
    tracker = Tracker(config, tracking_uri(config), folder)
    tracker.give_up()
    tracker.take(1, record(0))
    tracker.start(attempts=0, say=print)
    assert tracker.close() == ""
    assert not (folder / "run.json").exists()
