"""Finding, cutting and reading documents."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import ConfigError
from pipeline.documents import Document, Part, Unit, cut_units, find_sources, read_documents

TEXTS = ["Alles neu macht der Mai.", "第二篇", "the third\nhas two lines"]


def json_lines(*values: object) -> bytes:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values).encode()


def compressed(codec: str, data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, codec) as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def parquet(path: Path, texts: list[str | None], column: str = "text", group: int = 100, kind: object = None) -> None:
    pq.write_table(
        pa.table({"id": range(len(texts)), column: pa.array(texts, kind)}),
        path,
        row_group_size=group,
        use_dictionary=False,
        write_statistics=False,
    )


def documents(path: Path, column: str = "text") -> list[Document]:
    return list(read_documents([Part(str(path), path.name)], column))


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, bytes], Path]:
    def write(name: str, data: bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    return write


@pytest.mark.parametrize("name", ["a.txt", "a.md", "A.TXT", "bom.txt"])
def test_a_text_file_is_one_document(write, name: str) -> None:
    bom = b"\xef\xbb\xbf" if name == "bom.txt" else b""
    assert documents(write(name, bom + TEXTS[1].encode())) == [Document(name, TEXTS[1])]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_table_has_a_document_a_row(write, tmp_path: Path, name: str) -> None:
    data = json_lines(*({"text": text, "id": n} for n, text in enumerate(TEXTS)))
    if name.endswith(".parquet"):
        parquet(tmp_path / name, list(TEXTS))
    else:
        write(name, compressed({"z": "gzip", "t": "zstd"}[name[-1]], data) if name[-1] in "zt" else data)
    assert documents(tmp_path / name) == [Document(f"{name}#{n}", text) for n, text in enumerate(TEXTS)]


def test_gzip_and_zstd_files_may_be_joined(write) -> None:
    for codec, suffix in (("gzip", "gz"), ("zstd", "zst")):
        parts = [compressed(codec, json_lines({"text": text})) for text in TEXTS]
        assert [d.text for d in documents(write(f"joined.jsonl.{suffix}", b"".join(parts)))] == TEXTS


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_row_groups_give_their_own_rows(tmp_path: Path, kind: pa.DataType) -> None:
    parquet(tmp_path / "t.parquet", [f"text {n}" for n in range(50)], group=20, kind=kind)
    part = Part(str(tmp_path / "t.parquet"), "t.parquet", 1, 3, first_row=20)
    assert list(read_documents([part], "text")) == [Document(f"t.parquet#{n}", f"text {n}") for n in range(20, 50)]


def test_unusable_rows_carry_the_reason(write) -> None:
    lines = [
        json_lines({"text": "good"}),
        b"{broken\n",
        json_lines({"text": " \n\t"}),
        json_lines({"text": None}),
        json_lines({"body": "x"}),
        json_lines({"text": 3}),
        json_lines(["text"]),
        b'{"text": "\xff"}\n',
        b'{"text": "half a pair: \\ud800"}\n',
        b"\n",
        json_lines({"text": "last"}).rstrip(),
    ]
    found = documents(write("a.jsonl", b"".join(lines)))
    assert [(d.id, d.skip) for d in found] == [
        ("a.jsonl#0", None),
        ("a.jsonl#1", "not_json"),
        ("a.jsonl#2", "empty"),
        ("a.jsonl#3", "missing_text"),
        ("a.jsonl#4", "missing_text"),
        ("a.jsonl#5", "missing_text"),
        ("a.jsonl#6", "missing_text"),
        ("a.jsonl#7", "not_utf8"),
        ("a.jsonl#8", "not_utf8"),
        ("a.jsonl#10", None),  # a blank line holds no document
    ]


def test_unusable_files_and_cells_carry_the_reason(write, tmp_path: Path) -> None:
    assert documents(write("a.txt", b"caf\xe9")) == [Document("a.txt", skip="not_utf8")]
    assert documents(write("b.txt", b"")) == [Document("b.txt", skip="empty")]
    raw = pa.array([b"caf\xe9", b"", b"fine", None]).view(pa.string())  # Parquet does not check that text is UTF-8
    pq.write_table(pa.table({"text": raw}), tmp_path / "c.parquet")
    assert [d.skip for d in documents(tmp_path / "c.parquet")] == ["not_utf8", "empty", None, "missing_text"]


@pytest.mark.parametrize(("suffix", "codec"), [("gz", "gzip"), ("zst", "zstd")])
def test_a_file_that_was_cut_off_is_refused(write, suffix: str, codec: str) -> None:
    data = compressed(codec, json_lines(*({"text": os.urandom(30).hex()} for _ in range(100))))
    with pytest.raises(ConfigError, match=f"a.jsonl.{suffix}' cannot be read"):
        documents(write(f"a.jsonl.{suffix}", data[:-100]))


def test_a_folder_gives_known_files_sorted_by_relative_path(write, tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "a/image.png", ".git/x.txt", "a/.hidden.txt", "c.jsonl"):
        write(name, name.encode())
    sources = find_sources([str(tmp_path)], "data.train")
    assert [source.name for source in sources] == ["a/z.md", "b.txt", "c.jsonl"]
    assert [source.size for source in sources] == [6, 5, 7]


def test_globs_and_files_are_named_relative_to_what_was_given(write, tmp_path: Path) -> None:
    for name in ("x/1/a.txt", "x/2/b.txt", "book [1].txt"):
        write(name, b"text")
    names = lambda *entries: [s.name for s in find_sources([str(tmp_path / e) for e in entries], "data.train")]  # noqa: E731
    assert names("x/*/*.txt") == ["1/a.txt", "2/b.txt"]
    assert names("x/**/*.txt") == ["1/a.txt", "2/b.txt"]
    assert names("x/2/b.txt", "x/1") == ["a.txt", "b.txt"]
    assert names("x/1/a.txt", "x/1", "x/1/*") == ["a.txt"]  # a file named twice counts once
    assert names("book [1].txt") == ["book [1].txt"]


def test_files_of_equal_names_are_told_apart_by_their_folders(write, tmp_path: Path) -> None:
    for name in ("2023/part.txt", "2024/part.txt", "2024/other.txt"):
        write(name, name.encode())
    sources = find_sources([str(tmp_path / "2023"), str(tmp_path / "2024")], "data.train")
    assert [source.name for source in sources] == ["2023/part.txt", "2024/part.txt", "other.txt"]


def test_sources_are_identified_by_content_not_by_place(write, tmp_path: Path) -> None:
    write("one/a.txt", b"same")
    write("two/a.txt", b"same")
    write("three/a.txt", b"SAME")
    one, two, three = (find_sources([str(tmp_path / f)], "data.train")[0] for f in ("one", "two", "three"))
    assert one.identity() == two.identity() != three.identity()
    assert str(tmp_path) not in json.dumps(one.identity())


def test_object_stores_are_read_by_uri() -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe({"/bucket/books/a.txt": b"one", "/bucket/books/b/c.jsonl": json_lines({"text": "two"})})
    sources = find_sources(["memory://bucket/books"], "data.train")
    assert [(s.name, s.uri, s.size) for s in sources] == [
        ("a.txt", "memory:///bucket/books/a.txt", 3),
        ("b/c.jsonl", "memory:///bucket/books/b/c.jsonl", 16),
    ]
    assert all(source.checksum.startswith("etag:") for source in sources)
    unit = cut_units(sources, 10**6, "text", "data.train")[0]
    assert [d.text for d in read_documents(unit.parts, "text")] == ["one", "two"]
    assert find_sources(["memory://bucket/books/*.txt"], "data.train")[0].name == "a.txt"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("nowhere.txt", "matches no file"),
        ("*.parquet", "matches no file"),
        ("empty", "matches no file"),
        ("picture.png", "'picture.png' has an unknown type; documents are"),
        ("pict*", "'picture.png' has an unknown type"),
        ("nosuchscheme://x/y.txt", "cannot be read"),
    ],
)
def test_what_cannot_be_found_is_refused_in_one_line(write, tmp_path: Path, entry: str, message: str) -> None:
    write("picture.png", b"")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=message) as error:
        find_sources([entry if "://" in entry else str(tmp_path / entry)], "data.train")
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("data.train: ")


def test_small_files_share_a_unit_and_large_tables_are_divided(write, tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "c.txt"):
        write(name, b"x" * 4000)
    parquet(tmp_path / "d.parquet", ["y" * 3000 + str(n) for n in range(6)], group=1)
    units = cut_units(find_sources([str(tmp_path)], "data.train"), 10_000, "text", "data.train")
    assert [unit.index for unit in units] == list(range(len(units)))
    assert [[(p.name, p.first_group, p.end_group) for p in unit.parts] for unit in units] == [
        [("a.txt", None, 0), ("b.txt", None, 0)],
        [("c.txt", None, 0), ("d.parquet", 0, 1)],
        [("d.parquet", 1, 4)],
        [("d.parquet", 4, 6)],
    ]
    ids = [d.id for unit in units for d in read_documents(unit.parts, "text")]
    assert ids == ["a.txt", "b.txt", "c.txt", *(f"d.parquet#{n}" for n in range(6))]


def test_a_unit_survives_json() -> None:
    unit = Unit(3, (Part("/x/a.txt", "a.txt"), Part("/x/b.parquet", "b.parquet", 1, 4, 20)))
    assert cut_units([], 1, "text", "data.train") == [Unit(0, ())]
    assert Unit.from_json(unit.to_json()) == unit


def test_tables_without_the_text_are_refused(write, tmp_path: Path) -> None:
    parquet(tmp_path / "t.parquet", list(TEXTS), column="body")
    sources = find_sources([str(tmp_path)], "data.train")
    with pytest.raises(ConfigError, match=r"'t.parquet' has no column 'text' \(data.text_column\); it has id, body"):
        cut_units(sources, 1000, "text", "data.train")
    with pytest.raises(ConfigError, match=r"column 'id' \(data.text_column\) is int64, not text"):
        cut_units(sources, 1000, "id", "data.train")
    write("t.parquet", (tmp_path / "t.parquet").read_bytes()[:-20])
    with pytest.raises(ConfigError, match=r"data.train: 't.parquet' cannot be read \(.*magic bytes"):
        cut_units(find_sources([str(tmp_path)], "data.train"), 1000, "body", "data.train")
