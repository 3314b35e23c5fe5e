"""The connection to Ray: the cluster that the job runs on, or one of our own on this machine."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.config import REPOSITORY, Config

# Read by Ray Train when its controller starts. After a node dies, Train first waits for the old number of workers;
# 60 s of that is lost time on a cluster whose nodes come and go.
TRAIN_SETTINGS = {
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
}
WORKER_ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false"}


@contextmanager
def ray_session(config: Config) -> Iterator[None]:
    """Connects to the cluster of RAY_ADDRESS (set by `ray job submit`), or starts Ray here with enough CPUs.

    The repository is put on the workers' path, so that the same line works from any folder.
    """
    for name, value in TRAIN_SETTINGS.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    # DeepSpeed compiles its CPU op with the ninja that it finds first: it must be the environment's, here and there.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    environment = {"env_vars": {"PYTHONPATH": str(REPOSITORY), "PATH": path, **WORKER_ENVIRONMENT}}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(runtime_env=environment, log_to_driver=False, logging_level="error")
    else:
        # Worker CPUs are a number to Ray, not a reservation of cores: a laptop with fewer can still run the recipe.
        workers = int(config.workers.max * config.workers.cpus)
        ray.init(
            address="local",
            num_cpus=max(workers + 1, os.cpu_count() or 1),
            include_dashboard=False,
            runtime_env=environment,
            log_to_driver=False,  # the run's status line says what happens; workers' output is in Ray's log folder
            logging_level="error",
        )
    try:
        yield
    finally:
        ray.shutdown()


def uses_gpu(config: Config) -> bool:
    """Whether workers get a GPU: as configured, or with "auto" if the cluster has any."""
    import ray

    if config.workers.gpus == "auto":
        return ray.cluster_resources().get("GPU", 0) > 0
    return config.workers.gpus > 0
