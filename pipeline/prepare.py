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
from collections.abc import Iterator
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
    work = UnitWork(tokenizer, config.context.length, config.data.text_column, folder)
    summaries = _pack_units(units, work, key)
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


def _pack_units(units: list[Unit], work: "UnitWork", key: str) -> list[dict[str, Any]]:
    """The summaries of all units, in order. Ray Data spreads the units over the cluster's CPUs."""
    import ray

    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = sys.stderr.isatty()
    context.print_on_execution_start = False
    with ray.data.DataContext.current(context):
        table = [{"unit": unit.index, "description": unit.to_json()} for unit in units]
        results = ray.data.from_items(table, override_num_blocks=len(table)).map_batches(
            UnitActor,
            fn_constructor_args=(
                work.tokenizer.definition,
                work.tokenizer.eos,
                work.row_length,
                work.text_column,
                str(work.folder),
            ),
            batch_size=1,
            num_cpus=1,
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=len(units)),
        )
        summaries: dict[int, dict[str, Any]] = {}
        for result in results.iter_rows():
            if result["error"]:
                raise ConfigError(f"{key}: {result['error']}")
            summary = summaries[result["unit"]] = json.loads(result["summary"])
            print(
                f"{key}: {len(summaries)} of {len(units)} units, {summary['tokens']:,} tokens in this one", flush=True
            )
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

    def __init__(self, definition: str, eos: int | None, row_length: int, text_column: str, folder: str):
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # an actor has one CPU
        self._work = UnitWork(Tokenizer(definition, eos), row_length, text_column, UPath(folder))

    def __call__(self, batch: dict[str, npt.NDArray[Any]]) -> dict[str, list[Any]]:
        unit = Unit.from_json(str(batch["description"][0]))
        try:
            summary = self._work.committed(unit) or self._work.make(unit)
        except ConfigError as error:
            return {"unit": [unit.index], "summary": [""], "error": [str(error)]}
        return {"unit": [unit.index], "summary": [json.dumps(summary)], "error": [""]}


class UnitWork:
    """Tokenises and packs units of work into their shards; the part that runs on the workers."""

    def __init__(self, tokenizer: Tokenizer, row_length: int, text_column: str, folder: UPath):
        self.tokenizer = tokenizer
        self.row_length = row_length
        self.text_column = text_column
        self.folder = folder

    def committed(self, unit: Unit) -> dict[str, Any] | None:
        """The summary of a unit whose shard is there, whole; None if it has to be made."""
        try:
            summary = read_json(self._summary(unit))
            return summary if sha256(self.folder / summary["name"]) == summary["sha256"] else None
        except FileNotFoundError:
            return None

    def make(self, unit: Unit) -> dict[str, Any]:
        """Writes the unit's shard and the list of its skipped documents, then its summary, which commits it."""
        name = f"shards/{unit.index:05d}.parquet"
        skipped: list[tuple[str, str]] = []
        with tempfile.TemporaryDirectory(dir=self._scratch()) as scratch:
            shard = os.path.join(scratch, "shard.parquet")
            writer = ShardWriter(shard, self.row_length)
            packed = Counter[str]()
            for row in _rows(self._documents(unit, skipped, packed), self.row_length):
                writer.write(row)
            writer.close()
            summary = {
                "name": name,
                "rows": writer.rows,
                "tokens": writer.tokens,
                "target_tokens": writer.target_tokens,
                "bytes": os.path.getsize(shard),
                "sha256": sha256(UPath(shard)),
                "documents": packed.total(),
                "skipped": dict(sorted(Counter(reason for _, reason in skipped).items())),
            }
            _place(shard, self.folder / name)
            if skipped:
                listed = os.path.join(scratch, "skipped.parquet")
                pq.write_table(pa.table(list(zip(*skipped, strict=True)), schema=SKIPPED_SCHEMA), listed)
                _place(listed, self._skipped(unit))
        write_json(self._summary(unit), summary)
        return summary

    def _documents(
        self, unit: Unit, skipped: list[tuple[str, str]], packed: Counter[str]
    ) -> Iterator[tuple[str, npt.NDArray[np.int32]]]:
        """(id, token ids) of the unit's usable documents; the others go to `skipped`."""

        def usable() -> Iterator[Document]:
            for document in read_documents(unit.parts, self.text_column):
                if document.skip is None:
                    yield document
                else:
                    skipped.append((document.id, document.skip))

        for document, ids in tokenise(usable(), self.tokenizer):
            if len(ids) < 2:  # nothing to predict
                skipped.append((document.id, "too_short"))
            else:
                packed["documents"] += 1
                yield document.id, ids

    def _scratch(self) -> str | None:
        """Where a shard grows: beside its final place, to be renamed; locally before an upload to an object store."""
        if not is_local(self.folder):
            return None
        scratch = self.folder / "scratch"
        scratch.mkdir(parents=True, exist_ok=True)
        return scratch.path

    def _summary(self, unit: Unit) -> UPath:
        return self.folder / f"units/{unit.index:05d}.json"

    def _skipped(self, unit: Unit) -> UPath:
        return self.folder / f"units/{unit.index:05d}.skipped.parquet"


def _rows(documents: Iterator[tuple[str, npt.NDArray[np.int32]]], row_length: int) -> Iterator[Row]:
    """Packs documents window by window: at most WINDOW_TOKENS and one document are held."""
    window: list[tuple[str, npt.NDArray[np.int32]]] = []
    tokens = 0
    for document in documents:
        window.append(document)
        tokens += len(document[1])
        if tokens >= WINDOW_TOKENS:
            yield from _packed(window, row_length)
            window, tokens = [], 0
    yield from _packed(window, row_length)


def _packed(documents: list[tuple[str, npt.NDArray[np.int32]]], row_length: int) -> Iterator[Row]:
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
