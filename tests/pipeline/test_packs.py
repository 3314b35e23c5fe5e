"""Packed rows as Parquet shards, read by global index."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from upath import UPath

from pipeline import packs as packs_module
from pipeline.config import ConfigError
from pipeline.packs import Packs, Row, ShardWriter, check_enough, row_hash, sha256
from pipeline.storage import write_json

ROW_LENGTH = 16


def example_row(n: int) -> Row:
    """Row n: two documents of 3 and n % 9 + 1 tokens; every third row has a mask."""
    lengths = (3, n % 9 + 1)
    ids = np.arange(sum(lengths), dtype=np.int32) + 100 * n
    mask = np.arange(len(ids)) % 2 == 0 if n % 3 == 0 else None
    return Row(ids, lengths, (f"a.txt#{n}", "b.txt"), mask)


def same(a: Row, b: Row) -> bool:
    masks = (a.target_mask is None) == (b.target_mask is None) and np.array_equal(a.target_mask, b.target_mask)
    named = (a.document_lengths, a.document_ids) == (b.document_lengths, b.document_ids)
    return masks and named and np.array_equal(a.input_ids, b.input_ids) and a.input_ids.dtype == b.input_ids.dtype


def make_packs(folder: Path, *shards: list[Row]) -> UPath:
    """Packs with these rows in each shard, by hand."""
    (folder / "shards").mkdir(parents=True)
    entries, first = [], 0
    for index, rows in enumerate(shards):
        name = f"shards/{index:05d}.parquet"
        with ShardWriter(str(folder / name), ROW_LENGTH) as writer:
            for row in rows:
                writer.write(row)
        path = UPath(folder / name)
        size = path.stat().st_size
        entries.append(
            {"name": name, "rows": writer.rows, "first_sequence": first, "bytes": size, "sha256": sha256(path)}
        )
        first += writer.rows
    manifest = {"format": 1, "fingerprint": "f", "sequences": first, "sequence_length": ROW_LENGTH, "shards": entries}
    write_json(UPath(folder / "manifest.json"), manifest)
    return UPath(folder)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> UPath:
    """Sequences 0–36 in shards of 10, 0, 1 and 26 rows; row groups of 4."""
    monkeypatch.setattr(packs_module, "GROUP_TOKENS", 4 * ROW_LENGTH)
    rows = [example_row(n) for n in range(37)]
    return make_packs(tmp_path / "packs", rows[:10], [], rows[10:11], rows[11:])


def test_any_sequence_is_read_by_its_index(folder: UPath) -> None:
    packs = Packs.open(folder)
    assert packs.count == 37
    for n in [36, 0, *range(37)]:
        assert same(packs.row(n), example_row(n)), n
    for n in (-1, 37):
        with pytest.raises(IndexError, match=f"sequence {n} of packs with 37"):
            packs.row(n)


def test_rows_lie_in_small_groups_with_checksums(folder: UPath) -> None:
    shard = pq.ParquetFile(str(folder / "shards/00003.parquet"))
    assert [shard.metadata.row_group(g).num_rows for g in range(shard.metadata.num_row_groups)] == [4] * 6 + [2]
    assert shard.read(columns=["row"]).column(0).to_pylist() == list(range(26))


def test_one_row_costs_one_row_group(folder: UPath, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    original = pq.ParquetFile.read_row_group

    def counted(self, group, **options):
        read.append(group)
        return original(self, group, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    packs = Packs.open(folder)
    for n in (16, 15, 18, 16):  # rows 5, 4, 7 and 5 of the last shard, all in its second group
        packs.row(n)
    assert read == [1]


def test_target_tokens_by_hand() -> None:
    ids = np.arange(6, dtype=np.int32)
    assert Row(ids, (4, 2), ("a", "b")).target_tokens == 4  # without the first token of each document
    mask = np.array([True, False, True, True, True, True])
    assert Row(ids, (4, 2), ("a", "b"), mask).target_tokens == 3  # tokens 2, 3 and 5


def test_target_tokens_need_no_row(folder: UPath, monkeypatch: pytest.MonkeyPatch) -> None:
    packs = Packs.open(folder)
    monkeypatch.setattr(Packs, "row", None)
    assert [packs.target_tokens(n) for n in range(37)] == [example_row(n).target_tokens for n in range(37)]
    assert [packs.document_lengths(n) for n in range(37)] == [example_row(n).document_lengths for n in range(37)]


def test_several_threads_may_read(folder: UPath) -> None:
    packs = Packs.open(folder)
    with ThreadPoolExecutor(4) as threads:
        sequences = [n % 37 for n in range(400)]
        read = [threads.map(ask, sequences) for ask in (packs.document_lengths, packs.row, packs.target_tokens)]
        lengths, rows, targets = map(list, read)
    assert all(same(row, example_row(n % 37)) for n, row in enumerate(rows))
    assert lengths == [row.document_lengths for row in rows]
    assert targets == [row.target_tokens for row in rows]


def test_verify_reads_every_byte(folder: UPath) -> None:
    Packs.open(folder).verify()
    shard = folder / "shards/00003.parquet"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(bytes(data))
    with pytest.raises(ConfigError, match=r"00003.parquet: sha256 differs"):
        Packs.open(folder).verify()


def test_a_flipped_bit_is_noticed_when_its_row_is_read(folder: UPath) -> None:
    shard = folder / "shards/00003.parquet"
    offset = pq.ParquetFile(str(shard)).metadata.row_group(1).column(1).data_page_offset
    data = bytearray(shard.read_bytes())
    data[offset + 40] ^= 1  # in a page of input_ids, behind its header
    shard.write_bytes(bytes(data))
    with pytest.raises(OSError, match=r"CRC|checksum"):
        Packs.open(folder).row(16)


def test_a_shard_that_is_cut_off_or_missing_is_refused(folder: UPath) -> None:
    shard = folder / "shards/00000.parquet"
    data = shard.read_bytes()
    shard.write_bytes(data[:-7])
    with pytest.raises(ConfigError, match=f"00000.parquet: {len(data) - 7} bytes, the manifest says {len(data)}"):
        Packs.open(folder)
    shard.unlink()
    with pytest.raises(ConfigError, match=r"00000.parquet: no bytes"):
        Packs.open(folder)


def test_without_a_manifest_there_are_no_packs(folder: UPath) -> None:
    (folder / "manifest.json").write_text('{"format": 1,')
    with pytest.raises(ConfigError, match=r"manifest.json is damaged"):
        Packs.open(folder)
    (folder / "manifest.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(ConfigError, match="packs of format 99, expected 1"):
        Packs.open(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(ConfigError, match="no packs here"):
        Packs.open(folder)


def test_packs_open_on_an_object_store(folder: UPath) -> None:
    store = UPath("memory://bucket/packs/f")
    for name in ("manifest.json", *(f"shards/0000{n}.parquet" for n in range(4))):
        (store / name).write_bytes((folder / name).read_bytes())
    packs = Packs.open(store)
    packs.verify()
    assert all(same(packs.row(n), example_row(n)) for n in range(37))
    assert packs.target_tokens(12) == example_row(12).target_tokens


def test_fewer_sequences_than_a_batch_are_refused(folder: UPath) -> None:
    packs = Packs.open(folder)
    check_enough(packs, 37)
    with pytest.raises(ConfigError, match=r"37 sequences of 16 tokens, fewer than optimization.global_batch \(38\)"):
        check_enough(packs, 38)


def test_the_hash_is_pinned_and_sees_every_change() -> None:
    ids = np.array([5, 6, 7, 8], np.int32)
    by_hand = np.array([2, 3, 1, 5, 6, 7, 8], "<i4").tobytes()
    expected = int.from_bytes(hashlib.blake2b(by_hand, digest_size=8).digest(), "little")
    assert row_hash(ids, (3, 1)) == expected == 1226489129085402398
    assert row_hash(ids.astype(np.int64), [3, 1]) == expected
    others = [row_hash(ids, (1, 3)), row_hash(ids, (4,)), row_hash(ids[::-1], (3, 1)), row_hash(ids[:3], (3,))]
    assert len({expected, *others}) == 5
