"""Whether the other nodes of the cluster reach the run's storage: asked before anything is made there."""

import uuid
from contextlib import suppress

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from upath import UPath

from pipeline.config import Config, ConfigError
from pipeline.storage import absolute_path, is_local, read_bytes, words, write_atomic

PATIENCE_S = 60.0
"""For a node's answer. One that is silent for longer is judged when it gets work."""


def check_all_nodes(config: Config) -> None:
    """ConfigError, naming the node, if one does not read what this one has written. Needs a connection to Ray."""
    here = ray.get_runtime_context().get_node_id()
    others = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    others.pop(here, None)
    if not others:
        return
    probe = absolute_path(config.run.storage) / f".probe-{uuid.uuid4().hex}"
    write_atomic(probe, b"longlora")
    try:
        look = ray.remote(num_cpus=0, max_retries=0)(what_is_wrong)
        asked = {
            look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
                str(probe)
            ): address
            for node, address in others.items()
        }
        for answer in ray.wait(list(asked), num_returns=len(asked), timeout=PATIENCE_S)[0]:
            with suppress(RayError):  # a node that has gone meanwhile
                wrong = ray.get(answer)
                if wrong:
                    raise ConfigError(f"run.storage = {config.run.storage!r}: {unreached(asked[answer], wrong)}")
    finally:
        probe.unlink()


def check_here(run_folder: UPath) -> None:
    """ConfigError if this node, which may have come later, does not have the folder of a run that is going on."""
    if is_local(run_folder) and not run_folder.exists():
        node = ray.util.get_node_ip_address()
        raise ConfigError(f"run.storage: {unreached(node, f'there is no {run_folder}')}")


def what_is_wrong(path: str) -> str:
    """Why this node does not read the file at `path`, in one line; empty if it does."""
    try:
        read_bytes(UPath(path))
    except Exception as error:  # each kind of storage has errors of its own
        return words(error)
    return ""


def unreached(node: str, reason: str) -> str:
    return f"node {node} does not see it ({reason}); give an object store, or a folder that all nodes share"
