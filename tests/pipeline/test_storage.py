"""Files that are whole or not there, on disks and on an S3 that answers, refuses, stalls and loses its answers."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
from object_store import ObjectStore
from upath import UPath

from pipeline import s3, storage
from pipeline.config import Config, ConfigError, parse_config
from pipeline.storage import (
    NoAnswer,
    create_once,
    read_json,
    remove_tree,
    storage_error,
    storage_root,
    write_atomic,
    write_json,
)

MULTIPART = 100 * 2**20  # bytes from which on s3fs uploads in parts
LINE = "run.storage cannot be used: "


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


def config_of(text: str) -> Config:
    return parse_config(
        {
            "run": {"name": "a", "storage": text},
            "model": {"base": "m"},
            "context": {"length": 8},
            "attention": {"group_size": 4},
            "data": {"train": ["x"]},
            "optimization": {"steps": 2, "global_batch": 1, "warmup_steps": 0},
        }
    )


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer retries, and shorter ones."""
    once = {"connect_timeout": 1, "read_timeout": 1, "retries": {"mode": "standard", "max_attempts": 1}}
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": once, "use_listings_cache": False})


def test_unwritable_storage_is_one_clear_line(tmp_path: Path) -> None:
    file = UPath(tmp_path) / "file"
    file.write_bytes(b"")
    with pytest.raises(ConfigError, match=r"run\.storage = .*cannot be written"):
        storage_root(config_of(str(file / "below")))


@pytest.mark.parametrize(
    ("text", "needs"),
    [("s3://no-such-bucket/runs", "s3fs, credentials"), ("/proc/runs", "shared by all nodes"), ("s4://x/y", "or URI")],
)
def test_what_storage_needs_is_said(store: ObjectStore, text: str, needs: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.storage = .*cannot be written") as refused:
        storage_root(config_of(text))
    assert needs in str(refused.value)


def test_a_relative_path_is_refused_in_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage_root(config_of("runs")) == UPath(tmp_path / "runs")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    with pytest.raises(ConfigError, match=r"run\.storage = 'runs': a relative path is another folder on each node"):
        storage_root(config_of("runs"))


def test_a_probe_leaves_nothing_behind(tmp_path: Path, bucket: UPath) -> None:
    for root in (UPath(tmp_path), bucket / "runs"):
        assert storage_root(config_of(str(root))) == root
        assert not root.is_dir() or not list(root.iterdir())


def test_of_many_threads_one_creates_an_object(bucket: UPath) -> None:
    path = bucket / "run" / "manifest.json"
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda n: create_once(path, b"%d" % n), range(16)))
    assert won.count(True) == 1
    assert path.read_bytes() == b"%d" % won.index(True)


def test_of_several_processes_one_creates_an_object(bucket: UPath) -> None:
    script = (
        "import sys; from upath import UPath; from pipeline.storage import create_once;"
        "print('ready', flush=True); input();"
        "print(create_once(UPath(sys.argv[1]), sys.argv[2].encode()))"
    )
    command = [sys.executable, "-c", script, str(bucket / "manifest.json")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([*command, str(n)], **pipes) for n in range(3)]  # type: ignore[call-overload]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    won = [process.communicate()[0] == "True\n" for process in processes]
    assert won.count(True) == 1
    assert (bucket / "manifest.json").read_text() == str(won.index(True))


def test_an_upload_in_parts_is_created_once_too(bucket: UPath) -> None:
    path = bucket / "large"
    assert create_once(path, b"a" * MULTIPART, b"b")
    assert not create_once(path, b"c" * MULTIPART, b"c")
    assert path.stat().st_size == MULTIPART + 1
    assert path.fs.cat_file(path.path, start=MULTIPART - 1) == b"ab"


@pytest.mark.parametrize("method, size", [("PUT", 1), ("POST", MULTIPART)], ids=["put", "parts"])
def test_what_was_written_though_the_answer_was_lost_is_ours(
    method: str, size: int, store: ObjectStore, bucket: UPath
) -> None:
    path = bucket / "manifest.json"
    store.fail(status=500, code="InternalError", method=method, path="manifest.json", times=1, done=True)
    assert create_once(path, b"x" * size)
    assert not create_once(path, b"x" * size)


def test_a_named_writer_may_try_again(bucket: UPath) -> None:
    path = bucket / "part"
    assert create_once(path, b"x", writer="me")
    assert create_once(path, b"x", writer="me")
    assert not create_once(path, b"x", writer="another")


def test_a_refusal_without_its_condition_is_one(store: ObjectStore, bucket: UPath) -> None:
    """Only S3 itself says which condition did not hold."""
    store.fail(status=412, code="PreconditionFailed", method="PUT")
    assert not create_once(bucket / "a", b"x")


def test_a_conflict_and_a_request_to_slow_down_are_waited_out(store: ObjectStore, bucket: UPath) -> None:
    store.fail(status=409, code="ConditionalRequestConflict", method="PUT")
    assert create_once(bucket / "a", b"x")
    store.fail()
    write_atomic(bucket / "b", b"x")
    store.fail()
    assert (bucket / "b").read_bytes() == b"x"
    store.fail()
    assert [path.name for path in bucket.iterdir()] == ["a", "b"]


def test_an_outage_is_waited_out(store: ObjectStore, bucket: UPath) -> None:
    created: list[bool] = []
    write_atomic(bucket / "before", b"x")  # connected
    writer = threading.Thread(target=lambda: created.append(create_once(bucket / "a", b"x")))
    store.pause()
    writer.start()
    writer.join(1)
    assert writer.is_alive()
    store.resume()
    writer.join(60)
    assert created == [True]


@pytest.mark.parametrize("size", [1, 2**25], ids=["small", "more than TCP holds"])
def test_a_store_that_never_answers_ends_in_one_line(
    size: int, store: ObjectStore, bucket: UPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "ANSWER_S", 2.0)
    monkeypatch.setattr(s3, "UPLOAD_RATE", 2**30)
    write_atomic(bucket / "before", b"x")  # connected
    store.pause()
    for request in (lambda: create_once(bucket / "a", b"x" * size), (bucket / "before").read_bytes):
        with pytest.raises(NoAnswer) as silent:
            request()
        assert storage_error(silent.value).startswith(LINE + "no answer to ")


@pytest.mark.parametrize(
    "status, code",
    [(503, "SlowDown"), (500, "InternalError"), (403, "AccessDenied"), (403, "SignatureDoesNotMatch")],
)
def test_a_store_that_goes_on_refusing_ends_in_one_line(
    status: int, code: str, impatient: None, store: ObjectStore, bucket: UPath
) -> None:
    store.fail(status=status, code=code, times=100)
    with pytest.raises(OSError, match="as told") as refused:
        create_once(bucket / "a", b"x")
    assert storage_error(refused.value).startswith(LINE + f"as told ({code}); when")
    with pytest.raises(ConfigError, match=r"run\.storage = 's3://.*cannot be written \(as told"):
        storage_root(config_of(str(bucket / "runs")))


def test_a_store_that_is_not_there_is_one_line(
    impatient: None, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    path = UPath("s3://bucket/a", skip_instance_cache=True)
    with pytest.raises(Exception, match="Could not connect") as unreachable:
        create_once(path, b"x")
    assert storage_error(unreachable.value).startswith(LINE + "Could not connect to the endpoint")


def test_without_credentials_it_is_one_line(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    with pytest.raises(Exception, match="credentials") as refused:
        create_once(UPath("s3://bucket/a", skip_instance_cache=True), b"x")
    assert storage_error(refused.value).startswith(LINE + "Unable to locate credentials")


def test_a_bucket_that_is_not_there_is_refused_and_not_made(store: ObjectStore) -> None:
    for _ in range(2):
        with pytest.raises(ConfigError, match="specified bucket does not exist"):
            storage_root(config_of("s3://no-such-bucket/runs"))


def test_what_is_missing_is_no_error_of_storage(bucket: UPath) -> None:
    with pytest.raises(FileNotFoundError) as missing:
        (bucket / "a").read_bytes()
    assert storage_error(missing.value) == ""


def test_a_store_without_conditional_writes_is_refused(bucket: UPath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "create_once", lambda path, data: write_atomic(path, data) or True)
    with pytest.raises(ConfigError, match="commits need conditional writes"):
        storage_root(config_of(str(bucket)))


def test_what_others_write_and_delete_is_seen_at_once(bucket: UPath) -> None:
    folder = bucket / "run"
    write_atomic(folder / "a" / "1", b"x")
    assert [path.name for path in folder.iterdir()] == ["a"]
    with ThreadPoolExecutor(1) as elsewhere:  # every thread has a connection of its own
        elsewhere.submit(write_atomic, folder / "b" / "2", b"x").result()
        assert [path.name for path in folder.iterdir()] == ["a", "b"]
        assert (folder / "b" / "2").exists()
        assert [path.name for path in folder.glob("*/2")] == ["2"]
        elsewhere.submit(remove_tree, folder / "a").result()
    assert [path.name for path in folder.iterdir()] == ["b"]
    assert not (folder / "a").exists()


def test_an_object_that_is_replaced_is_read_as_it_was_or_is(bucket: UPath) -> None:
    path = bucket / "1.beat"
    write_json(path, {"beat": -1})
    with ThreadPoolExecutor(1) as elsewhere:
        writes = [elsewhere.submit(write_json, path, {"beat": n}) for n in range(100)]
        while not writes[-1].done():
            assert set(read_json(path)) == {"beat"}
    assert read_json(path) == {"beat": 99}
