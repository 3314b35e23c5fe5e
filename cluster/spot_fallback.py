"""Moves node types that the cloud refuses to the end of the autoscaler's order, for ten minutes.

    python cluster/spot_fallback.py ~/ray_bootstrap_config.yaml          # on the head, beside `ray start`

Of node types that fit alike Ray takes the one of the highest `priority`, and means to pass over one that could not be
had of late. But its memory of those (CloudResourceMonitor, Ray 2.60) hears of machines that never start Ray, not of
launches that the cloud refuses: without spot machines it asks for spot machines without end, and never for on-demand
ones. It reads its config file anew every few seconds, though, and lists the refusals in the cluster's status.
"""

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from ray._private.services import canonicalize_bootstrap_address_or_die
from ray.autoscaler.v2.schema import ClusterStatus
from ray.autoscaler.v2.sdk import get_cluster_status

LOOK_S = 10.0
RECOVERY_S = 600.0  # what Ray's own memory has by default (RAY_AUTOSCALER_AVAILABILITY_RECOVERY_S)
# Taken from a priority in the file and given back, so that the file itself remembers which it had. Far from any that a
# user would write.
DEMOTION = 1_000_000


def refused_types(status: ClusterStatus, now: float) -> set[str]:
    """Node types of which a launch failed in the last RECOVERY_S."""
    launches = status.failed_launches
    return {launch.ray_node_type_name for launch in launches if (launch.failed_ts_s or 0) > now - RECOVERY_S}


def reorder(config: dict[str, Any], refused: set[str]) -> list[str]:
    """Sets the priorities of the node types; what changed, a line each."""
    changes = []
    for name, node_type in config["available_node_types"].items():
        priority = node_type.get("priority", 0)
        if name in refused and priority > -DEMOTION // 2:
            node_type["priority"] = priority - DEMOTION
            changes.append(f"{name}: refused by the cloud, comes last for {RECOVERY_S / 60:.0f} minutes")
        elif name not in refused and priority <= -DEMOTION // 2:
            node_type["priority"] = priority + DEMOTION
            changes.append(f"{name}: has its priority again, {node_type['priority']}")
    return changes


def update(path: Path, refused: set[str]) -> list[str]:
    """Reorders the config in the file, in one step for those who read it."""
    config = json.loads(path.read_text(encoding="utf-8"))
    changes = reorder(config, refused)
    if changes:
        new = path.with_suffix(".new")
        new.touch()
        shutil.copymode(path, new)
        new.write_text(json.dumps(config), encoding="utf-8")
        new.replace(path)
    return changes


def log(what: str) -> None:
    print(time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), what, flush=True)


def watch(path: Path) -> None:
    trouble = ""  # what was logged last, so that an hour without Ray is one line
    while True:
        try:
            status = get_cluster_status(canonicalize_bootstrap_address_or_die("auto"))
            for change in update(path, refused_types(status, time.time())):
                log(change)
            trouble = ""
        except Exception as error:  # of many kinds: Ray is not there yet, or is started again; each may pass
            line = str(error).strip().split("\n")[0] or type(error).__name__
            if line != trouble:
                log(f"{line}; trying again")
            trouble = line
        time.sleep(LOOK_S)


if __name__ == "__main__":
    watch(Path(sys.argv[1]).expanduser())
