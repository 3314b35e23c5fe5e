"""An object store on loopback, in a process of its own, that can be stopped and can fail: for tests and chaos.

    with object_store() as store:                   # moto's S3 on a free port, one bucket
        environment |= store.environment            # AWS_ENDPOINT_URL, credentials, region
        storage = f"s3://{store.bucket}/runs"
        store.fail(method="PUT", times=2)           # the next two writes are told to slow down
        store.pause(); store.resume()               # an outage: connections are taken, nobody answers

Objects are kept in memory until the server ends. Requests are served one after the other, so that a conditional write
is as atomic as that of a real store: moto looks and writes in two steps.
"""

import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from io import BytesIO
from threading import Lock
from typing import Any
from urllib.parse import urlsplit

HOST = "127.0.0.1"
FAULTS = "/_faults"
"""Where the server is told to fail; no bucket may have this name."""


@dataclass
class Fault:
    """Requests that are answered with an error."""

    status: int = 503
    code: str = "SlowDown"
    method: str = ""
    """GET, PUT, …; "" for any."""
    path: str = ""
    """Part of the path, e.g. the name of a file; "" for any."""
    times: int = 1
    done: bool = False
    """Whether the request is carried out before the error is answered: an answer that got lost."""

    def takes(self, environ: dict[str, Any]) -> bool:
        return self.times > 0 and self.method in ("", environ["REQUEST_METHOD"]) and self.path in environ["PATH_INFO"]


@dataclass
class ObjectStore:
    """A running server."""

    endpoint: str
    bucket: str
    process: "subprocess.Popen[str]"

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to reach the store."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def pause(self) -> None:
        """An outage: from now on nothing is answered."""
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def fail(self, **fault: Any) -> None:
        """Sets what fails from now on, a `Fault`; without arguments 503 SlowDown, once. Replaces the last one."""
        self._request("POST", FAULTS, json.dumps(asdict(Fault(**fault))).encode())

    def heal(self) -> None:
        self.fail(times=0)

    def create_bucket(self, name: str) -> None:
        self._request("PUT", f"/{name}", b"")

    def _request(self, method: str, path: str, body: bytes) -> None:
        connection = http.client.HTTPConnection(urlsplit(self.endpoint).netloc, timeout=30)
        try:
            connection.request(method, path, body)
            response = connection.getresponse()
            text = response.read()
            if response.status >= 300:
                raise RuntimeError(f"{method} {path}: {response.status} {text[:200]!r}")
        finally:
            connection.close()


@contextmanager
def object_store(bucket: str = "bucket") -> Iterator[ObjectStore]:
    """Starts a server with one bucket, and ends it afterwards."""
    command = [sys.executable, os.path.abspath(__file__)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        port = process.stdout.readline().strip()
        if not port:
            raise RuntimeError("the object store did not start; is moto installed (the dev extra)?")
        store = ObjectStore(f"http://{HOST}:{port}", bucket, process)
        store.create_bucket(bucket)
        yield store
    finally:
        process.kill()  # also one that is stopped
        process.wait()


Respond = Callable[[str, list[tuple[str, str]]], Any]


class OneAtATime:
    """A WSGI application whose requests are served one after the other, and fail when they are told to."""

    def __init__(self, application: Callable[[dict[str, Any], Respond], Iterable[bytes]]) -> None:
        self.application = application
        self.fault = Fault(times=0)
        self.lock = Lock()

    def __call__(self, environ: dict[str, Any], respond: Respond) -> Iterable[bytes]:
        from werkzeug.wsgi import get_input_stream

        # Read before the lock is taken: a client that stops in the middle of its request holds up nobody.
        body = get_input_stream(environ).read()
        environ |= {"wsgi.input": BytesIO(body), "CONTENT_LENGTH": str(len(body))}
        with self.lock:
            if environ["PATH_INFO"] == FAULTS:
                self.fault = Fault(**json.loads(body))
                respond("200 OK", [])
                return []
            if not self.fault.takes(environ):
                return list(self.application(environ, respond))
            self.fault.times -= 1
            if self.fault.done:
                list(self.application(environ, lambda *_: None))
            answer = f"<Error><Code>{self.fault.code}</Code><Message>as told</Message></Error>".encode()
            respond(f"{self.fault.status} Fault", [("Content-Type", "application/xml")])
            return [b"" if environ["REQUEST_METHOD"] == "HEAD" else answer]


def serve() -> None:
    """Serves until it is killed; prints the port."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    application = OneAtATime(DomainDispatcherApplication(create_backend_app))
    server = make_server(HOST, 0, application, threaded=True)
    print(server.port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    serve()
