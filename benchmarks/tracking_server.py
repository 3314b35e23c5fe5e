"""A real `mlflow server` on loopback, over SQLite or PostgreSQL, that can be killed and started again: for tests.

with postgresql() as store:                      # a database on a Unix socket; or store = ""
    server = TrackingServer(folder, store)
    server.start()                               # server.uri answers
    server.kill(); server.start()                # it keeps its port and its data
"""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

START_TIMEOUT_S = 120.0
"""For what takes seconds on an idle machine."""
DEBIAN = "/usr/lib/postgresql"
"""Where Debian puts PostgreSQL's programs, a folder a version."""
SETTINGS = ("listen_addresses=", "fsync=off", "full_page_writes=off")
"""No port; and not even a crash of the machine has to be survived."""


class TrackingServer:
    """`mlflow server`; it keeps its port and its data when it is started again."""

    def __init__(self, folder: Path, store: str = "") -> None:
        """store: URI of its database; "" for a SQLite file in `folder`."""
        self.folder = folder
        self.store = store or f"sqlite:///{folder}/mlflow.db"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def runs(self) -> bool:
        """Whether it has been started, and not been killed since."""
        return self._process is not None

    def start(self) -> None:
        """Returns when it answers; TimeoutError if it does not."""
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", self.store, "--workers", "1"]
        command += ["--artifacts-destination", str(self.folder / "artifacts"), "--port", str(self.port)]
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                cwd=self.folder,
                env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if time.monotonic() > deadline:
                raise TimeoutError((self.folder / "server.log").read_text(encoding="utf-8")[-2000:])
            time.sleep(0.05)

    def send(self, number: signal.Signals) -> None:
        """A signal to all its processes."""
        assert self._process is not None
        os.killpg(self._process.pid, number)

    def kill(self) -> None:
        if self._process is not None:
            self.send(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        try:
            with urlopen(f"{self.uri}/health", timeout=2) as answer:
                return answer.status == 200
        except (URLError, OSError):
            return False


def postgresql_programs() -> Path | None:
    """The folder of PostgreSQL's server programs, the newest version's; None without one that can be run."""
    found = [Path(path).parent for path in [shutil.which("pg_ctl")] if path]
    found += sorted(Path(DEBIAN).glob("*/bin"), key=lambda programs: float(programs.parent.name))
    can_become_another = os.getuid() != 0 or (shutil.which("runuser") and _has_user("postgres"))
    return found[-1] if found and can_become_another else None


@contextmanager
def postgresql(programs: Path) -> Iterator[str]:
    """A new PostgreSQL, reached by a Unix socket and by nobody else; the URI of a database in it.

    As root it runs as the user postgres, for it refuses root.
    """
    folder = Path(tempfile.mkdtemp(prefix="pg-"))  # 0700, and short: a socket's path has 107 characters at most
    user: list[str] = []
    if os.getuid() == 0:
        shutil.chown(folder, "postgres")
        user = ["runuser", "-u", "postgres", "--"]
    data = str(folder / "data")

    def call(program: str, *arguments: str) -> None:
        command = [*user, str(programs / program), *arguments]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL, timeout=START_TIMEOUT_S)

    try:
        call("initdb", "--pgdata", data, "--username", "mlflow", "--auth", "trust", "--no-sync", "--encoding", "UTF8")
        options = " ".join(f"-c {setting}" for setting in (*SETTINGS, f"unix_socket_directories={folder}"))
        call("pg_ctl", "--pgdata", data, "--log", f"{folder}/log", "--wait", "--options", options, "start")
        try:
            yield f"postgresql+psycopg2://mlflow@/postgres?host={folder}"
        finally:
            call("pg_ctl", "--pgdata", data, "--wait", "--mode", "immediate", "stop")
    finally:
        shutil.rmtree(folder)


def _has_user(name: str) -> bool:
    try:
        pwd.getpwnam(name)
        return True
    except KeyError:
        return False
