"""A real S3 over HTTP, for all tests of what lies on object stores; MLflow runs, for those that compare."""

import signal
import uuid
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest
from object_store import ObjectStore, object_store
from upath import UPath

if TYPE_CHECKING:
    from mlflow import MlflowClient

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell that runs the tests in the background has Ctrl-C ignored by all that they start, where some send it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def running_store() -> Iterator[ObjectStore]:
    with object_store() as store:
        yield store


@pytest.fixture
def store(running_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    """A server that this process, and those that it starts, find by their environment."""
    for name, value in running_store.environment.items():
        monkeypatch.setenv(name, value)
    yield running_store
    running_store.resume()
    running_store.heal()


@pytest.fixture
def bucket(store: ObjectStore) -> UPath:
    """An empty bucket of its own."""
    name = uuid.uuid4().hex
    store.create_bucket(name)
    return UPath(f"s3://{name}")


HOSTILE = "<script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\"> $\\frac{"


@pytest.fixture(scope="session")
def log_runs() -> Callable[[str], None]:
    """log_runs(uri) logs runs to compare into the experiment `mixed`: a search with two trials as ours are, one of the
    Hugging Face Trainer, and one of other code that knows no tokens, with a hostile name."""
    return _log_runs


def _log_runs(uri: str) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    experiment = client.create_experiment("mixed")
    search = client.create_run(experiment, start_time=1000, run_name="search", tags={"team": "long context"})
    client.set_terminated(search.info.run_id, "RUNNING")
    for n, (group_size, status) in enumerate([(1024, "FINISHED"), (2048, "FAILED")]):
        params = {
            "run.name": f"trial-{n}",
            "attention.group_size": group_size,
            "adapter.rank": 8,
            "optimization.learning_rate": 2e-3,
        }
        curves = {
            "train/loss": [(step, 4 - step / 30 + n / 10) for step in range(30)],
            "train/loss_by_tokens": [((step + 1) * 16384, 4 - step / 30 + n / 10) for step in range(30)],
            "train/tokens_per_second": [(step, 6000.0 - 900 * n + 50 * (step % 3)) for step in range(30)],
            "train/tokens_per_second_by_tokens": [((step + 1) * 16384, 6000.0 - 900 * n) for step in range(30)],
            "eval/loss": [(step, 3.9 - step / 40 + n / 9) for step in (9, 19, 29)],
            "eval/loss_by_tokens": [(step * 16384, 3.9 - step / 40 + n / 9) for step in (9, 19, 29)],
            **{f"eval/perplexity_{512 << k}": [(30, 38.0 - k / 2 + n * k)] for k in range(4)},
            "run/goodput": [(30, 0.91 - n / 20)],
            "system/0/gpu_0_memory_usage_megabytes": [(second, 20_000.0 + n * 3000) for second in range(0, 60, 10)],
            "system/1/gpu_0_memory_usage_megabytes": [(second, 21_500.0 + second) for second in range(0, 60, 10)],
        }
        _log(client, experiment, f"trial-{n}", params, curves, status, {"mlflow.parentRunId": search.info.run_id})
    trainer = {
        "loss": [(step, 4.2 - step / 60) for step in range(0, 100, 10)],
        "eval_loss": [(step, 4.1 - step / 70) for step in (40, 90)],
        "num_input_tokens_seen": [(step, step * 5000.0) for step in range(0, 100, 10)],
        "train_loss": [(99, 3.3)],
        "train_tokens_per_second": [(99, 5100.0)],
    }
    _log(client, experiment, "trainer", {"learning_rate": 0.002, "per_device_train_batch_size": 4}, trainer, "FINISHED")
    other = {"train_loss": [(step, 3.8 - step / 80) for step in range(50)], "val_loss": [(49, 3.4)]}
    _log(client, experiment, HOSTILE, {"learning_rate": 0.001, "note": f"a note: {HOSTILE}"}, other, "KILLED")


def _log(
    client: "MlflowClient",
    experiment: str,
    name: str,
    params: dict[str, object],
    curves: dict[str, list[tuple[int, float]]],
    status: str,
    tags: dict[str, str] | None = None,
) -> None:
    """A run whose metrics have a point every two seconds."""
    from mlflow.entities import Metric, Param

    start = 2000 + len(client.search_runs([experiment]))
    run_id = client.create_run(experiment, start_time=start, run_name=name, tags=tags).info.run_id
    metrics = [
        Metric(metric, value, 2000 + 2000 * n, step)
        for metric, points in curves.items()
        for n, (step, value) in enumerate(points)
    ]
    client.log_batch(run_id, metrics=metrics, params=[Param(key, str(value)) for key, value in params.items()])
    client.set_terminated(run_id, status, end_time=90_000)
