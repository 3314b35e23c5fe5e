"""What each step trained and what happened to the run: JSON lines with one writer.

`ledger/attempt-<k>.jsonl` holds a line a step and a line an event, in the order they happened; an attempt is one start
of the worker group. A step's line says what was *trained*; it counts once a later committed checkpoint contains it.
"""

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from typing import IO, Any

from upath import UPath

from pipeline.storage import is_local


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step, the same at any world size (but for `world_size` and `time`)."""

    step: int
    """From 0."""
    world_size: int
    first_position: int
    """Position in the order of the data of the step's first sequence."""
    sequences: list[int]
    """Global indices into the packs, in position order."""
    token_hash: str
    """Hash of the sequences' hashes in position order, taken from the tensors given to the model."""
    loss: float
    """Mean loss per target token, nats."""
    target_tokens: int
    time: float
    """Unix time at the end of the step, seconds."""
    tokens: int = 0
    """Tokens of the step, targets or not."""
    seconds: float = 0.0
    """Wall time of the step."""
    learning_rate: float = 0.0
    gradient_norm: float = 0.0
    """Before clipping."""


@dataclass(frozen=True)
class Event:
    """Something that happened to the run: start, restore, checkpoint, evaluation, end, error …"""

    event: str
    step: int
    time: float = field(default_factory=time.time)
    details: dict[str, Any] = field(default_factory=dict)


def token_hash(hashes: Sequence[int]) -> str:
    """Hash of a step's per-sequence hashes, given in position order (hex, 32 characters)."""
    return sha256(b"".join(h.to_bytes(8, "little") for h in hashes)).hexdigest()[:32]


class LedgerWriter:
    """Appends to the ledger of one run, on a local file system. One instance at a time writes a run's ledger."""

    def __init__(self, run_folder: UPath) -> None:
        self.folder = run_folder / "ledger"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.attempt = _last_attempt(self.folder)
        self._file: IO[str] | None = None

    def start_attempt(self) -> int:
        """Begins the next attempt's file and returns its number, from 1."""
        self.close()
        self.attempt += 1
        path = self.folder / f"attempt-{self.attempt}.jsonl"
        self._file = path.open("x", encoding="utf-8")
        return self.attempt

    def write(self, line: StepRecord | Event) -> None:
        if self._file is None:
            raise RuntimeError("the ledger has no attempt yet: call start_attempt first")
        self._file.write(json.dumps(asdict(line)) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Returns when everything written so far is on disk; called before a checkpoint is committed."""
        if self._file is not None:
            self._file.flush()
            if is_local(self.folder):
                os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self.sync()
            self._file.close()
            self._file = None


def read_ledger(run_folder: UPath) -> Iterator[tuple[int, StepRecord | Event]]:
    """(attempt, line) of a run, in the order written. A last line cut by a crash is left out: it was never synced."""
    for attempt in range(1, _last_attempt(run_folder / "ledger") + 1):
        text = (run_folder / "ledger" / f"attempt-{attempt}.jsonl").read_text(encoding="utf-8")
        for line in text.splitlines(keepends=True):
            if line.endswith("\n"):
                values = json.loads(line)
                yield attempt, Event(**values) if "event" in values else StepRecord(**values)


def trained_steps(run_folder: UPath) -> dict[int, StepRecord]:
    """The last record of each step: where a step was redone after a restart, the one that a checkpoint can contain."""
    return {line.step: line for _, line in read_ledger(run_folder) if isinstance(line, StepRecord)}


def _last_attempt(folder: UPath) -> int:
    if not folder.exists():
        return 0
    numbers = [
        int(path.name.removeprefix("attempt-").removesuffix(".jsonl")) for path in folder.glob("attempt-*.jsonl")
    ]
    return max(numbers, default=0)
