"""The connection to Ray: the cluster that the job runs on, or one of our own on this machine."""

import logging
import os
import secrets
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from pipeline.config import REPOSITORY, Config, ConfigError

T = TypeVar("T")

# Read by Ray Train when its controller starts. After a node dies, Train first waits for the old number of workers;
# 60 s of that is lost time on a cluster whose nodes come and go.
TRAIN_SETTINGS = {
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
}
HANG_TIMEOUT = "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"
# Where an object store is. What opens it stays out: Ray shows these variables to everybody who sees its dashboard.
OBJECT_STORE = ("AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION", "AWS_REGION")
# glibc gives large blocks back to the system at once and takes them again a moment later, each page cleared anew: a
# training step on CPU spends a quarter of its time there. Let it keep them.
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 33),
    "MALLOC_TOP_PAD_": str(1 << 27),
}
# Under ZeRO-3 each weight is there in full for a moment, between the shares that stay. Kept memory would be full of
# holes: three times a rank's share of the base instead of 1.1 times (docs/decisions.md, 8).
RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 18)}
# Gloo and NCCL listen on an interface of their own choice, mostly one that the network reaches.
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
COLLECTIVES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@contextmanager
def ray_session(config: Config) -> Iterator[None]:
    """Connects to the cluster that this job runs on, or starts Ray here with enough CPUs.

    The repository is put on the workers' path, so that the same line works from any folder.
    """
    for name, value in TRAIN_SETTINGS.items():
        os.environ.setdefault(name, value)
    os.environ[HANG_TIMEOUT] = str(config.workers.hang_timeout_s)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray Data's usage statistics take an actor, and a thread that goes on asking a Ray that has ended.
    os.environ.setdefault("RAY_DATA_USAGE_DISABLED", "1")
    os.environ.setdefault("RAY_worker_niceness", "0")  # 15 by default: anything else on the machine would starve a step
    import ray

    variables = worker_environment(config.workers.zero_stage)
    places = {name: os.environ[name] for name in OBJECT_STORE if name in os.environ}
    train_settings = {name: os.environ[name] for name in (*TRAIN_SETTINGS, HANG_TIMEOUT)}  # for the drivers of trials
    environment = {"env_vars": {"PYTHONPATH": str(REPOSITORY), **train_settings, **places, **variables}}
    quiet: dict[str, Any] = {
        "log_to_driver": False,  # the run's status line says what happens; workers' output is in Ray's log folder
        "logging_level": logging.ERROR,
    }
    if on_cluster():
        ray.init(runtime_env=environment, **quiet)
    else:
        environment["env_vars"] |= {name: os.environ.get(name, LOOPBACK) for name in COLLECTIVES}
        _start_here(config, runtime_env=environment, **quiet)
    signal.signal(signal.SIGTERM, _as_ctrl_c)  # in the place of Ray's own, which ends the driver at once
    try:
        yield
    finally:
        ray.shutdown()


def _start_here(config: Config, **settings: Any) -> None:
    """Starts Ray for this process alone: on loopback, with a token of its own, out of reach of other users."""
    import ray
    from ray._private import ray_constants

    # Where Ray takes part in no cluster it has loopback for the node's address, and listens nowhere else. A loopback
    # `_node_ip_address` it would replace by one that the network reaches.
    ray_constants.ENABLE_RAY_CLUSTER = False
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # Ray's own is in a file that all may read
    # Worker CPUs are a number to Ray, not a reservation of cores: a laptop with fewer can still run the recipe.
    workers = int(config.workers.max * config.workers.cpus)
    ray.init(
        address="local",
        num_cpus=max(workers + 1, os.cpu_count() or 1),
        include_dashboard=False,
        _temp_dir=str(private_folder() / "ray"),
        **settings,
    )


def private_folder() -> Path:
    """A temporary folder that only this user can open, for the files of Ray, which lets all write into its own.

    ConfigError if another user has taken its name.
    """
    folder = Path(tempfile.gettempdir()) / f"longlora-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.lstat().st_uid != os.getuid():
        raise ConfigError(f"{folder} belongs to another user: have it removed, or set TMPDIR to a folder of your own")
    folder.chmod(0o700)
    return folder


def _as_ctrl_c(number: int, frame: FrameType | None) -> None:
    """SIGTERM, as `ray job stop` sends it, ends a run as Ctrl-C does: what has been trained is saved first.

    The handler is called, not the signal sent: Ray starts a job's driver with SIGINT blocked.
    """
    handler = signal.getsignal(signal.SIGINT)
    (handler if callable(handler) else signal.default_int_handler)(number, frame)


def worker_environment(zero_stage: int) -> dict[str, str]:
    """Variables that must be there before a worker's process starts."""
    return {"TOKENIZERS_PARALLELISM": "false", **(RETURN_MEMORY if zero_stage == 3 else KEEP_MEMORY)}


def on_cluster() -> bool:
    """Whether this is a job on a cluster: `ray job submit` sets RAY_ADDRESS."""
    return bool(os.environ.get("RAY_ADDRESS"))


def run_where_the_gpus_are(config: Config, work: Callable[..., T], *arguments: Any) -> T:
    """`work(*arguments)`, here, or for a job on a cluster on a node with a GPU: the driver's node has none.

    What it prints there is printed here when it is done.
    """
    if not on_cluster():
        return work(*arguments)
    import ray
    from ray.exceptions import RayTaskError

    def there() -> tuple[T, str]:
        with redirect_stdout(StringIO()) as printed:
            result = work(*arguments)
        return result, printed.getvalue()

    with ray_session(config):
        task = ray.remote(num_cpus=1, num_gpus=int(uses_gpu(config)), max_retries=3)(there)
        try:
            result, printed = ray.get(task.remote())
        except RayTaskError as error:
            if isinstance(error.cause, ConfigError):
                raise error.cause from None  # a mistake in one line; anything else keeps its traceback
            raise
    print(printed, end="", flush=True)
    return result


def uses_gpu(config: Config) -> bool:
    """Whether workers get a GPU: as configured, or with "auto" if the cluster has any."""
    import ray

    if config.workers.gpus == "auto":
        return ray.cluster_resources().get("GPU", 0) > 0
    return config.workers.gpus > 0
