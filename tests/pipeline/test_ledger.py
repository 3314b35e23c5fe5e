import resource
from dataclasses import replace

import pytest
from object_store import ObjectStore
from upath import UPath

from pipeline.ledger import Event, LedgerWriter, StepRecord, read_ledger, token_hash

RECORD = StepRecord(
    step=0,
    world_size=2,
    first_position=0,
    sequences=[3, 1],
    token_hash=token_hash([7, 9]),
    loss=2.5,
    target_tokens=62,
    time=1.0,
)


def test_lines_read_back_in_order_with_their_attempt(tmp_path: object) -> None:
    writer = LedgerWriter(UPath(tmp_path))
    assert writer.start_attempt() == 1
    writer.write(Event("start", 0, time=1.0, details={"world_size": 2}))
    writer.write(RECORD)
    assert writer.start_attempt() == 2
    writer.write(replace(RECORD, loss=2.25))
    writer.close()
    lines = list(read_ledger(UPath(tmp_path)))
    assert [attempt for attempt, _ in lines] == [1, 1, 2]
    assert lines[1][1] == RECORD
    assert lines[2][1] == replace(RECORD, loss=2.25)


def test_a_line_that_the_disk_refused_refuses_the_commit_until_it_is_written(tmp_path: object) -> None:
    writer = LedgerWriter(UPath(tmp_path))
    writer.start_attempt()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))  # as a full disk: the kernel takes 20 bytes
    try:
        with pytest.raises(OSError, match="too large"):
            writer.write(RECORD)
        with pytest.raises(OSError, match="too large"):
            writer.sync()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    writer.sync()
    assert [line for _, line in read_ledger(UPath(tmp_path))] == [RECORD]


def test_a_new_writer_goes_on_with_the_next_attempt(tmp_path: object) -> None:
    for expected in (1, 2, 3):
        writer = LedgerWriter(UPath(tmp_path))
        assert writer.start_attempt() == expected
        writer.close()


def test_a_line_cut_by_a_crash_is_left_out(tmp_path: object) -> None:
    writer = LedgerWriter(UPath(tmp_path))
    writer.start_attempt()
    writer.write(RECORD)
    writer.close()
    path = UPath(tmp_path) / "ledger" / "attempt-1.jsonl"
    path.write_text(path.read_text() + '{"step": 1, "wor')
    assert [line for _, line in read_ledger(UPath(tmp_path))] == [RECORD]


def test_writing_before_an_attempt_is_refused(tmp_path: object) -> None:
    with pytest.raises(RuntimeError, match="start_attempt"):
        LedgerWriter(UPath(tmp_path)).write(RECORD)


def test_the_token_hash_knows_content_and_order() -> None:
    assert token_hash([7, 9]) != token_hash([9, 7])
    assert token_hash([7, 9]) != token_hash([7, 8])
    assert token_hash([7, 9]) == token_hash([7, 9])


def test_on_an_object_store_what_is_synced_is_there(bucket: UPath) -> None:
    run = bucket / "runs" / "run"
    writer = LedgerWriter(run)
    writer.start_attempt()
    for step in range(12):
        writer.write(replace(RECORD, step=step))
        writer.sync()
    writer.write(replace(RECORD, step=12))  # never synced: the driver is killed here
    again = LedgerWriter(run)
    assert again.start_attempt() == 2
    again.write(Event("start", 12, time=1.0))
    again.close()
    lines = list(read_ledger(run))
    assert [(attempt, line.step) for attempt, line in lines] == [*((1, step) for step in range(12)), (2, 12)]


def test_two_writers_of_one_attempt_on_an_object_store_do_not_mix(bucket: UPath) -> None:
    first, second = LedgerWriter(bucket / "run"), LedgerWriter(bucket / "run")
    first.start_attempt()
    with pytest.raises(RuntimeError, match="written by another driver"):
        second.start_attempt()


@pytest.mark.parametrize("arrived", [True, False])
def test_lines_whose_put_failed_are_put_once(arrived: bool, store: ObjectStore, bucket: UPath) -> None:
    writer = LedgerWriter(bucket / "run")
    writer.start_attempt()
    writer.write(replace(RECORD, step=0))
    store.fail(status=403, code="AccessDenied", method="PUT", done=arrived)
    with pytest.raises(PermissionError):
        writer.sync()
    writer.write(replace(RECORD, step=1))
    writer.sync()
    assert [line.step for _, line in read_ledger(bucket / "run")] == [0, 1]
