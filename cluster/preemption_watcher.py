"""Drains this machine's Ray node when the cloud announces that it takes the machine back.

    python cluster/preemption_watcher.py                        # beside `ray start`, on every preemptible node
    python cluster/preemption_watcher.py --cloud aws --endpoint http://127.0.0.1:8000     # against a stand-in

Ray does not look at the clouds' metadata. A node that is drained with the reason "preemption" gives Ray Train the
notice and its deadline: all workers save the step that they are at, and go on training until the machine is gone.
"""

import argparse
import ipaddress
import json
import math
import os
import re
import sys
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from email.message import Message
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from importlib.util import find_spec
from typing import Any, NamedTuple, NoReturn, Protocol
from urllib.error import HTTPError
from urllib.parse import urlsplit

METADATA = "http://169.254.169.254"  # link-local, the same in all three clouds
TIMEOUT_S = 2.0  # a metadata service on the host answers in milliseconds
ANSWER_BYTES = 1 << 20
RETRY_S = 1.0  # between attempts to drain
# By itself Ray waits 40 s for a control service (GCS) that does not answer, longer than notices of GCP and Azure last.
# With these settings an attempt ends after 4 s.
RAY_PATIENCE = {"RAY_py_gcs_connect_timeout_s": "2", "RAY_gcs_rpc_server_connect_timeout_s": "1"}


class Unusable(Exception):
    """The metadata endpoint gave no usable answer."""


class NotDrained(Exception):
    """An attempt to drain failed; the next may succeed."""


class Notice(NamedTuple):
    key: str  # the same whenever the same notice is read again
    deadline: float  # Unix time in seconds, when the machine goes
    what: str


class Cloud(Protocol):
    name: str
    interval_s: float  # between two looks

    def __init__(self, endpoint: str) -> None: ...
    def is_here(self) -> bool: ...
    def notice(self) -> Notice | None: ...


class Answer(NamedTuple):
    status: int
    headers: Message
    body: str


# Metadata is on the link: a proxy in the environment would answer for another machine, or not at all.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def ask(url: str, headers: dict[str, str], method: str = "GET") -> Answer:
    """The answer, whatever its status; Unusable if there is none."""
    request = urllib.request.Request(url, headers=headers, method=method)
    try:
        with _DIRECT.open(request, timeout=TIMEOUT_S) as response:
            return Answer(response.status, response.headers, response.read(ANSWER_BYTES).decode())
    except HTTPError as refusal:
        with refusal:
            return Answer(refusal.code, refusal.headers, "")
    except (OSError, UnicodeDecodeError) as error:
        raise Unusable(f"{url}: {getattr(error, 'reason', error)}") from None
    except HTTPException as error:  # its text may be what came over the line
        raise Unusable(f"{url}: no answer in HTTP, {type(error).__name__}") from None


def ask_for_text(url: str, headers: dict[str, str]) -> str:
    answer = ask(url, headers)
    if answer.status != 200:
        raise Unusable(f"{url}: HTTP {answer.status}")
    return answer.body.strip()


class Aws:
    """EC2: `spot/instance-action` is 404 until two minutes before the action, and then names its time.

    A rebalance recommendation, which is another address, is no notice: most such machines live on for hours.
    https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html
    """

    name = "AWS"
    interval_s = 2.0  # AWS recommends 5 s; so the node is drained within 5 s of the notice

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.token = ""

    def is_here(self) -> bool:
        headers = {"X-aws-ec2-metadata-token-ttl-seconds": "21600"}
        answer = ask(f"{self.endpoint}/latest/api/token", headers, method="PUT")
        self.token = answer.body if answer.status == 200 else ""
        return bool(self.token)

    def notice(self) -> Notice | None:
        url = f"{self.endpoint}/latest/meta-data/spot/instance-action"
        answer = ask(url, {"X-aws-ec2-metadata-token": self.token})
        if answer.status == 401 and self.is_here():  # there was no token yet, or it has expired
            answer = ask(url, {"X-aws-ec2-metadata-token": self.token})
        if answer.status == 404:
            return None
        if answer.status != 200:
            raise Unusable(f"{url}: HTTP {answer.status}")
        try:
            action = json.loads(answer.body)
            deadline = datetime.fromisoformat(action["time"]).timestamp()
            return Notice(answer.body, deadline, f"{action['action']} at {action['time']}")
        except (ValueError, KeyError, TypeError):
            raise Unusable(f"{url}: unreadable: {answer.body[:200]!r}") from None


class Gcp:
    """Compute Engine: `instance/preempted` turns from FALSE to TRUE, without a time; the machine has 30 s left.

    Plain polling instead of `wait_for_change`: a request that hangs for hours can die unseen on its way.
    https://cloud.google.com/compute/docs/instances/create-use-spot
    """

    name = "GCP"
    interval_s = 1.0  # what passes unseen is lost from the 30 s
    window_s = 30.0

    def __init__(self, endpoint: str) -> None:
        self.url = f"{endpoint}/computeMetadata/v1/instance"

    def is_here(self) -> bool:
        answer = ask(f"{self.url}/id", {"Metadata-Flavor": "Google"})
        return answer.status == 200 and answer.headers.get("Metadata-Flavor") == "Google"

    def notice(self) -> Notice | None:
        preempted = ask_for_text(f"{self.url}/preempted", {"Metadata-Flavor": "Google"})
        if preempted not in ("TRUE", "FALSE"):
            raise Unusable(f"{self.url}/preempted: unreadable: {preempted[:200]!r}")
        return Notice("preempted", time.time() + self.window_s, "preempted") if preempted == "TRUE" else None


class Azure:
    """Scheduled Events: the events of all machines of a scale set; one of type Preempt that names this machine counts.

    They are never acknowledged: that would bring the end forward.
    https://learn.microsoft.com/en-us/azure/virtual-machines/linux/scheduled-events
    """

    name = "Azure"
    interval_s = 1.0  # what passes unseen is lost from the 30 s

    def __init__(self, endpoint: str) -> None:
        self.events_url = f"{endpoint}/metadata/scheduledevents?api-version=2020-07-01"
        self.name_url = f"{endpoint}/metadata/instance/compute/name?api-version=2020-06-01&format=text"
        self.machine = ""

    def is_here(self) -> bool:
        self.machine = ask_for_text(self.name_url, {"Metadata": "true"})
        return bool(self.machine)

    def notice(self) -> Notice | None:
        self.machine = self.machine or ask_for_text(self.name_url, {"Metadata": "true"})
        body = ask_for_text(self.events_url, {"Metadata": "true"})
        try:
            events = [event for event in json.loads(body)["Events"] if self._takes_this_machine(event)]
            return self._read(events[0]) if events else None
        except (ValueError, KeyError, TypeError):
            raise Unusable(f"{self.events_url}: unreadable: {body[:200]!r}") from None

    def _takes_this_machine(self, event: dict[str, Any]) -> bool:
        names = [name.lower() for name in event["Resources"]]
        return event["EventType"] == "Preempt" and self.machine.lower() in names

    def _read(self, event: dict[str, Any]) -> Notice:
        at = event["NotBefore"]  # empty once the event has started
        deadline = parsedate_to_datetime(at).timestamp() if at else time.time()
        return Notice(event["EventId"], deadline, f"preempted, not before {at}" if at else "preemption has started")


CLOUDS: dict[str, type[Cloud]] = {"aws": Aws, "gcp": Gcp, "azure": Azure}


def detect(endpoint: str) -> Cloud:
    """The cloud whose metadata service answers in its own way."""
    for kind in CLOUDS.values():
        cloud = kind(endpoint)
        with suppress(Unusable):
            if cloud.is_here():
                return cloud
    raise Unusable(f"no cloud's metadata service answers at {endpoint}")


class LocalNodes:
    """The Ray nodes that live on this machine: the one with `node_id`, or those at `node_ip`.

    By default `node_ip` is the address that `ray start` takes when it is told none. The GCS is asked anew each time:
    a raylet that is started again is another node, and draining a node that is dead or unknown is silently accepted.
    """

    def __init__(self, address: str | None, node_id: str | None, node_ip: str | None) -> None:
        self.address = address
        self.node_id = node_id
        self.node_ip = node_ip

    def find(self) -> tuple[Any, list[str]]:
        """A client of the GCS and the hex ids of the live nodes; NotDrained if there is none."""
        from ray._private.services import canonicalize_bootstrap_address_or_die, get_node_ip_address
        from ray._raylet import GcsClient
        from ray.core.generated.gcs_pb2 import GcsNodeInfo

        try:
            address = canonicalize_bootstrap_address_or_die(self.address)
            gcs = GcsClient(address=address)
            alive = gcs.get_all_node_info(timeout=TIMEOUT_S, state_filter=GcsNodeInfo.ALIVE)
            node_ip = None if self.node_id else self.node_ip or get_node_ip_address(address)
        except Exception as error:  # of many kinds: not reachable, not started yet, wrong token; each may pass
            raise NotDrained(f"cannot ask the Ray cluster: {_first_line(error)}") from None
        ips = {node_id.hex(): node.node_manager_address for node_id, node in alive.items()}
        found = [node_id for node_id, ip in ips.items() if self.node_id in (None, node_id) and node_ip in (None, ip)]
        if not found:
            raise NotDrained(f"the Ray cluster at {address} has no live node {self.node_id or f'at {node_ip}'}")
        return gcs, found

    def drain(self, notice: Notice) -> list[str]:
        """Hex ids of the nodes drained; NotDrained if there is none, or not all of them are."""
        from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION

        deadline_ms = int(notice.deadline * 1000)
        gcs, node_ids = self.find()
        for node_id in node_ids:
            try:
                accepted, why_not = gcs.drain_node(
                    node_id, DRAIN_NODE_REASON_PREEMPTION, notice.what, deadline_ms, timeout=TIMEOUT_S
                )
            except Exception as error:  # as above
                raise NotDrained(f"node {node_id}: {_first_line(error)}") from None
            if not accepted:
                raise NotDrained(f"node {node_id}: refused: {why_not}")
        return node_ids


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


class Watcher:
    """Looks for a notice, and carries it out once."""

    def __init__(self, find_cloud: Callable[[], Cloud], drain: Callable[[Notice], list[str]]) -> None:
        self.find_cloud = find_cloud
        self.drain = drain
        self.cloud: Cloud | None = None
        self.known: set[str] = set()  # keys of notices
        self.pending: Notice | None = None
        self.trouble = ""  # what was logged last, so that an hour without an endpoint is one line

    def poll(self) -> None:
        if not self.pending:
            self._look()
        if self.pending:
            self._carry_out(self.pending)

    def _look(self) -> None:
        try:
            if not self.cloud:
                self.cloud = self.find_cloud()
                log(f"watching {self.cloud.name}")
            notice = self.cloud.notice()
        except Unusable as error:
            self._say(f"{error}; trying again")
            return
        if self.trouble:
            log("the metadata service answers again")
            self.trouble = ""
        if notice and notice.key not in self.known:
            log(f"notice: {notice.what}; {notice.deadline - time.time():.0f} s left")
            self.known.add(notice.key)
            self.pending = notice

    def _carry_out(self, notice: Notice) -> None:
        try:
            for node_id in self.drain(notice):
                log(f"drained node {node_id}")
        except NotDrained as error:
            if time.time() < notice.deadline:
                self._say(f"not drained: {error}; trying again until {timestamp(notice.deadline)}")
                return
            log(f"given up at the deadline, not drained: {error}")
        self.pending, self.trouble = None, ""

    def _say(self, trouble: str) -> None:
        if trouble != self.trouble:
            log(trouble)
            self.trouble = trouble


def timestamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def log(what: str) -> None:
    print(timestamp(time.time()), what, flush=True)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def _endpoint(text: str) -> str:
    if not _is_url(text) or urlsplit(text).scheme not in ("http", "https"):
        raise argparse.ArgumentTypeError(f"{text!r} is no address like http://127.0.0.1:8000")
    return text.rstrip("/")


def _address(text: str) -> str:
    if not re.fullmatch(r"[^\s/@]+:\d+", text) or not _is_url(f"//{text}"):
        raise argparse.ArgumentTypeError(f"{text!r} is no address of a Ray cluster like 10.0.0.1:6379")
    return text


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:  # such as port 70000
        return False


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= 60:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0 and up to 60")
    return seconds


def _node_id(text: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{56}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no id of a Ray node, which has 56 hexadecimal digits")
    return text


def _ip(text: str) -> str:
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no IP address") from None


def parser() -> Parser:
    top = Parser(description=(__doc__ or "").split("\n")[0])
    add = top.add_argument
    add("--cloud", choices=["auto", *CLOUDS], default="auto", help="whose metadata (default: auto)")
    add("--endpoint", type=_endpoint, default=METADATA, metavar="URL", help=f"its metadata (default: {METADATA})")
    add("--interval", type=_seconds, metavar="S", help="between two looks (default: 5 on AWS, 1 on GCP and Azure)")
    add("--address", type=_address, help="the Ray cluster (default: RAY_ADDRESS, or what this machine joined last)")
    node = top.add_mutually_exclusive_group()
    node.add_argument("--node-id", type=_node_id, help="the Ray node to drain (default: all on this machine)")
    node.add_argument("--node-ip", type=_ip, help="where it is, if `ray start` was given another address than its own")
    return top


def main() -> NoReturn:
    options = parser().parse_args()
    if find_spec("ray") is None:
        parser().error(f"Ray is not installed for {sys.executable}")
    os.environ.update({**RAY_PATIENCE, **os.environ})  # read when Ray is first imported
    nodes = LocalNodes(options.address, options.node_id, options.node_ip)
    try:
        log(f"node to drain: {', '.join(nodes.find()[1])}")
    except NotDrained as error:
        log(f"no node to drain yet: {error}")
    cloud = CLOUDS.get(options.cloud, detect)
    watcher = Watcher(lambda: cloud(options.endpoint), nodes.drain)
    while True:
        watcher.poll()
        look_s = options.interval or (watcher.cloud or Aws).interval_s
        time.sleep(RETRY_S if watcher.pending else look_s)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
