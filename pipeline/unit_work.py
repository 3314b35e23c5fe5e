"""Stages 1–3 of one unit of work, with nothing of Ray in them: documents → tokens → rows → a shard.

A unit is committed by its summary, written after its shard: what an interruption leaves is found and not made again.
"""

import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from pipeline.config import ConfigError
from pipeline.documents import Document, Unit, read_documents
from pipeline.packing import WINDOW_TOKENS, pack
from pipeline.packs import Row, ShardWriter, sha256
from pipeline.storage import is_local, read_json, sync_folder, write_json
from pipeline.tokens import Tokenizer, tokenise

TokenDocument = tuple[str, npt.NDArray[np.int32]]
"""A document's id and its token ids, (tokens,)."""

SKIPPED_SCHEMA = pa.schema([("document_id", pa.string()), ("reason", pa.string())])


def make_unit(row: dict[str, Any], folder: str, eos: int | None, row_length: int, text_column: str) -> dict[str, Any]:
    """The task of Ray Data: a unit in; out, its summary (JSON), or what is wrong with its files, in a line.

    row: {"unit": index, "description": `Unit.to_json()`}. Returns {"unit", "summary", "error"}.
    """
    unit = Unit.from_json(row["description"])
    result = {"unit": unit.index, "summary": "", "error": ""}
    try:
        work = _unit_work(folder, eos, row_length, text_column)
        result["summary"] = json.dumps(work.committed(unit) or work.make(unit))
    except ConfigError as error:
        result["error"] = str(error)
    except OSError as error:
        result["error"] = f"the shard cannot be written below run.storage ({' '.join(str(error).split())})"
    return result


@lru_cache(maxsize=1)  # a worker process does many units: it reads the tokenizer once
def _unit_work(folder: str, eos: int | None, row_length: int, text_column: str) -> "UnitWork":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a task has one CPU
    tokenizer = Tokenizer((UPath(folder) / "tokenizer.json").read_text(encoding="utf-8"), eos)
    return UnitWork(tokenizer, row_length, text_column, UPath(folder))


class UnitWork:
    """Tokenises and packs units of work into their shards: what a worker does."""

    def __init__(self, tokenizer: Tokenizer, row_length: int, text_column: str, folder: UPath):
        self.tokenizer = tokenizer
        self.row_length = row_length
        self.text_column = text_column
        self.folder = folder

    def committed(self, unit: Unit) -> dict[str, Any] | None:
        """The summary of a unit whose shard is there, whole; None if it has to be made."""
        try:
            summary = read_json(self.folder / f"units/{unit.index:05d}.json")
            return summary if sha256(self.folder / summary["name"]) == summary["sha256"] else None
        except FileNotFoundError:
            return None

    def make(self, unit: Unit) -> dict[str, Any]:
        """Writes the unit's shard and the list of its skipped documents, then its summary, which commits it."""
        name = f"shards/{unit.index:05d}.parquet"
        documents = UnitDocuments(unit, self.tokenizer, self.text_column)
        with tempfile.TemporaryDirectory(dir=self._scratch()) as scratch:
            shard = os.path.join(scratch, "shard.parquet")
            with ShardWriter(shard, self.row_length) as writer:
                for row in _rows(documents, self.row_length):
                    writer.write(row)
            summary = {
                "name": name,
                "rows": writer.rows,
                "tokens": writer.tokens,
                "target_tokens": writer.target_tokens,
                "bytes": os.path.getsize(shard),
                "sha256": sha256(UPath(shard)),
                "documents": documents.packed,
                "skipped": dict(sorted(Counter(reason for _, reason in documents.skipped).items())),
            }
            _place(shard, self.folder / name)
            if documents.skipped:
                listed = os.path.join(scratch, "skipped.parquet")
                pq.write_table(pa.table(list(zip(*documents.skipped, strict=True)), schema=SKIPPED_SCHEMA), listed)
                _place(listed, self.folder / f"units/{unit.index:05d}.skipped.parquet")
        write_json(self.folder / f"units/{unit.index:05d}.json", summary)
        return summary

    def _scratch(self) -> str | None:
        """Where a shard grows: on the disk of its final place, to be renamed; anywhere before an upload."""
        if not is_local(self.folder):
            return None
        scratch = self.folder / "scratch"
        scratch.mkdir(parents=True, exist_ok=True)
        return str(scratch)


class UnitDocuments:
    """The usable documents of a unit as (id, token ids); afterwards, how many they were and which others there were."""

    def __init__(self, unit: Unit, tokenizer: Tokenizer, text_column: str):
        self.packed = 0
        self.skipped: list[tuple[str, str]] = []
        self._unit = unit
        self._tokenizer = tokenizer
        self._text_column = text_column

    def __iter__(self) -> Iterator[TokenDocument]:
        for document, ids in tokenise(self._readable(), self._tokenizer):
            if len(ids) < 2:  # nothing to predict
                self.skipped.append((document.id, "too_short"))
            else:
                self.packed += 1
                yield document.id, ids

    def _readable(self) -> Iterator[Document]:
        for document in read_documents(self._unit.parts, self._text_column):
            if document.skip is None:
                yield document
            else:
                self.skipped.append((document.id, document.skip))


def _rows(documents: Iterable[TokenDocument], row_length: int) -> Iterator[Row]:
    """Packs documents window by window: at most WINDOW_TOKENS and one document are held."""
    window: list[TokenDocument] = []
    tokens = 0
    for document in documents:
        window.append(document)
        tokens += len(document[1])
        if tokens >= WINDOW_TOKENS:
            yield from _packed(window, row_length)
            window, tokens = [], 0
    yield from _packed(window, row_length)


def _packed(documents: list[TokenDocument], row_length: int) -> Iterator[Row]:
    for pieces in pack([len(ids) for _, ids in documents], row_length):
        ids = [documents[piece.document][1][piece.start : piece.start + piece.length] for piece in pieces]
        lengths = tuple(piece.length for piece in pieces)
        yield Row(np.concatenate(ids), lengths, tuple(documents[piece.document][0] for piece in pieces))


def _place(file: str, target: UPath) -> None:
    """Moves a finished local file to its place: all of it, durably, or nothing."""
    if not is_local(target):
        target.fs.put_file(file, target.path)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "rb") as written:
        os.fsync(written.fileno())
    os.replace(file, target.path)
    sync_folder(target.parent)
