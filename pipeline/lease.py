"""One driver to a run: a lease on its folder, kept alive by heartbeats.

`lease/<term>.json` names a holder. A term is created if and only if it is not there, which local disks and object
stores can both promise, and the highest term holds: whoever takes over writes the next one. `lease/<term>.beat` changes
while the holder lives, so that the clocks of two machines need not agree.
"""

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from upath import UPath

from pipeline.config import ConfigError
from pipeline.storage import create_once, json_bytes, read_json, write_json

BEAT_S = 5.0
EXPIRY_S = 30.0
"""A lease whose beat has not changed for so long is free."""


HELD = ("is working on this run", "another driver has")
"""One of these is in every error that says that a run is another driver's."""


class TakenOver(RuntimeError):
    """Another driver has the lease."""


@dataclass(frozen=True)
class Holder:
    """Processes that hold a lease: the driver, and the one that writes for it and keeps the beat."""

    host: str
    driver: int
    writer: int
    started: dict[str, str]
    """Start time of each process by its id, as the system counts it: ids are used again."""

    @staticmethod
    def here(driver: int) -> "Holder":
        writer = os.getpid()
        return Holder(socket.gethostname(), driver, writer, {str(pid): _start_of(pid) for pid in (driver, writer)})

    def state(self) -> str:
        """`alive`, `dead`, or `unknown` for processes of another machine and for a writer that outlives its driver."""
        if self.host != socket.gethostname() or not all(self.started.values()):
            return "unknown"
        living = {pid for pid in (self.driver, self.writer) if _start_of(pid) == self.started[str(pid)]}
        return "alive" if self.driver in living else "unknown" if self.writer in living else "dead"

    def is_orphaned(self) -> bool:
        """Whether the driver is known to be dead, though its writer may not have noticed yet."""
        known = self.host == socket.gethostname() and self.started[str(self.driver)]
        return bool(known) and _start_of(self.driver) != self.started[str(self.driver)]

    def __str__(self) -> str:
        return f"process {self.driver} on {self.host}"


class Lease:
    """A lease that is held until `release`, or until another driver takes over, which `check` and `lost` tell."""

    def __init__(self, run_folder: UPath, holder: Holder, lost: Callable[[], None] = lambda: None) -> None:
        """Takes the lease, waiting for a dead holder's to expire. ConfigError, naming the holder, if it is alive."""
        self._folder = run_folder / "lease"
        self._lost = lost
        term = _highest(self._folder)
        if term:
            _wait_until_free(self._folder, term)
        self._term = term + 1
        if not create_once(self._folder / f"{self._term}.json", json_bytes(asdict(holder))):
            raise ConfigError(f"{run_folder.name}: another driver has just taken this run")
        self._beat()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """TakenOver if another driver has taken over; asked before anything is committed."""
        if _highest(self._folder) != self._term:
            raise TakenOver(f"{self._folder.parent.name}: another driver has taken over this run")

    def release(self) -> None:
        """Ends the lease; the next driver need not wait."""
        self._ended.set()
        self._thread.join()
        with suppress(OSError):
            write_json(self._folder / f"{self._term}.beat", {"released": True})

    def _keep(self) -> None:
        while not self._ended.wait(BEAT_S):
            # A storage error, whatever its type, is none to end a run for: if it lasts, another driver may take over.
            with suppress(Exception):
                if _highest(self._folder) != self._term:
                    self._lost()
                    return
                self._beat()

    def _beat(self) -> None:
        write_json(self._folder / f"{self._term}.beat", {"beat": uuid.uuid4().hex})


def refuse_if_held(run_folder: UPath) -> None:
    """ConfigError if a process of this machine holds the run: known at once, before anything is started."""
    holder = holder_of(run_folder)
    if holder is not None and holder.state() == "alive":
        raise _held(run_folder / "lease", holder)


def holder_of(run_folder: UPath) -> Holder | None:
    """Who may be working on a run; None if the lease is free, or its holder is known to be dead."""
    folder = run_folder / "lease"
    term = _highest(folder)
    if not term or _beat_of(folder, term).get("released"):
        return None
    holder = Holder(**read_json(folder / f"{term}.json"))
    return None if holder.state() == "dead" else holder


def _held(folder: UPath, holder: Holder) -> ConfigError:
    return ConfigError(
        f"run.name = {folder.parent.name!r}: {holder} is working on this run; stop it first, "
        "or give this run another name"
    )


def _wait_until_free(folder: UPath, term: int) -> None:
    holder = Holder(**read_json(folder / f"{term}.json"))
    beat, since = _beat_of(folder, term), time.monotonic()
    if not beat.get("released") and holder.state() == "unknown":
        print(f"waiting for a sign of life of {holder}, {EXPIRY_S:.0f} s at most", flush=True)
    while not beat.get("released") and holder.state() != "dead":
        beats = _beat_of(folder, term) != beat
        if holder.state() == "alive" or (beats and not holder.is_orphaned()):
            raise _held(folder, holder)
        if time.monotonic() - since > EXPIRY_S:
            return
        time.sleep(1)


def _beat_of(folder: UPath, term: int) -> dict[str, Any]:
    with suppress(FileNotFoundError):
        return read_json(folder / f"{term}.beat")
    return {}


def _highest(folder: UPath) -> int:
    with suppress(FileNotFoundError, NotADirectoryError):  # before the first term there is no folder
        return max((int(path.stem) for path in folder.iterdir() if path.name.endswith(".json")), default=0)
    return 0


def _start_of(pid: int) -> str:
    """When a process of this machine started, in the system's ticks; empty if it has ended or cannot be known."""
    with suppress(OSError):
        stat = Path(f"/proc/{pid}/stat").read_text()
        state, start = stat.rpartition(")")[2].split()[0], stat.rpartition(")")[2].split()[19]
        return "" if state == "Z" else start
    return ""
