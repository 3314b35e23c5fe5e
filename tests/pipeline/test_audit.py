"""An audit finds what was done to a run's records, and nothing where nothing was."""

import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from upath import UPath

from pipeline.audit import Audit, audit
from pipeline.audit_report import audit_json, audit_table, timeline_plot
from pipeline.lease import Holder, Lease
from pipeline.ledger import Event, LedgerWriter, StepRecord, read_ledger, token_hash
from pipeline.main import main
from pipeline.order import positions_of_step, sequences_at
from pipeline.packs import Row, ShardWriter, row_hash, sha256
from pipeline.storage import write_atomic, write_json

SEED, BATCH, COUNT = 3, 4, 10  # the order goes through its end in the third step


class MemoryPacks:
    """The part of Packs that an audit uses."""

    count = COUNT

    def row(self, sequence: int) -> Row:
        return Row(np.arange(5, dtype=np.int32) + 7 * sequence, (2, 3), ("a", "b"))


def record(step: int, seed: int = SEED, batch: int = BATCH) -> StepRecord:
    packs, positions = MemoryPacks(), positions_of_step(step, batch)
    sequences = sequences_at(positions, seed, COUNT)
    rows = [packs.row(sequence) for sequence in sequences]
    return StepRecord(
        step=step,
        world_size=2,
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
    assert (result.sequences, result.attempts, result.trained, result.redone) == (24, 3, 14, 7)


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
    assert values["recovery_percentiles"]["seconds"] == dict.fromkeys(
        ("p50", "p95"), values["recoveries"][0]["seconds"]
    )
    assert 0 < values["goodput_at_one_disturbance_an_hour"] <= 1
    console = Console(record=True, width=120)
    console.print(audit_table(result))
    text = console.export_text()
    assert "16 sequences, 2 attempts" in text and "p95 of all" in text and "at one an hour, goodput would be" in text
    lines = [line for _, line in read_ledger(UPath(tmp_path))]
    assert timeline_plot(lines, {1}).startswith(b"\x89PNG")


# The command, on the folder of a run.


def write_packs(folder: UPath, rows: list[Row]) -> None:
    """One shard with these rows, in place of what was there."""
    shard = folder / "shards" / "00000.parquet"
    with tempfile.NamedTemporaryFile() as local:
        with ShardWriter(local.name, 5) as writer:
            for row in rows:
                writer.write(row)
        write_atomic(shard, Path(local.name).read_bytes())
    entry = {"name": "shards/00000.parquet", "rows": len(rows), "first_sequence": 0, "sha256": sha256(shard)}
    entry["bytes"] = shard.stat().st_size
    manifest = {"format": 1, "fingerprint": folder.name, "sequences": len(rows), "sequence_length": 5}
    write_json(folder / "manifest.json", {**manifest, "shards": [entry]})


@pytest.fixture
def make_trained(make_run: Callable) -> Callable[..., UPath]:
    """make_trained(storage=None) → folder of a run of 10 committed steps, with its ledger, and its packs beside it."""

    def make(storage: str | None = None) -> UPath:
        config, folder = make_run(storage=storage)
        write_packs(folder.parent / "packs" / "packs", [MemoryPacks().row(sequence) for sequence in range(COUNT)])
        writer = LedgerWriter(folder)
        writer.start_attempt()
        writer.write(Event("start", 0, time=99.0, details={"world_size": 2}))
        for step in range(10):
            writer.write(record(step, config.run.seed, config.optimization.global_batch))
        writer.close()
        return folder

    return make


def audit_of(folder: UPath, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    """Exit code and findings of `audit RUN_DIR --json`, which prints nothing else."""
    status = main(["audit", str(folder), "--json"])
    return status, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("storage", [None, "memory://audited"])
def test_a_run_is_audited_by_its_folder(
    make_trained: Callable, storage: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_trained(storage)
    status, values = audit_of(folder, capsys)
    assert (status, values["whole"], values["committed"], values["sequences"]) == (0, True, 10, 20)
    assert json.loads((folder / "audit" / "audit.json").read_bytes()) == values
    assert main(["audit", str(folder)]) == 0
    assert "20 sequences, 1 attempts" in capsys.readouterr().out


def test_or_by_its_config(make_trained: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(make_trained() / "config.yaml")
    assert main(["audit", "--config", config]) == 0
    assert main(["audit", "run.name=other", "--config", config]) == 2
    assert "other: has no checkpoint" in capsys.readouterr().err


def test_a_run_whose_storage_was_moved_is_audited_where_it_is(
    make_trained: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_trained()
    moved = shutil.move(folder.parent, tmp_path / "elsewhere")
    assert audit_of(UPath(moved) / folder.name, capsys)[0] == 0
    assert not folder.parent.exists()


def test_one_changed_token_of_the_packs_is_found(
    make_trained: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_trained()
    rows = [MemoryPacks().row(sequence) for sequence in range(COUNT)]
    rows[6].input_ids[3] += 1
    write_packs(folder.parent / "packs" / "packs", rows)
    status, values = audit_of(folder, capsys)
    trained_it = [step for step in range(10) if 6 in record(step, 0, 2).sequences]
    assert (status, values["whole"], values["changed"]) == (1, False, trained_it)
    assert len(trained_it) == 2, "20 sequences are two epochs"


Lines = list[dict[str, Any]]


@pytest.mark.parametrize(
    ("finding", "change"),
    [
        ("changed", lambda lines: lines[4].update(token_hash="0" * 32)),
        ("lost", lambda lines: lines.pop(4)),
        ("doubled", lambda lines: lines.insert(4, lines[4])),
        ("misordered", lambda lines: lines[4]["sequences"].reverse()),
    ],
)
def test_one_changed_line_of_the_ledger_is_found(
    make_trained: Callable, finding: str, change: Callable[[Lines], object], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_trained()
    file = folder / "ledger" / "attempt-1.jsonl"
    start, *steps = [json.loads(line) for line in file.read_text().splitlines()]
    change(steps)
    file.write_text("".join(json.dumps(line) + "\n" for line in [start, *steps]))
    status, values = audit_of(folder, capsys)
    assert (status, values["whole"], values[finding]) == (1, False, [4])


def test_a_run_that_goes_on_is_audited_and_said_to_go_on(
    make_trained: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_trained()
    lease = Lease(folder, Holder.here(os.getpid()))
    writer = LedgerWriter(folder)
    writer.start_attempt()
    writer.write(Event("start", 10, time=110.0, details={"world_size": 2}))
    writer.write(record(10, 0, 2))  # not committed
    status, values = audit_of(folder, capsys)
    assert (status, values["committed"], values["trained"]) == (0, 10, 11)
    assert values["holder"] == f"process {os.getpid()} on {socket.gethostname()}"
    assert main(["audit", str(folder)]) == 0
    assert "is working on this run" in capsys.readouterr().out
    lease.release()
    writer.close()
    assert audit_of(folder, capsys)[1]["holder"] == ""


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["{run}/checkpoints"], "checkpoints: is no run folder, it has no config.yaml"),
        (["{run}", "--config", "x.yaml"], "leave out --config"),
        (["{run}", "run.seed=1"], "leave out --config and other settings"),
    ],
)
def test_what_cannot_be_audited_is_one_line(
    make_run: Callable, arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = make_run()
    capsys.readouterr()
    assert main(["audit", *(text.replace("{run}", str(folder)) for text in arguments)]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and named in line


def test_a_run_without_a_ledger_is_refused(make_run: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    _, folder = make_run()
    assert main(["audit", str(folder)]) == 2
    assert "has no ledger, so nothing says what its step-10 was trained on" in capsys.readouterr().err
