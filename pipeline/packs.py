"""Packs: the committed training data. Packed rows in Parquet shards, read by global index.

    packs/<fingerprint>/
        shards/00000.parquet …   one per unit of work; columns as in SCHEMA
        units/00000.json …       its summary, which commits it
        skipped.parquet          documents that were left out, and why
        tokenizer.json           what the ids mean
        manifest.json            written last: sizes, sha256, first sequence of each shard

Sequences are dense from 0: sequence q is row q - first_sequence of the last shard whose first_sequence is ≤ q.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from pipeline.config import ConfigError
from pipeline.storage import is_local, read_json

FORMAT = 1
"""Version of the layout above; part of the fingerprint."""

GROUP_TOKENS = 2**16
"""A row group holds about this many tokens: one row of 100k, 128 rows of 512. Reading one row reads its group."""

SCHEMA = pa.schema(
    [
        ("row", pa.int32()),
        ("input_ids", pa.list_(pa.int32())),
        ("document_lengths", pa.list_(pa.int32())),
        ("document_ids", pa.list_(pa.string())),
        ("target_mask", pa.list_(pa.bool_())),  # null: every token but a document's first is a target
        ("target_tokens", pa.int32()),
    ]
)


@dataclass(frozen=True)
class Row:
    """One sequence: documents (or pieces of them) one after the other."""

    input_ids: npt.NDArray[np.int32]
    """(tokens,)"""
    document_lengths: tuple[int, ...]
    """Tokens of each; they add up to `tokens`."""
    document_ids: tuple[str, ...]
    """`<relative path>`, or `<relative path>#<row>` for tables and JSON lines."""
    target_mask: npt.NDArray[np.bool_] | None = None
    """(tokens,), which tokens are targets; None for all."""

    @property
    def target_tokens(self) -> int:
        """Tokens that a loss is taken of: all, or those of the mask, without each document's first."""
        if self.target_mask is None:
            return len(self.input_ids) - len(self.document_lengths)
        firsts = np.cumsum((0, *self.document_lengths[:-1]))
        return int(self.target_mask.sum() - self.target_mask[firsts].sum())


def row_hash(input_ids: npt.NDArray[np.integer], document_lengths: Sequence[int]) -> int:
    """64-bit BLAKE2b of a sequence: document count, document lengths and token ids as little-endian int32."""
    digest = hashlib.blake2b(np.array([len(document_lengths), *document_lengths], "<i4").tobytes(), digest_size=8)
    digest.update(np.ascontiguousarray(input_ids, dtype="<i4").tobytes())
    return int.from_bytes(digest.digest(), "little")


class ShardWriter:
    """Writes the rows of one unit into a local Parquet file, one row group at a time."""

    def __init__(self, path: str, row_length: int):
        self.rows = self.tokens = self.target_tokens = 0
        self._group_rows = max(1, GROUP_TOKENS // row_length)
        self._pending: list[Row] = []
        self._file = pq.ParquetWriter(
            path,
            SCHEMA,
            compression="zstd",
            use_dictionary=["document_ids"],
            write_statistics=False,  # ids have none worth reading, and the footer is read at every opening
            write_page_checksum=True,
        )

    def write(self, row: Row) -> None:
        self._pending.append(row)
        if len(self._pending) == self._group_rows:
            self._flush()

    def close(self) -> None:
        if self._pending:
            self._flush()
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _flush(self) -> None:
        rows, self._pending = self._pending, []
        targets = [row.target_tokens for row in rows]
        columns = [
            pa.array(range(self.rows, self.rows + len(rows)), pa.int32()),
            pa.array([row.input_ids for row in rows], SCHEMA.field("input_ids").type),
            pa.array([row.document_lengths for row in rows], SCHEMA.field("document_lengths").type),
            pa.array([row.document_ids for row in rows], SCHEMA.field("document_ids").type),
            pa.array([row.target_mask for row in rows], SCHEMA.field("target_mask").type),
            pa.array(targets, pa.int32()),
        ]
        self._file.write_table(pa.table(columns, schema=SCHEMA), row_group_size=len(rows))
        self.rows += len(rows)
        self.tokens += sum(len(row.input_ids) for row in rows)
        self.target_tokens += sum(targets)


class Packs:
    """Committed packs, read by global sequence index, from any thread (one at a time)."""

    def __init__(self, folder: UPath, manifest: dict[str, Any]):
        self.folder = folder
        self.manifest = manifest
        self.fingerprint: str = manifest["fingerprint"]
        self.count: int = manifest["sequences"]
        self._lock = Lock()
        self._first = [shard["first_sequence"] for shard in manifest["shards"]]
        self._file = lru_cache(maxsize=64)(self._open_shard)
        self._group = lru_cache(maxsize=64)(self._read_group)
        self._sizes = lru_cache(maxsize=None)(self._read_sizes)

    @classmethod
    def open(cls, folder: UPath) -> "Packs":
        """Checks the manifest and the size of every shard. Raises ConfigError, naming what is wrong."""
        try:
            manifest = read_json(folder / "manifest.json")
        except FileNotFoundError:
            raise ConfigError(f"{folder}: no packs here (no manifest.json); make them with `prepare`") from None
        except json.JSONDecodeError as error:
            raise ConfigError(f"{folder}/manifest.json is damaged ({error}); delete the folder and `prepare`") from None
        if manifest["format"] != FORMAT:
            raise ConfigError(f"{folder}: packs of format {manifest['format']}, expected {FORMAT}; `prepare` again")
        sizes = shard_sizes(folder)
        for shard in manifest["shards"]:
            if sizes.get(shard["name"]) != shard["bytes"]:
                found = sizes.get(shard["name"], "no")
                raise ConfigError(
                    f"{folder}/{shard['name']}: {found} bytes, the manifest says {shard['bytes']}; `prepare` again"
                )
        return cls(folder, manifest)

    def summary(self) -> dict[str, Any]:
        """What a reader of the run's ledger wants to know of them; `sequence_length` and the counts in tokens."""
        counts = {name: self.manifest[name] for name in ("sequences", "sequence_length", "tokens", "target_tokens")}
        documents = self.manifest["documents"]["packed"]
        return {"uri": str(self.folder), "fingerprint": self.fingerprint, **counts, "documents": documents}

    def row(self, sequence: int) -> Row:
        """Sequence `sequence` of 0 … count - 1; reads the row group that holds it. IndexError outside."""
        shard, row = self._place(sequence)
        with self._lock:
            group_rows = self._file(shard).metadata.row_group(0).num_rows
            table = self._group(shard, row // group_rows)
        at = {name: table.column(name)[row % group_rows] for name in table.column_names}
        mask = at["target_mask"]
        return Row(
            at["input_ids"].values.to_numpy(),
            tuple(at["document_lengths"].as_py()),
            tuple(at["document_ids"].as_py()),
            mask.values.to_numpy(zero_copy_only=False) if mask.is_valid else None,
        )

    def target_tokens(self, sequence: int) -> int:
        """Target tokens of a sequence, without reading it (small columns of a shard, kept)."""
        return self._size(sequence, "target_tokens")

    def document_lengths(self, sequence: int) -> tuple[int, ...]:
        """Tokens of each document of a sequence, without reading it (small columns of a shard, kept)."""
        return tuple(self._size(sequence, "document_lengths"))

    def verify(self) -> None:
        """Reads every shard and compares its sha256; ConfigError names the first that differs."""
        for shard in self.manifest["shards"]:
            if sha256(self.folder / shard["name"]) != shard["sha256"]:
                raise ConfigError(f"{self.folder}/{shard['name']}: sha256 differs from the manifest; `prepare` again")

    def _place(self, sequence: int) -> tuple[int, int]:
        """(shard, row in it)"""
        if not 0 <= sequence < self.count:
            raise IndexError(f"sequence {sequence} of packs with {self.count}")
        shard = bisect_right(self._first, sequence) - 1
        return shard, sequence - self._first[shard]

    def _open_shard(self, shard: int) -> pq.ParquetFile:
        path = self.folder / self.manifest["shards"][shard]["name"]
        source = path.path if is_local(path) else path.fs.open(path.path, block_size=2**20)
        file = pq.ParquetFile(source, page_checksum_verification=True)
        if not file.schema_arrow.equals(SCHEMA):  # a column of Ray Data's own types would be unpickled
            raise ConfigError(f"{path}: has other columns than packs have; delete the folder and `prepare`")
        return file

    def _read_group(self, shard: int, group: int) -> pa.Table:
        columns = ["input_ids", "document_lengths", "document_ids", "target_mask"]
        return self._file(shard).read_row_group(group, columns=columns, use_threads=False)

    def _size(self, sequence: int, column: str) -> Any:
        shard, row = self._place(sequence)
        with self._lock:
            return self._sizes(shard).column(column)[row].as_py()

    def _read_sizes(self, shard: int) -> pa.Table:
        return self._file(shard).read(columns=["document_lengths", "target_tokens"]).combine_chunks()


def check_enough(packs: Packs, global_batch: int) -> None:
    """Raises ConfigError if the packs hold fewer sequences than one step takes."""
    if packs.count < global_batch:
        raise ConfigError(
            f"data.train gives {packs.count} sequences of {packs.manifest['sequence_length']} tokens, fewer than "
            f"optimization.global_batch ({global_batch}): add documents or lower the batch"
        )


def shard_sizes(folder: UPath) -> dict[str, int]:
    """Bytes of each file under `folder`/shards, by its name in the manifest; one listing."""
    shards = folder / "shards"
    if not shards.exists():
        return {}
    return {f"shards/{entry['name'].rsplit('/', 1)[-1]}": entry["size"] for entry in shards.fs.ls(shards.path, True)}


def sha256(path: UPath) -> str:
    """Hex digest of a file, read in pieces."""
    with path.fs.open(path.path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
