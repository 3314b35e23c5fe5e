"""Stages 1–3: documents → packs, once, streaming through Ray Data.

The data set that Ray sees is a list of units of work. A worker tokenises and packs a unit and writes its shard; only
its summary comes back. What is committed stays: a unit by its summary, the packs by their manifest.
"""

import hashlib
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from pipeline.config import Config, ConfigError, local_path
from pipeline.documents import Document, Source, Unit, cut_units, find_sources, read_documents
from pipeline.packing import POLICY, WINDOW_TOKENS, pack
from pipeline.packs import FORMAT, Packs, Row, ShardWriter, sha256
from pipeline.storage import is_local, read_json, remove_tree, storage_root, sync_folder, write_atomic, write_json
from pipeline.tokens import Tokenizer, tokenise

TokenDocument = tuple[str, npt.NDArray[np.int32]]
"""A document's id and its token ids, (tokens,)."""

SKIPPED_SCHEMA = pa.schema([("document_id", pa.string()), ("reason", pa.string())])


@dataclass(frozen=True)
class PreparedPacks:
    """Folders of the packs."""

    train: UPath
    validation: UPath | None


def prepare(config: Config) -> PreparedPacks:
    """Makes the packs of `data.train` and `data.validation`, or finds them made. Needs a connection to Ray.

    Raises ConfigError for documents or a tokenizer that cannot be used.
    """
    tokenizer = Tokenizer.load(config)
    train = _prepare(config, tokenizer, config.data.train, "data.train")
    validation = config.data.validation
    return PreparedPacks(train, _prepare(config, tokenizer, validation, "data.validation") if validation else None)


def _prepare(config: Config, tokenizer: Tokenizer, entries: list[str], key: str) -> UPath:
    sources = find_sources([local_path(entry) for entry in entries], key)
    content = _content(config, tokenizer, sources)
    fingerprint = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    folder = storage_root(config) / "packs" / fingerprint
    if (folder / "manifest.json").exists():
        packs = _whole(folder)
        if packs is not None:
            print(f"{key}: packs {fingerprint} are ready, {packs.count} sequences", flush=True)
            return folder
    units = cut_units(sources, config.data.unit_mb * 10**6, config.data.text_column, key)
    print(f"{key}: {len(sources)} files, {len(units)} units of work → {folder}", flush=True)
    write_atomic(folder / "tokenizer.json", tokenizer.definition.encode())
    summaries = _pack_units(units, (str(folder), tokenizer.eos, config.context.length, config.data.text_column), key)
    _commit(folder, {"fingerprint": fingerprint, **content}, summaries, key)
    return folder


def _whole(folder: UPath) -> Packs | None:
    """The packs, or None where a shard is missing or cut off and has to be made again."""
    try:
        return Packs.open(folder)
    except ConfigError as error:
        print(f"{error}", flush=True)
        return None


def _content(config: Config, tokenizer: Tokenizer, sources: list[Source]) -> dict[str, Any]:
    """What decides the packs, and nothing else: no absolute path, no size of a cluster."""
    return {
        "format": FORMAT,
        "tokenizer": hashlib.sha256(json.dumps(tokenizer.identity(), sort_keys=True).encode()).hexdigest(),
        "sequence_length": config.context.length,
        "packing": POLICY,
        "unit_mb": config.data.unit_mb,
        "text_column": config.data.text_column,
        "sources": [source.identity() for source in sources],
    }


def _pack_units(units: list[Unit], work: tuple[str, int | None, int, str], key: str) -> list[dict[str, Any]]:
    """The summaries of all units, in order. Ray Data spreads the units over the cluster's CPUs."""
    import ray

    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = sys.stderr.isatty()
    context.print_on_execution_start = False
    cpus = int(ray.available_resources().get("CPU", 1))
    actors = ray.data.ActorPoolStrategy(
        min_size=1, max_size=len(units), initial_size=max(1, min(cpus, len(units))), max_tasks_in_flight_per_actor=1
    )
    summaries: dict[int, dict[str, Any]] = {}
    with ray.data.DataContext.current(context):
        table = [{"unit": unit.index, "description": unit.to_json()} for unit in units]
        results = ray.data.from_items(table, override_num_blocks=len(table)).map_batches(
            UnitActor,
            fn_constructor_args=work,
            batch_size=1,
            num_cpus=1,
            compute=actors,
        )
        for result in results.iter_rows():
            if result["error"]:
                raise ConfigError(f"{key}: {result['error']}")
            summaries[result["unit"]] = json.loads(result["summary"])
            tokens = sum(summary["tokens"] for summary in summaries.values())
            print(f"{key}: {len(summaries)} of {len(units)} units, {tokens:,} tokens", flush=True)
    return [summaries[unit.index] for unit in units]


def _commit(folder: UPath, content: dict[str, Any], summaries: list[dict[str, Any]], key: str) -> None:
    """Writes skipped.parquet and the manifest, which commits the packs."""
    skipped = Counter[str]()
    shards, first = [], 0
    for summary in summaries:
        skipped.update(summary["skipped"])
        names = ("name", "rows", "tokens", "target_tokens", "bytes", "sha256")
        shards.append({**{name: summary[name] for name in names}, "first_sequence": first})
        first += summary["rows"]
    packed = sum(summary["documents"] for summary in summaries)
    counts = {"read": packed + skipped.total(), "packed": packed, "skipped": dict(sorted(skipped.items()))}
    if first == 0:
        remove_tree(folder)
        reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(skipped.items())) or "no document"
        raise ConfigError(f"{key}: nothing to train on in {counts['read']} documents ({reasons})")
    _write_skipped(folder)
    totals = {name: sum(shard[name] for shard in shards) for name in ("tokens", "target_tokens")}
    write_json(
        folder / "manifest.json", {**content, "sequences": first, **totals, "documents": counts, "shards": shards}
    )
    if (folder / "scratch").exists():
        remove_tree(folder / "scratch")
    print(f"{key}: {first} sequences, {totals['tokens']:,} tokens, documents {counts}", flush=True)


def _write_skipped(folder: UPath) -> None:
    """Joins the units' lists of skipped documents, in order."""
    parts = sorted((folder / "units").glob("*.skipped.parquet"), key=str)
    with tempfile.TemporaryDirectory() as scratch:
        path = os.path.join(scratch, "skipped.parquet")
        with pq.ParquetWriter(path, SKIPPED_SCHEMA) as file:
            for part in parts:
                with part.fs.open(part.path, "rb") as source:
                    file.write_table(pq.read_table(source))
        write_atomic(folder / "skipped.parquet", UPath(path).read_bytes())


class UnitActor:
    """Ray Data's stage: one row is a unit in, its summary, or what is wrong with its files, out."""

    def __init__(self, folder: str, eos: int | None, row_length: int, text_column: str):
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # an actor has one CPU
        tokenizer = Tokenizer((UPath(folder) / "tokenizer.json").read_text(encoding="utf-8"), eos)
        self._work = UnitWork(tokenizer, row_length, text_column, UPath(folder))

    def __call__(self, batch: dict[str, npt.NDArray[Any]]) -> dict[str, list[Any]]:
        unit = Unit.from_json(str(batch["description"][0]))
        try:
            summary = self._work.committed(unit) or self._work.make(unit)
        except ConfigError as error:
            return {"unit": [unit.index], "summary": [""], "error": [str(error)]}
        except OSError as error:
            reason = f"the shard cannot be written below run.storage ({' '.join(str(error).split())})"
            return {"unit": [unit.index], "summary": [""], "error": [reason]}
        return {"unit": [unit.index], "summary": [json.dumps(summary)], "error": [""]}


class UnitWork:
    """Tokenises and packs units of work into their shards: what the workers do, with nothing of Ray in it."""

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
