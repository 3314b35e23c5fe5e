"""MLflow with its default store, a SQLite file beside the runs."""

from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from upath import UPath

from pipeline.config import Config, parse_config
from pipeline.tracking import Tracker, tracking_uri


@pytest.fixture
def config(tmp_path: Path) -> Config:
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


def runs(config: Config) -> list[Run]:
    client = MlflowClient(tracking_uri(config))
    experiment = client.get_experiment_by_name("longlora")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id]))


def history(config: Config, metric: str) -> list[tuple[int, float]]:
    points = MlflowClient(tracking_uri(config)).get_metric_history(runs(config)[0].info.run_id, metric)
    return sorted((point.step, point.value) for point in points)


def test_a_restart_goes_on_with_the_same_run(config: Config, folder: UPath) -> None:
    first = Tracker(config, folder)
    first.metrics({"train/loss": 2.5}, step=0, tokens=8192)
    first.close("FAILED")
    assert runs(config)[0].info.status == "FAILED"
    second = Tracker(config, folder)
    assert second.last_step("train/loss") == 0
    second.metrics({"train/loss": 2.25}, step=1, tokens=16384)
    second.close("FINISHED")

    [run] = runs(config)
    assert (run.info.run_name, run.info.status) == ("tracked", "FINISHED")
    assert history(config, "train/loss") == [(0, 2.5), (1, 2.25)]
    assert history(config, "train/loss_by_tokens") == [(8192, 2.5), (16384, 2.25)]


def test_every_setting_is_a_param_and_the_config_an_artifact(config: Config, folder: UPath, tmp_path: Path) -> None:
    Tracker(config, folder).close("FINISHED")
    [run] = runs(config)
    assert run.data.params == {key: str(value) for key, value in config.flat().items()}
    client = MlflowClient(tracking_uri(config))
    saved = client.download_artifacts(run.info.run_id, "config.yaml", str(tmp_path))
    assert Path(saved).read_text() == config.to_yaml()
    assert (tmp_path / "mlartifacts").is_dir(), "artifacts belong beside the database, not into the working directory"


def test_a_folder_becomes_artifacts_under_its_name(config: Config, folder: UPath) -> None:
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "perplexity.json").write_text("[]")
    tracker = Tracker(config, folder)
    tracker.artifacts(folder / "evaluation")
    tracker.close("FINISHED")
    [run] = runs(config)
    listed = MlflowClient(tracking_uri(config)).list_artifacts(run.info.run_id, "evaluation")
    assert [file.path for file in listed] == ["evaluation/perplexity.json"]


def test_it_knows_which_values_the_server_has(config: Config, folder: UPath) -> None:
    tracker = Tracker(config, folder)
    assert tracker.last_step("train/loss") == -1
    values = {"eval/perplexity_512": 38.2, "eval/perplexity_4096": 36.7}
    assert not tracker.has(values, 40)
    tracker.metrics(values, 40)
    tracker.close("FINISHED")
    tracker = Tracker(config, folder)
    assert tracker.has(values, 40)
    assert not tracker.has(values, 30)
    assert not tracker.has(values | {"eval/perplexity_512": 38.3}, 40)
    tracker.close("FINISHED")
