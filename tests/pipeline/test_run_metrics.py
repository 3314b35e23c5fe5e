from dataclasses import replace

from pipeline.ledger import Event, StepRecord
from pipeline.run_metrics import Point, RunMetrics, goodput_so_far


def record(step: int, loss: float = 2.0, world_size: int = 2) -> StepRecord:
    return StepRecord(
        step=step,
        world_size=world_size,
        first_position=2 * step,
        sequences=[0, 1],
        token_hash="00",
        loss=loss,
        target_tokens=190,
        time=10.0 + step,
        tokens=200,
        seconds=4.0,
        learning_rate=1e-3,
        gradient_norm=0.5,
    )


def start(step: int, world_size: int) -> Event:
    return Event("start", step, details={"world_size": world_size})


def test_a_step_has_these_metrics_against_steps_and_tokens() -> None:
    metrics = RunMetrics(tokens_per_step=200)
    metrics.take(1, start(0, 2))
    trained = {
        "train/loss": 2.0,
        "train/learning_rate": 1e-3,
        "train/gradient_norm": 0.5,
        "train/tokens_per_second": 50.0,
        "train/world_size": 2,
    }
    assert metrics.take(1, record(3)) == [
        *(Point(name, 3, value, 13.0) for name, value in trained.items()),
        Point("run/disturbances", 3, 0, 13.0),
        Point("run/attempt", 3, 1, 13.0),
        *(Point(f"{name}_by_tokens", 800, value, 13.0) for name, value in trained.items()),
    ]


def test_performance_of_a_step() -> None:
    """Operations of both workers over time and workers; MFU where the GPU's rate is known."""
    measured = replace(record(0), operations=16e12, peak_bytes=3 * 2**30, parts={"feed": 0.25, "gradients": 3.5})
    for details, mfu in (({}, {}), ({"peak_rate": None}, {}), ({"peak_rate": 8e12}, {"train/mfu": 0.25})):
        metrics = RunMetrics(tokens_per_step=200)
        metrics.take(1, Event("start", 0, details={"world_size": 2, **details}))
        points = {point.metric: point.value for point in metrics.take(1, measured)}
        told = {"train/tflops_per_worker": 2.0, "train/peak_memory_gib": 3.0, **mfu}
        told |= {"train/seconds_feed": 0.25, "train/seconds_gradients": 3.5}
        assert told.items() <= points.items()
        assert ("train/mfu" in points) == bool(mfu)
        assert not any(name.startswith(("train/mfu", "train/seconds")) and "by_tokens" in name for name in points)


def test_the_first_record_of_a_step_counts() -> None:
    metrics = RunMetrics(tokens_per_step=200)
    losses = []
    for attempt, first, world_size in ((1, 0, 2), (2, 1, 3)):
        metrics.take(attempt, start(first, world_size))
        for step in range(first, first + 3):
            points = metrics.take(attempt, record(step, loss=attempt, world_size=world_size))
            losses += [(point.step, point.value) for point in points if point.metric == "train/loss"]
    assert losses == [(0, 1), (1, 1), (2, 1), (3, 2)]


def test_a_validation_counts_once_too() -> None:
    metrics = RunMetrics(tokens_per_step=200)
    evaluation = Event("evaluation", 4, time=5.0, details={"loss": 2.5, "tokens": 1000, "seconds": 1.0})
    assert metrics.take(1, evaluation) == [Point("eval/loss", 4, 2.5, 5.0), Point("eval/loss_by_tokens", 800, 2.5, 5.0)]
    assert metrics.take(2, evaluation) == []


def test_disturbances_are_counted_and_named() -> None:
    metrics = RunMetrics(tokens_per_step=200)
    assert metrics.tags() == {}
    for event in ("driver", "workers"):  # how every run begins
        metrics.take(1, Event(event, 0))
    metrics.take(1, start(0, 2))
    assert metrics.tags() == {
        "longlora.disturbances": "0",
        "longlora.attempts": "1",
        "longlora.world_size": "2",
    }
    for event in ("failure", "notice", "resize", "failure", "driver"):
        metrics.take(1, Event(event, 5))
    metrics.take(2, start(3, 4))
    points = metrics.take(2, record(5, world_size=4))
    assert [point.value for point in points if point.metric == "run/disturbances"] == [5]
    assert [point.value for point in points if point.metric == "run/attempt"] == [2]
    assert metrics.tags() == {
        "longlora.disturbances": "5: 2 failure, 1 notice, 1 resize, 1 driver restart",
        "longlora.attempts": "2",
        "longlora.world_size": "4",
    }


def test_the_status_is_the_last_that_the_ledger_tells() -> None:
    metrics = RunMetrics(tokens_per_step=200)
    assert metrics.status is None
    metrics.take(1, start(0, 2))
    assert metrics.status == "RUNNING"
    metrics.take(1, Event("end", 4, time=20.0, details={"status": "FAILED"}))
    assert (metrics.status, metrics.ended) == ("FAILED", 20.0)
    metrics.take(2, start(4, 2))
    assert metrics.status == "RUNNING"


def sample(time: float, node: int = 0, nodes: int = 1) -> Event:
    return Event("system", 3, time, {"node": node, "nodes": nodes, "values": {"cpu_utilization_percentage": 35.0}})


def test_samples_have_mlflows_names_at_the_second_in_which_they_were_told() -> None:
    metrics = RunMetrics(tokens_per_step=200)
    metrics.take(1, Event("driver", 0, 100.0))
    name = "cpu_utilization_percentage"
    assert metrics.take(1, sample(112.5)) == [Point(f"system/{name}", 12, 35.0, 112.5)]
    assert metrics.take(1, sample(112.6)) == [Point(f"system/{name}", 13, 35.0, 112.6)], "none is another's"
    for node in range(2):  # of a second attempt, on more nodes
        assert metrics.take(2, sample(150.0, node, 2)) == [Point(f"system/{node}/{name}", 50, 35.0, 150.0)]
    assert metrics.take(3, sample(90.0)) == [Point(f"system/{name}", 14, 35.0, 90.0)], "of a driver whose clock is late"


def test_the_packs_of_all_attempts_are_known() -> None:
    metrics = RunMetrics(tokens_per_step=200)
    metrics.take(1, start(0, 2))  # of an earlier version
    assert metrics.packs == {}
    for fingerprint in ("0a", "0a", "1b"):
        metrics.take(
            1, Event("start", 0, 1.0, {"world_size": 2, "packs": {"validation": {"fingerprint": fingerprint}}})
        )
    assert list(metrics.packs) == [("validation", "0a"), ("validation", "1b")]


def test_goodput_is_that_of_the_committed_steps() -> None:
    lines = [
        Event("driver", 0, 0.0),
        start(0, 2),
        *(record(step) for step in range(4)),  # 4 s each, until 10 … 13 s
        Event("checkpoint", 2, 13.0, {"seconds": 0.0}),
        sample(13.5),
        Event("end", 4, 20.0, {"status": "KILLED"}),
    ]
    lines[1] = Event("start", 0, 6.0, {"world_size": 2})
    assert goodput_so_far([(1, line) for line in lines]) == Point("run/goodput", 2, 5 / 20, 20.0)
