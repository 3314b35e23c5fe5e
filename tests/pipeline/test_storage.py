import os

import pytest
from upath import UPath

from pipeline.config import ConfigError, parse_config
from pipeline.storage import read_json, storage_root, write_atomic, write_json


def test_written_files_read_back_and_leave_nothing_beside_them(tmp_path: object) -> None:
    folder = UPath(tmp_path)
    write_atomic(folder / "deep" / "a.bin", b"one")
    write_atomic(folder / "deep" / "a.bin", b"two")
    write_json(folder / "deep" / "b.json", {"x": [1, 2]})
    assert (folder / "deep" / "a.bin").read_bytes() == b"two"
    assert read_json(folder / "deep" / "b.json") == {"x": [1, 2]}
    assert sorted(path.name for path in (folder / "deep").iterdir()) == ["a.bin", "b.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    path = UPath(tmp_path) / "a.bin"
    write_atomic(path, b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in UPath(tmp_path).iterdir()] == ["a.bin"]


def test_the_same_calls_work_on_an_object_store() -> None:
    path = UPath("memory://bucket/run/state.json")
    write_json(path, {"step": 3})
    assert read_json(path) == {"step": 3}


def test_unwritable_storage_is_one_clear_line(tmp_path: object) -> None:
    file = UPath(tmp_path) / "file"
    file.write_bytes(b"")
    values = {
        "run": {"name": "a", "storage": str(file / "below")},
        "model": {"base": "m"},
        "context": {"length": 8},
        "attention": {"group_size": 4},
        "data": {"train": ["x"]},
        "optimization": {"steps": 2, "global_batch": 1, "warmup_steps": 0},
    }
    with pytest.raises(ConfigError, match=r"run\.storage = .*cannot be written"):
        storage_root(parse_config(values))
