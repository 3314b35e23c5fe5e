"""Whether the cluster can hold the workers that a config asks for, and how many."""

from collections.abc import Mapping

import ray
from ray.autoscaler.v2.utils import is_autoscaler_v2

from pipeline.config import Config, ConfigError
from pipeline.session import uses_gpu

Resources = Mapping[str, float]
ACCELERATOR = "accelerator_type:"  # and Ray's name of the GPU, as a resource of the node


def check_resources(config: Config) -> None:
    """ConfigError if a worker asks for what no node of this Ray has, and no autoscaler can bring."""
    if _may_grow():
        if config.workers.gpus == "auto" and not uses_gpu(config):
            raise ConfigError(
                "workers.gpus = 'auto': nodes may come, and none with a GPU is there to tell; give 0 or 1"
            )
        return
    bound = _autoscaler_bound() or {}
    for name, amount in worker_resources(config).items():
        largest = max((node.get(name, 0) for node in _nodes()), default=0)
        if largest < amount and bound.get(name, 0) < amount:
            reach = f"the largest node has {largest:g}" + (
                f", the autoscaler's limit is {bound.get(name, 0):g}" if bound else ""
            )
            raise ConfigError(
                f"workers: each needs {amount:g} {name}, and {reach}; lower the request or add such a node"
            )


def check_memory(config: Config) -> None:
    """Prints what the run will take on the GPUs of this Ray; ConfigError if it fits none of those that are known."""
    if not uses_gpu(config):
        return
    from pipeline.gpus import gpu_of_ray  # these build the model's shapes with transformers
    from pipeline.plan import make_plan
    from pipeline.plan_report import plan_line

    names = {name.removeprefix(ACCELERATOR) for node in _nodes() for name in node if name.startswith(ACCELERATOR)}
    gpus = [gpu for gpu in map(gpu_of_ray, sorted(names)) if gpu is not None]
    plans = [make_plan(config, gpu, config.workers.min) for gpu in gpus]
    for plan in plans:
        print(f"plan: {plan_line(plan)}", flush=True)
    if plans and not any(plan.fits for plan in plans):
        raise ConfigError(f"{plans[0].gpu.name}: {plans[0].reason}")


def room_for_workers(config: Config) -> int:
    """Workers that the cluster holds when it is empty, at the size that its autoscaler may bring it to.

    An autoscaler whose limits are not known is taken to bring what is asked for: one run, or the trials at once.
    """
    wanted = _wanted(config)
    now = sum(_fits(node, wanted) for node in _nodes())
    bound = _autoscaler_bound()
    asked = config.workers.min * (config.search.concurrent or 1) if _may_grow() else 0
    return max(now, _fits(bound, wanted) if bound else 0, asked)


class LargestCluster:
    """The cluster as it was when it had most nodes: those that are away for a moment may come back."""

    def __init__(self) -> None:
        self._nodes: list[Resources] = []

    def look(self) -> None:
        """Takes the nodes that are there now, if they are as many."""
        nodes = _nodes()
        if len(nodes) >= len(self._nodes):
            self._nodes = nodes

    def room_for_workers(self, config: Config) -> int:
        """The most workers that the cluster, when empty, has been known to hold, or can be brought to hold."""
        self.look()
        return max(room_for_workers(config), sum(_fits(node, _wanted(config)) for node in self._nodes))


def lack_of_room(config: Config, room: int) -> str:
    """One line if a cluster with room for so many workers cannot hold the run's: they would wait without end."""
    if room >= config.workers.min:
        return ""
    return f"workers.min is {config.workers.min}: the cluster has room for {room} such workers; lower it, or add nodes"


def worker_resources(config: Config) -> Resources:
    """What Ray sets aside for each worker."""
    gpu = {"GPU": 1} if uses_gpu(config) else {}
    return {"CPU": config.workers.cpus, **gpu, **config.workers.resources}


def _wanted(config: Config) -> Resources:
    return {name: amount for name, amount in worker_resources(config).items() if amount}


def _fits(available: Resources, wanted: Resources) -> int:
    return min(int(available.get(name, 0) / amount) for name, amount in wanted.items())


def _nodes() -> list[Resources]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _autoscaler_bound() -> Resources | None:
    """What an autoscaler may bring in all; None without one, and where it does not tell."""
    return ray._private.state.state.get_max_resources_from_cluster_config()


def _may_grow() -> bool:
    """Whether there is an autoscaler that does not tell its limits: of `ray up` and KubeRay, in Ray 2.60, none does."""
    return is_autoscaler_v2(fetch_from_server=True) and _autoscaler_bound() is None
