"""The clouds' metadata services, on loopback: for tests of the watcher, and of runs under it.

with serving("aws") as service:                       # or "gcp", "azure"
    …                                                 # the watcher: --cloud aws --endpoint {service.endpoint}
    service.metadata.announce(time.time() + 120)      # the machine is taken back then
"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

Response = tuple[int, dict[str, str], str]
"""Status, headers, body."""


class AwsMetadata:
    """EC2 that insists on IMDSv2; it has a rebalance recommendation all the time."""

    def __init__(self) -> None:
        self.action: str | None = None
        self.token = "token-1"

    def announce(self, deadline: float) -> None:
        at = datetime.fromtimestamp(deadline, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        self.action = json.dumps({"action": "terminate", "time": at})

    def answer(self, method: str, url: str, headers: Any) -> Response:
        if url == "/latest/api/token":
            asked_well = method == "PUT" and 0 < int(headers.get("X-aws-ec2-metadata-token-ttl-seconds", 0)) <= 21600
            return (200, {}, self.token) if asked_well else (400, {}, "Bad Request")
        if headers.get("X-aws-ec2-metadata-token") != self.token:
            return 401, {}, "Unauthorized"
        if url == "/latest/meta-data/events/recommendations/rebalance":
            return 200, {}, '{"noticeTime": "2026-01-01T00:00:00Z"}'
        if url == "/latest/meta-data/spot/instance-action" and self.action:
            return 200, {"Content-Type": "application/json"}, self.action
        return 404, {}, "Not Found"


class GcpMetadata:
    def __init__(self) -> None:
        self.preempted = "FALSE"

    def announce(self, deadline: float) -> None:
        self.preempted = "TRUE"  # without a time

    def answer(self, method: str, url: str, headers: Any) -> Response:
        google = {"Metadata-Flavor": "Google", "Content-Type": "application/text"}
        if headers.get("Metadata-Flavor") != "Google":
            return 403, google, "Missing Metadata-Flavor:Google header."
        known = {
            "/computeMetadata/v1/instance/id": "4520031799277581759",
            "/computeMetadata/v1/instance/preempted": self.preempted,
        }
        return (200, google, known[url]) if method == "GET" and url in known else (404, google, "")


class AzureMetadata:
    """A machine of a scale set: it sees the events of the others too."""

    def __init__(self) -> None:
        self.events = [self.event("Preempt", "spot_7", time.time() + 30), self.event("Reboot", "spot_3", time.time())]

    def event(self, kind: str, machine: str, not_before: float | None) -> dict[str, Any]:
        return {
            "EventId": f"{kind}-{machine}",
            "EventType": kind,
            "ResourceType": "VirtualMachine",
            "Resources": ["spot_1", machine],
            "EventStatus": "Scheduled" if not_before else "Started",
            "NotBefore": format_datetime(datetime.fromtimestamp(not_before, UTC), usegmt=True) if not_before else "",
        }

    def announce(self, deadline: float | None) -> None:
        self.events.append(self.event("Preempt", "SPOT_3", deadline))

    def answer(self, method: str, url: str, headers: Any) -> Response:
        parts = urlsplit(url)
        version = parse_qs(parts.query).get("api-version")
        if headers.get("Metadata") != "true" or not version or method != "GET":
            return 400, {}, '{"error": "Bad request"}'
        if parts.path == "/metadata/instance/compute/name" and "format=text" in parts.query:
            return 200, {}, "spot_3"
        if parts.path == "/metadata/scheduledevents" and version == ["2020-07-01"]:
            return 200, {}, json.dumps({"DocumentIncarnation": 1, "Events": self.events})
        return 404, {}, ""


METADATA = {"aws": AwsMetadata, "gcp": GcpMetadata, "azure": AzureMetadata}


class Service:
    """A metadata service on loopback, which can be switched off and on, and can answer wrongly."""

    def __init__(self, metadata: Any) -> None:
        self.metadata = metadata
        self.failure: Callable[[BaseHTTPRequestHandler], None] | None = None
        self.port = 0
        self.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        service = self

        class Handler(BaseHTTPRequestHandler):
            def respond(self) -> None:
                if service.failure:
                    return service.failure(self)
                status, headers, body = service.metadata.answer(self.command, self.path, self.headers)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body.encode())

            do_GET = do_PUT = respond

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@contextmanager
def serving(name: str) -> Iterator[Service]:
    service = Service(METADATA[name]())
    try:
        yield service
    finally:
        service.stop()
