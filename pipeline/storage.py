"""Where runs live: a local folder or an object store, behind one path type (universal_pathlib.UPath)."""

import errno
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from upath import UPath

from pipeline.config import Config, ConfigError


def storage_root(config: Config) -> UPath:
    """`run.storage` as an absolute path; ConfigError if it cannot be written."""
    text = config.run.storage
    root = UPath(text) if "://" in text else UPath(os.path.abspath(os.path.expanduser(text)))
    try:
        root.mkdir(parents=True, exist_ok=True)
        probe = root / f".probe-{os.getpid()}"
        write_atomic(probe, b"longlora")
        if probe.read_bytes() != b"longlora":
            raise OSError("what was written does not read back")
        probe.unlink()
    except (OSError, ImportError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"run.storage = {text!r}: cannot be written ({reason}); give a writable folder or URI"
        ) from None
    return root


def run_folder(config: Config) -> UPath:
    """`<run.storage>/<run.name>`."""
    return storage_root(config) / config.run.name


def full_disk(error: BaseException) -> str:
    """One line for an error that says that storage takes no more; empty for any other."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        text = " ".join(str(error).split())
        return f"run.storage cannot be written: {text}; make room, the run goes on from its last checkpoint"
    return ""


def is_local(path: UPath) -> bool:
    return getattr(path, "protocol", "") in ("", "file", "local")


def write_atomic(path: UPath, data: bytes) -> None:
    """All of `data` at `path`, durably, or nothing: a reader never sees a part of it.

    Local: temporary file, fsync, rename, fsync of the folder. Object stores: a put is atomic already.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not is_local(path):
        path.write_bytes(data)
        return
    with _on_disk(path, data) as temporary:
        os.replace(temporary, str(path))
    sync_folder(path.parent)


def create_once(path: UPath, data: bytes) -> bool:
    """All of `data` at a path where nothing was, durably; False if there was something. One of several writers wins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not is_local(path):
        try:
            path.fs.pipe_file(path.path, data, mode="create")  # a put on condition that there is no such object
        except FileExistsError:
            return False
        return True
    try:
        with _on_disk(path, data) as temporary:
            os.link(temporary, str(path))
    except FileExistsError:
        return False
    sync_folder(path.parent)
    return True


@contextmanager
def _on_disk(path: UPath, data: bytes) -> Iterator[str]:
    """A temporary file beside a local `path`, with all of `data` on disk; afterwards it is gone, or renamed."""
    # Never a name that was used: a killed writer may leave its temporary file as a second name of what it wrote.
    temporary = f"{path}.tmp-{uuid.uuid4().hex}"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)


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


def read_json(path: UPath) -> Any:
    return json.loads(path.read_bytes())


def remove_tree(folder: UPath) -> None:
    """Deletes a folder and what is in it."""
    folder.fs.rm(folder.path, recursive=True)
