"""Storage that is not the same on all nodes is refused before anything is made there."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import ray
from spot_cluster import SpotCluster
from upath import UPath

from pipeline.config import ConfigError
from pipeline.storage_probe import check_here

NODE = """
import signal, sys
from ray._private import ray_constants
ray_constants.ENABLE_RAY_CLUSTER = False  # on loopback, as the head
from ray._private.node import Node
from ray._private.parameter import RayParams
settings = dict(gcs_address=sys.argv[1], num_cpus=1, object_store_memory=10**8, include_log_monitor=False)
node = Node(RayParams(**settings, temp_dir=sys.argv[2]), head=False, shutdown_at_exit=False, spawn_reaper=False)
signal.signal(signal.SIGTERM, lambda *_: node.kill_all_processes(check_alive=False, allow_graceful=False))
signal.pause()
"""
MAY_MOUNT = subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0


def test_a_worker_on_a_node_without_the_folder_says_so(tmp_path: Path) -> None:
    check_here(UPath(tmp_path))
    with pytest.raises(ConfigError, match=r"run\.storage: node .* does not see it \(there is no .*/run\)"):
        check_here(UPath(tmp_path / "run"))


@pytest.mark.skipif(not MAY_MOUNT, reason="a second node with a disk of its own: needs root and unshare")
def test_a_folder_that_one_node_does_not_share(make_run: Callable, tmp_path: Path) -> None:
    made = make_run("run")
    with SpotCluster() as cluster:
        mounts = f'mount -t tmpfs none {tmp_path} && exec "$@"'
        starts = [sys.executable, "-c", NODE, cluster.address, f"{cluster.scratch}/other"]
        node = subprocess.Popen(["unshare", "-m", "sh", "-c", mounts, "sh", *starts], stdout=subprocess.DEVNULL)
        try:
            wait_for_nodes(cluster.address, 2)
            run = subprocess.run(
                made.command("train"),
                env={**os.environ, "RAY_ADDRESS": cluster.address},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        finally:
            node.terminate()
            node.wait(timeout=60)
    assert run.returncode == 2, run.stdout
    assert "does not see it" in run.stdout.splitlines()[-1] and "that all nodes share" in run.stdout.splitlines()[-1]
    assert not list((tmp_path / "storage").glob("*")), "nothing is left, and nothing has been made"


def wait_for_nodes(address: str, count: int) -> None:
    ray.init(address=address)
    try:
        until = time.monotonic() + 120
        while sum(node["Alive"] for node in ray.nodes()) < count:
            assert time.monotonic() < until
            time.sleep(0.5)
    finally:
        ray.shutdown()
