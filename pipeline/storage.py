"""Where runs live: a local folder or an object store, behind one path type (universal_pathlib.UPath)."""

import errno
import json
import os
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO

import fsspec
from upath import UPath

from pipeline.config import Config, ConfigError
from pipeline.session import on_cluster

# What fsspec connects with, in every process that imports this file. Listings are not kept: workers, other drivers
# and other machines write as well. A store that refuses connections or asks to slow down is tried for about a minute
# (ten attempts, with longer and longer waits), and a request has two minutes in all (s3.py).
RETRIES = {"connect_timeout": 10, "read_timeout": 20, "retries": {"mode": "standard", "max_attempts": 10}}
fsspec.config.conf["s3"] = {"config_kwargs": RETRIES, **fsspec.config.conf.get("s3", {}), "use_listings_cache": False}
fsspec.config.conf["gs"] = {**fsspec.config.conf.get("gs", {}), "use_listings_cache": False}
fsspec.register_implementation("s3", "pipeline.s3.S3FileSystem", clobber=True, errtxt="s3:// needs s3fs: install it")

NEEDS = {
    "s3": "s3:// needs s3fs, credentials or a machine's role that may list, read, write and delete there, and a store "
    "with conditional writes",
    "gs": "gs:// needs gcsfs, and credentials or a service account that may list, read, write and delete there",
    "": "a folder must be writable, shared by all nodes if there are several, and take hard links",
}
"""What each kind of storage asks for, said when it does not work."""
METADATA = {"s3": "Metadata", "s3a": "Metadata", "gs": "metadata", "gcs": "metadata"}
"""What each file system calls an object's metadata when it writes one."""
CONFLICT_WAIT_S = 0.2
STRETCH = 1 << 24
"""Bytes of a file that a disk is told to write while the next ones come."""


class NoAnswer(OSError):
    """An object store does not answer."""


def storage_root(config: Config) -> UPath:
    """`run.storage` as an absolute path; ConfigError if it cannot be written, listed or committed to."""
    text = config.run.storage
    if on_cluster() and "://" not in text and not os.path.isabs(os.path.expanduser(text)):
        raise ConfigError(
            f"run.storage = {text!r}: a relative path is another folder on each node, and a job's own is temporary; "
            "give an absolute path that all nodes share, or a URI"
        )
    try:
        root = absolute_path(text)
        probe = root / f".probe-{uuid.uuid4().hex}"
        first, second = create_once(probe, b"longlora"), create_once(probe, b"again")
        found = probe.read_bytes() if probe in root.iterdir() else b""
        probe.unlink()
        if not first or second:
            raise OSError("an object that exists is written again: commits need conditional writes")
        if found != b"longlora":
            raise OSError("what was written does not read back")
    except Exception as error:  # each kind of storage has errors of its own
        needs = NEEDS.get(text.partition("://")[0] if "://" in text else "", "give a writable folder or URI")
        raise ConfigError(f"run.storage = {text!r}: cannot be written ({words(error)}); {needs}") from None
    return root


def absolute_path(text: str) -> UPath:
    """A URI, or a local path made absolute."""
    return UPath(text) if "://" in text else UPath(os.path.abspath(os.path.expanduser(text)))


def run_folder(config: Config) -> UPath:
    """`<run.storage>/<run.name>`."""
    return storage_root(config) / config.run.name


def storage_error(error: BaseException) -> str:
    """One line for an error of the run's storage that has outlasted all retries; empty for any other error."""
    text, answer = words(error), _answer(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return f"run.storage cannot be written: {text}; make room, the run goes on from its last checkpoint"
    refused = answer.get("HTTPStatusCode", 200) >= 300 and answer["Code"] not in ("404", "NoSuchKey")
    if refused or isinstance(error, NoAnswer) or type(error).__module__.startswith("botocore."):
        return f"run.storage cannot be used: {text}; when it can be, the run goes on from its last checkpoint"
    return ""


def one_line(error: BaseException) -> str:
    """An error in one line: what `storage_error` says of it, or its own words."""
    return storage_error(error) or words(error)


def is_local(path: UPath) -> bool:
    return getattr(path, "protocol", "") in ("", "file", "local")


def make_folder(folder: UPath) -> None:
    """A local folder, with those above it. Object stores have none, and a bucket is not ours to create."""
    if is_local(folder):
        folder.mkdir(parents=True, exist_ok=True)


def write_atomic(path: UPath, data: bytes) -> None:
    """All of `data` at `path`, durably, or nothing: a reader never sees a part of it.

    Local: temporary file, fsync, rename, fsync of the folder. Object stores: a put is atomic already.
    """
    if not is_local(path):
        path.fs.pipe_file(path.path, data)
        return
    make_folder(path.parent)
    with _on_disk(path, data) as temporary:
        os.replace(temporary, str(path))
    sync_folder(path.parent)


def create_once(path: UPath, *data: bytes | memoryview, writer: str = "") -> bool:
    """All of `data`, one part after the other, at a path where nothing was, durably; False if there was something.

    One of several writers wins. Object stores: one put (the last request of a multipart upload) on condition that there
    is no such object. A writer that gives its name may try again after an error: if its first put has arrived after
    all, it is told True.
    """
    if not is_local(path):
        return _put_once(path, b"".join(data), writer or uuid.uuid4().hex)
    make_folder(path.parent)
    try:
        with _on_disk(path, *data) as temporary:
            os.link(temporary, str(path))
    except FileExistsError:
        return False
    sync_folder(path.parent)
    return True


def _put_once(path: UPath, data: bytes, writer: str) -> bool:
    named = {METADATA[path.protocol]: {"writer": writer}} if path.protocol in METADATA else {}
    while True:
        try:
            path.fs.pipe_file(path.path, data, mode="create", **named)
            return True
        except OSError as error:
            answer = _answer(error)
            if answer.get("Code") == "ConditionalRequestConflict":  # two at once, and S3 has not chosen yet
                time.sleep(CONFLICT_WAIT_S)
                continue
            refused = isinstance(error, FileExistsError) or answer.get("HTTPStatusCode") == 412
            if not refused and answer.get("Code") != "NoSuchUpload":
                raise
            # A request whose answer was lost is sent again and meets its own object: the metadata say whose it is.
            if named and path.exists() and path.fs.getxattr(path.path, "writer") == writer:
                return True
            if refused:
                return False
            raise


def _answer(error: BaseException) -> dict[str, Any]:
    """HTTPStatusCode, Code and more of an object store's answer that an error comes from; empty for other errors."""
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None) or {}
    return {**response.get("ResponseMetadata", {}), **response.get("Error", {})} if "Error" in response else {}


def words(error: BaseException) -> str:
    """An error in one line; of an object store, what it answered."""
    answer = _answer(error)
    text = f"{answer.get('Message')} ({answer['Code']})" if answer else str(error)
    return " ".join(text.split()) or type(error).__name__


@contextmanager
def _on_disk(path: UPath, *data: bytes | memoryview) -> Iterator[str]:
    """A temporary file beside a local `path`, with all of `data` on disk; afterwards it is gone, or renamed."""
    # Never a name that was used: a killed writer may leave its temporary file as a second name of what it wrote.
    temporary = f"{path}.tmp-{uuid.uuid4().hex}"
    try:
        with open(temporary, "wb") as file:
            _write(file, data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)


def _write(file: BinaryIO, data: Sequence[bytes | memoryview]) -> None:
    """Writes `data`, and lets the disk begin with each stretch of it: at the end there is little left to wait for."""
    begun = 0
    for part in data:
        for start in range(0, len(part), STRETCH):
            file.write(memoryview(part)[start : start + STRETCH])
            if file.tell() - begun >= STRETCH and hasattr(os, "posix_fadvise"):
                # Linux starts to write what it is advised to drop, and drops nothing that is not on disk yet.
                os.posix_fadvise(file.fileno(), begun, file.tell() - begun, os.POSIX_FADV_DONTNEED)
                begun = file.tell()


def sync_folder(folder: UPath) -> None:
    """Makes renames and new names in a local folder durable; object stores need nothing."""
    if is_local(folder):
        descriptor = os.open(str(folder), os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def write_json(path: UPath, value: Any) -> None:
    write_atomic(path, json_bytes(value))


def read_bytes(path: UPath) -> bytes:
    """All of a file. An object that is replaced meanwhile is read as it was or is; an open file of s3fs would fail."""
    return path.read_bytes() if is_local(path) else path.fs.cat_file(path.path)


def read_json(path: UPath) -> Any:
    return json.loads(read_bytes(path))


@contextmanager
def local_copy(folder: UPath) -> Iterator[str]:
    """A folder as a local path: itself, or a copy that is gone afterwards."""
    if is_local(folder):
        yield str(folder)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder.fs.get(folder.path, scratch, recursive=True)
        yield os.path.join(scratch, folder.name)


def remove_tree(folder: UPath) -> None:
    """Deletes a folder and what is in it."""
    folder.fs.rm(folder.path, recursive=True)
