"""What each step trained and what happened to the run: JSON lines with one writer.

`ledger/attempt-<k>.jsonl` (on object stores `attempt-<k>-part-<j>.jsonl`) holds a line a step and a line an event, in
the order they happened; an attempt is one start of the worker group. A step's line says what was *trained*; it counts
once a later committed checkpoint contains it.
"""

import json
import os
import re
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from typing import Any

from upath import UPath

from pipeline.storage import create_once, is_local, make_folder

ATTEMPT_FILE = re.compile(r"attempt-(\d+)(?:-part-(\d+))?\.jsonl")


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
    operations: float = 0.0
    """That the step needs, all workers together (see `longlora.flops`)."""
    peak_bytes: int = 0
    """Of GPU memory, of the worker that had most; 0 without GPUs."""
    parts: dict[str, float] = field(default_factory=dict)
    """Seconds of the first worker, by what they were for."""


@dataclass(frozen=True)
class Event:
    """Something that happened to the run: driver, workers, start, checkpoint, evaluation, failure, error, end …"""

    event: str
    step: int
    time: float = field(default_factory=time.time)
    details: dict[str, Any] = field(default_factory=dict)


def token_hash(hashes: Sequence[int]) -> str:
    """Hash of a step's per-sequence hashes, given in position order (hex, 32 characters)."""
    return sha256(b"".join(h.to_bytes(8, "little") for h in hashes)).hexdigest()[:32]


class LedgerWriter:
    """Appends to the ledger of one run. One instance at a time writes a run's ledger."""

    def __init__(self, run_folder: UPath) -> None:
        self.folder = run_folder / "ledger"
        make_folder(self.folder)
        self.attempt = newest_attempt(run_folder)
        self._file: _LocalFile | _Parts | None = None

    def start_attempt(self) -> int:
        """Begins the next attempt's file and returns its number, from 1."""
        self.close()
        self.attempt += 1
        self._file = (_LocalFile if is_local(self.folder) else _Parts)(self.folder, self.attempt)
        return self.attempt

    def write(self, line: StepRecord | Event) -> None:
        if self._file is None:
            raise RuntimeError("the ledger has no attempt yet: call start_attempt first")
        self._file.write(json.dumps(asdict(line)) + "\n")

    def sync(self) -> None:
        """Returns when everything written so far is on disk; called before a checkpoint is committed."""
        if self._file is not None:
            self._file.sync()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class _LocalFile:
    """`attempt-<k>.jsonl`, a line at a time."""

    def __init__(self, folder: UPath, attempt: int) -> None:
        self._file = (folder / f"attempt-{attempt}.jsonl").open("x", encoding="utf-8")

    def write(self, line: str) -> None:
        self._file.write(line)
        self._file.flush()

    def sync(self) -> None:
        self._file.flush()  # what a full disk has refused before is tried again, or refuses the commit
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self.sync()
        self._file.close()


class _Parts:
    """`attempt-<k>-part-<j>.jsonl`: object stores cannot append, so each sync puts what is new as an object."""

    def __init__(self, folder: UPath, attempt: int) -> None:
        self._folder, self._attempt, self._part = folder, attempt, 0
        self._writer = uuid.uuid4().hex
        self._lines: list[str] = []
        self._sent = 0
        """Lines of the part that is being put; after an error it may have arrived, so it is put again as it was."""
        self._put()  # empty: the number of the attempt is taken

    def write(self, line: str) -> None:
        self._lines.append(line)

    def sync(self) -> None:
        while self._lines:
            self._put()

    def close(self) -> None:
        self.sync()

    def _put(self) -> None:
        path = self._folder / f"attempt-{self._attempt}-part-{self._part}.jsonl"
        self._sent = self._sent or len(self._lines)
        if not create_once(path, "".join(self._lines[: self._sent]).encode(), writer=self._writer):
            raise RuntimeError(f"{path}: was written by another driver")
        del self._lines[: self._sent]
        self._part, self._sent = self._part + 1, 0


def newest_attempt(run_folder: UPath) -> int:
    """The number of the newest attempt that the ledger has, without reading it; 0 before the first."""
    return max(_files(run_folder / "ledger"), default=0)


def read_ledger(run_folder: UPath, newest_only: bool = False) -> Iterator[tuple[int, StepRecord | Event]]:
    """(attempt, line) of a run, or of its newest attempt, in the order written.

    A last line cut by a crash is left out: it was never synced.
    """
    for attempt, paths in sorted(_files(run_folder / "ledger").items())[-1 if newest_only else 0 :]:
        for text in (path.read_text(encoding="utf-8") for path in paths):
            for line in text.splitlines(keepends=True):
                if line.endswith("\n"):
                    values = json.loads(line)
                    yield attempt, Event(**values) if "event" in values else StepRecord(**values)


def _files(folder: UPath) -> dict[int, list[UPath]]:
    """The files of each attempt, parts in order."""
    found: dict[int, dict[int, UPath]] = defaultdict(dict)
    for path in folder.glob("attempt-*.jsonl"):
        match = ATTEMPT_FILE.fullmatch(path.name)
        if match:
            found[int(match[1])][int(match[2] or 0)] = path
    return {attempt: [parts[part] for part in sorted(parts)] for attempt, parts in found.items()}
