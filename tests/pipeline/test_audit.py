"""An audit finds what was done to a run's records, and nothing where nothing was."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from upath import UPath

from pipeline.audit import Audit, audit
from pipeline.audit_report import audit_json, audit_table, timeline_plot
from pipeline.ledger import Event, LedgerWriter, StepRecord, read_ledger, token_hash
from pipeline.order import positions_of_step, sequences_at
from pipeline.packs import Row, row_hash

SEED, BATCH, COUNT = 3, 4, 10  # the order goes through its end in the third step


class MemoryPacks:
    """The part of Packs that an audit uses."""

    count = COUNT

    def row(self, sequence: int) -> Row:
        return Row(np.arange(5, dtype=np.int32) + 7 * sequence, (2, 3), ("a", "b"))


def record(step: int, world_size: int = 2) -> StepRecord:
    packs, positions = MemoryPacks(), positions_of_step(step, BATCH)
    sequences = sequences_at(positions, SEED, COUNT)
    rows = [packs.row(sequence) for sequence in sequences]
    return StepRecord(
        step=step,
        world_size=world_size,
        first_position=positions.start,
        sequences=sequences,
        token_hash=token_hash([row_hash(row.input_ids, row.document_lengths) for row in rows]),
        loss=2.0,
        target_tokens=12,
        time=100.0 + step,
        seconds=1.0,
    )


Change = Callable[[StepRecord], StepRecord]


def run(folder: Path, attempts: list[list[int]], committed: int, change: dict[int, Change] | None = None) -> Audit:
    """A run whose attempts trained these steps, the records of the last attempt changed as asked."""
    writer = LedgerWriter(UPath(folder))
    for number, steps in enumerate(attempts, 1):
        writer.start_attempt()
        writer.write(Event("start", steps[0], time=99.0 + steps[0], details={"world_size": 2}))
        for step in steps:
            changed = (change or {}).get(step) if number == len(attempts) else None
            writer.write(changed(record(step)) if changed else record(step))
    writer.close()
    return audit(UPath(folder), MemoryPacks(), SEED, BATCH, committed)


def test_an_undisturbed_run_is_whole(tmp_path: Path) -> None:
    result = run(tmp_path, [[0, 1, 2, 3, 4]], committed=5)
    assert result.whole
    assert (result.sequences, result.attempts, result.redone) == (20, 1, 0)


def test_steps_that_were_redone_count_once(tmp_path: Path) -> None:
    result = run(tmp_path, [[0, 1, 2, 3], [2, 3, 4, 5], [1, 2, 3, 4, 5, 6]], committed=6)
    assert result.whole
    assert (result.sequences, result.attempts, result.redone) == (24, 3, 7)


def test_what_is_not_committed_is_neither_lost_nor_trained(tmp_path: Path) -> None:
    result = run(tmp_path, [[0, 1, 2, 3]], committed=2)
    assert result.whole
    assert result.sequences == 8


def test_a_step_without_a_record_is_lost(tmp_path: Path) -> None:
    result = run(tmp_path, [[0, 1, 3]], committed=4)
    assert (result.lost, result.whole) == ([2], False)
    assert run(tmp_path / "short", [[0, 1]], committed=3).lost == [2]


def test_two_drivers_on_one_run_double_its_steps(tmp_path: Path) -> None:
    """The second goes on from step 3 while the first one still writes."""
    result = run(tmp_path, [[0, 1, 2], [3, 4, 3, 4]], committed=5)
    assert (result.doubled, result.whole) == ([3, 4], False)


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        (lambda r: replace(r, sequences=r.sequences[::-1]), "misordered"),
        (lambda r: replace(r, first_position=r.first_position + 1), "misordered"),
        (lambda r: replace(r, token_hash="0" * 32), "changed"),
    ],
)
def test_a_changed_step_is_found(tmp_path: Path, change: Change, finding: str) -> None:
    result = run(tmp_path, [[0, 1, 2, 3]], committed=4, change={2: change})
    assert 2 in getattr(result, finding)
    assert not result.whole and not result.lost and not result.doubled


def test_the_world_size_changes_nothing(tmp_path: Path) -> None:
    assert run(tmp_path, [[0, 1, 2]], 3, {step: lambda r: replace(r, world_size=5) for step in range(3)}).whole


def test_its_report_is_json_and_its_plot_a_picture(tmp_path: Path) -> None:
    from rich.console import Console

    result = run(tmp_path, [[0, 1, 2], [1, 2, 3]], committed=4)
    values = json.loads(json.dumps(audit_json(result)))
    assert values["whole"] and values["redone"] == 2 and len(values["recoveries"]) == 1
    console = Console(record=True, width=120)
    console.print(audit_table(result))
    assert "16 sequences, 2 attempts" in console.export_text()
    lines = [line for _, line in read_ledger(UPath(tmp_path))]
    assert timeline_plot(lines, {1}).startswith(b"\x89PNG")
