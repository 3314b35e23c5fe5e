"""A run goes on where it stopped, at any number of workers, with the same data and the same losses."""

from collections.abc import Callable
from itertools import pairwise

import pytest

from pipeline import checkpoints

# Each run starts Ray, DeepSpeed and two workers: minutes on two cores, and a test has up to four of them.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ONE_WORKER = ("workers.min=1", "workers.max=1")
STEPS = 200  # workers notice after a second or more that their driver was killed; a step takes 50 ms
LONG = {"optimization": {"steps": STEPS, "learning_rate": 1e-3}, "checkpoint": {"every_steps": 10}}


DROPOUT = {"adapter": {"rank": 4, "dropout": 0.1}, "optimization": {**LONG["optimization"], "micro_batch": 1}}


@pytest.mark.parametrize("different", [DROPOUT, {"workers": {"zero_stage": 3}}], ids=["ZeRO-2, dropout", "ZeRO-3"])
def test_killed_and_resumed_at_other_world_sizes(make_run: Callable, different: dict[str, dict[str, object]]) -> None:
    settings = LONG | different
    undisturbed = make_run("undisturbed", **settings)
    undisturbed.finish("train")
    expected = {record.step: record for record in undisturbed.records()}
    assert sorted(expected) == list(range(STEPS))

    run = make_run("disturbed", **settings)
    run.kill_after_step(12, "train")
    restored = checkpoints.newest(run.folder)
    first_redone = checkpoints.read_state(restored).step if restored else 0
    before = len(run.records())
    run.kill_after_step(first_redone + 15, "train", *ONE_WORKER)
    run.finish("train")

    records = run.records()
    assert records[before].step == first_redone
    assert {record.world_size for record in records} == {1, 2}
    for record in records:
        same = expected[record.step]
        assert (record.sequences, record.token_hash) == (same.sequences, same.token_hash)
        # The order of summation differs with the number of workers, and with nothing else.
        tolerance = 0.0 if record.world_size == 2 and record.step <= first_redone else 1e-5
        assert record.loss == pytest.approx(same.loss, rel=tolerance, abs=0.0)
    assert records[-1].step == STEPS - 1
    assert checkpoints.newest(run.folder) == run.folder / "checkpoints" / f"step-{STEPS}"


def test_the_same_command_repeats_steps_identically_and_does_nothing_when_done(make_run: Callable) -> None:
    settings = {**LONG, "attention": {"group_size": None, "full_last": 0.0}}
    undisturbed = make_run("undisturbed", **settings)
    undisturbed.finish("train")
    run = make_run("disturbed", **settings)
    run.kill_after_step(15, "train")
    run.finish("train")
    expected = {record.step: record.loss for record in undisturbed.records()}
    assert [expected[record.step] for record in run.records()] == [record.loss for record in run.records()]
    redone = [(a.step, b.step) for a, b in pairwise(run.records()) if b.step <= a.step]
    assert len(redone) == 1, "one restart redoes steps once"

    before = len(run.records())
    run.finish("train")
    assert len(run.records()) == before


def test_a_changed_setting_is_refused_and_named(make_run: Callable) -> None:
    run = make_run("run", optimization={"steps": 3})
    run.finish("train")
    process = run.start("train", "adapter.rank=8")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "was started with other settings: adapter.rank: 4 → 8;" in output
