"""Files and tables into documents: finds the sources, cuts them into units of work, reads them.

Sources are named by their path relative to what the user gave (folder, glob or file), never by an absolute one. The
cut into units depends on the list of sources alone, so that packs do not depend on the cluster that makes them.
"""

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from os.path import expanduser
from typing import Any, BinaryIO, Literal

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from pipeline.config import ConfigError

SUFFIXES = (".jsonl.gz", ".jsonl.zst", ".jsonl", ".parquet", ".txt", ".md")
PARQUET_BATCH = 16  # rows decoded at a time: books are large

Skip = Literal["empty", "missing_text", "not_json", "not_utf8", "too_short"]


@dataclass(frozen=True)
class Document:
    """A text with its name, or the reason why it has none."""

    id: str
    text: str = ""
    skip: Skip | None = None


@dataclass(frozen=True)
class Source:
    """A file with documents."""

    uri: str
    """Where it is: an absolute path or an object-store URI."""
    name: str
    """Relative path: names its documents, sorts the sources, and enters the fingerprint."""
    size: int
    checksum: str
    """`sha256:…` of a local file; what the object store calls the version of the object otherwise."""

    def identity(self) -> list[Any]:
        return [self.name, self.size, self.checksum]


@dataclass(frozen=True)
class Part:
    """A file, or some row groups of a Parquet file, inside a unit."""

    uri: str
    name: str
    first_group: int | None = None
    """Row groups [first_group, end_group) of a Parquet file; None for a whole file."""
    end_group: int = 0
    first_row: int = 0
    """Row of the file that the first group begins with."""


@dataclass(frozen=True)
class Unit:
    """What is tokenised and packed at once, into one shard."""

    index: int
    parts: tuple[Part, ...]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Unit":
        value = json.loads(text)
        return cls(value["index"], tuple(Part(**part) for part in value["parts"]))


def find_sources(entries: list[str], key: str) -> list[Source]:
    """The files that `entries` (files, folders, globs; local or fsspec URIs) name, sorted by relative path.

    A folder gives the files below it that have a known suffix, hidden ones left out. A file named twice counts once.
    Where two files would have the same relative path, both are named by more of their own.
    Raises ConfigError, naming `key` and the entry, if a file is missing, of an unknown type, or nothing matches.
    """
    files: dict[str, tuple[AbstractFileSystem, str]] = {}
    names: dict[str, str] = {}
    for entry in entries:
        with _explained(f"{key}: {entry!r}"):
            fs, path = fsspec.core.url_to_fs(expanduser(entry))
            found = _expand(fs, path)
        if not found:
            raise ConfigError(f"{key}: {entry!r} matches no file; documents are {' '.join(SUFFIXES)}")
        for file, name in found:
            if not name.lower().endswith(SUFFIXES):
                raise ConfigError(f"{key}: {name!r} has an unknown type; documents are {' '.join(SUFFIXES)}")
            uri = fs.unstrip_protocol(file)
            files[uri] = (fs, file)
            names.setdefault(uri, name)
    names = _distinct(names)
    with _explained(key), ThreadPoolExecutor() as threads:
        sources = threads.map(lambda uri: _source(*files[uri], names[uri]), files)
        return sorted(sources, key=lambda source: source.name)


@contextmanager
def _explained(where: str) -> Iterator[None]:
    """Turns what goes wrong in reading a user's file into one line that says where."""
    try:
        yield
    except ConfigError:
        raise
    except (OSError, EOFError, ImportError, ValueError, pa.ArrowException) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{where} cannot be read ({reason})") from None


def _expand(fs: AbstractFileSystem, path: str) -> list[tuple[str, str]]:
    """(path, relative path) of the files that `path` names."""
    if fs.isfile(path):
        return [(path, path.rsplit("/", 1)[-1])]
    if fs.isdir(path):
        below = [(file, file[len(path) :].lstrip("/")) for file in fs.find(path)]
        return [(file, name) for file, name in below if name.lower().endswith(SUFFIXES) and not _hidden(name)]
    fixed = re.split(r"[*?[]", path, maxsplit=1)[0].rpartition("/")[0]
    return [(file, file[len(fixed) :].lstrip("/")) for file in fs.glob(path) if fs.isfile(file)]


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _distinct(names: dict[str, str]) -> dict[str, str]:
    """Names by URI, lengthened by parent folders until no two are equal."""
    while True:
        times = Counter(names.values())
        if max(times.values()) == 1:
            return names
        names = {
            uri: name if times[name] == 1 else "/".join(uri.split("/")[-name.count("/") - 2 :])
            for uri, name in names.items()
        }


def _source(fs: AbstractFileSystem, path: str, name: str) -> Source:
    info = fs.info(path)
    if isinstance(fs, LocalFileSystem):
        with open(path, "rb") as file:
            checksum = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
        return Source(path, name, info["size"], checksum)
    etag = info.get("ETag") or info.get("etag") or info.get("md5Hash") or fs.checksum(path)
    return Source(fs.unstrip_protocol(path), name, info["size"], "etag:" + str(etag).strip('"'))


def cut_units(sources: list[Source], unit_bytes: int, text_column: str, key: str) -> list[Unit]:
    """Groups of small files, and ranges of row groups of large Parquet files, of about `unit_bytes` each, in order.

    Other files are never divided: a JSON-lines file is read in one go, so shards of at most a few units' size are best.
    Raises ConfigError if a Parquet file is damaged or lacks a text column of that name.
    """
    units: list[Unit] = []
    parts: list[Part] = []
    filled = 0
    for source in sources:
        for part, size in _parts(source, text_column, key):
            if parts and filled + size > unit_bytes:
                units.append(Unit(len(units), tuple(parts)))
                parts, filled = [], 0
            _extend(parts, part)
            filled += size
    return [*units, Unit(len(units), tuple(parts))]


def _extend(parts: list[Part], part: Part) -> None:
    """Appends `part`, or lengthens the last part by it where it goes on in the same file."""
    last = parts[-1] if parts else None
    if last and last.uri == part.uri and last.end_group == part.first_group:
        parts[-1] = replace(last, end_group=part.end_group)
    else:
        parts.append(part)


def _parts(source: Source, text_column: str, key: str) -> Iterator[tuple[Part, int]]:
    """The smallest parts of a source, with their size in bytes (of a row group: the text column, uncompressed)."""
    if not source.name.lower().endswith(".parquet"):
        yield Part(source.uri, source.name), source.size
        return
    with _explained(f"{key}: {source.name!r}"), _open(source.uri) as file:
        table = pq.ParquetFile(file)
        column = _column(table, text_column, f"{key}: {source.name!r}")
        row = 0
        for group in range(table.metadata.num_row_groups):
            metadata = table.metadata.row_group(group)
            size = metadata.column(column).total_uncompressed_size
            yield Part(source.uri, source.name, group, group + 1, row), size
            row += metadata.num_rows


def _column(table: pq.ParquetFile, name: str, where: str) -> int:
    """Index of the text column among the file's leaves."""
    schema = table.schema_arrow
    if name not in schema.names:
        raise ConfigError(f"{where} has no column {name!r} (data.text_column); it has {', '.join(schema.names)}")
    if not (pa.types.is_string(schema.field(name).type) or pa.types.is_large_string(schema.field(name).type)):
        raise ConfigError(f"{where}: column {name!r} (data.text_column) is {schema.field(name).type}, not text")
    paths = [table.schema.column(i).path for i in range(len(table.schema))]
    return paths.index(name)


def read_documents(parts: Iterable[Part], text_column: str) -> Iterator[Document]:
    """The documents of some parts, one at a time, in order; those that cannot be used carry the reason.

    Raises ConfigError if a file is damaged.
    """
    for part in parts:
        with _explained(repr(part.name)), _open(part.uri) as file:
            yield from _read(file, part, text_column)


def _read(file: BinaryIO, part: Part, text_column: str) -> Iterator[Document]:
    name = part.name.lower()
    if name.endswith(".parquet"):
        yield from _read_table(file, part, text_column)
    elif name.endswith(".jsonl"):
        yield from _read_lines(file, part, text_column)
    elif name.endswith((".jsonl.gz", ".jsonl.zst")):
        codec = "gzip" if name.endswith(".gz") else "zstd"  # Arrow's streams notice a file that was cut off
        with pa.CompressedInputStream(file, codec) as stream:
            yield from _read_lines(io.BufferedReader(stream), part, text_column)
    else:
        yield _decoded(part.name, file.read())


def _read_table(file: BinaryIO, part: Part, text_column: str) -> Iterator[Document]:
    table = pq.ParquetFile(file)
    groups = None if part.first_group is None else list(range(part.first_group, part.end_group))
    row = part.first_row
    for batch in table.iter_batches(PARQUET_BATCH, groups, [text_column], use_threads=False):
        texts = batch.column(0)  # as bytes: Parquet does not promise that its text is UTF-8
        for value in texts.cast(pa.large_binary()).to_pylist():
            id = f"{part.name}#{row}"
            yield Document(id, skip="missing_text") if value is None else _decoded(id, value)
            row += 1


def _read_lines(lines: Iterable[bytes], part: Part, text_column: str) -> Iterator[Document]:
    """One JSON object a line; blank lines hold no document, but count in the row number."""
    for row, line in enumerate(lines):
        if not line.strip():
            continue
        id = f"{part.name}#{row}"
        try:
            value = json.loads(line)
        except UnicodeDecodeError:
            yield Document(id, skip="not_utf8")
        except ValueError:
            yield Document(id, skip="not_json")
        else:
            text = value.get(text_column) if isinstance(value, dict) else None
            yield _checked(id, text) if isinstance(text, str) else Document(id, skip="missing_text")


def _decoded(id: str, data: bytes) -> Document:
    try:
        return _checked(id, data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return Document(id, skip="not_utf8")


def _checked(id: str, text: str) -> Document:
    if not text or text.isspace():
        return Document(id, skip="empty")
    try:
        text.encode()  # JSON can spell half a surrogate pair, which no UTF-8 has
    except UnicodeEncodeError:
        return Document(id, skip="not_utf8")
    return Document(id, text)


def _open(uri: str) -> BinaryIO:
    fs, path = fsspec.core.url_to_fs(uri)
    return fs.open(path, "rb")
