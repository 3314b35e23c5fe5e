"""CPU, memory and GPUs of the nodes, told to the run's log while workers train, and never in the way of a step.

One worker of each node samples it, in a thread of its own, under the names that MLflow gives its system metrics.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil
import ray.train
import torch
import torch.distributed as dist

# NVML's binding, which Ray brings: an internal of Ray, whose versions are pinned. PyPI's would be one more dependency.
from ray._private.thirdparty import pynvml

INTERVAL_S = 10.0

Sample = dict[str, float]


@contextmanager
def sampling(run_log: Any, attempt: int) -> Iterator[None]:
    """Samples this worker's node while the block runs, if it is the first on it. A collective: all workers call it."""
    place = ray.train.get_context()
    nodes: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(nodes, place.get_node_rank())
    where = {"node": place.get_node_rank(), "nodes": len(set(nodes))}
    if place.get_local_rank():
        yield
        return
    with Sampler(lambda sample: run_log.sampled.remote(attempt, {**where, "values": sample}), Gpus()):
        yield


class Sampler:
    """A thread that samples every so many seconds, until the end of the block that it is the context of."""

    def __init__(self, tell: Callable[[Sample], Any], gpus: "Gpus", interval_s: float = INTERVAL_S) -> None:
        self._tell, self._gpus, self._interval_s = tell, gpus, interval_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="system metrics", daemon=True)

    def __enter__(self) -> "Sampler":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()  # not waited for: the driver of a GPU that has failed may not return

    def _run(self) -> None:
        psutil.cpu_percent()  # what follows counts from here
        while not self._ended.wait(self._interval_s):
            with suppress(Exception):  # of Ray at its end, or of the system: training has its own view of it
                self._tell(host_sample() | self._gpus.sample())


def host_sample() -> Sample:
    """Utilisation of the CPUs since the last call, and the host's memory; megabytes are 10⁶ bytes, as in MLflow."""
    memory = psutil.virtual_memory()
    return {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": round(memory.used / 1e6),
        "system_memory_usage_percentage": round(100 * memory.used / memory.total, 1),
    }


class Gpus:
    """The GPUs that the workers of this node have; none where this one does not train on a GPU."""

    def __init__(self) -> None:
        self._handles: dict[int, Any] = {}
        self._own = torch.cuda.current_device() if torch.cuda.is_initialized() else None  # another in another thread
        self._peak = 0
        if self._own is not None:
            with suppress(pynvml.NVMLError):  # without NVML, or for a part of a GPU, there is the memory of our own
                pynvml.nvmlInit()
                for index in range(torch.cuda.device_count()):
                    uuid = torch.cuda.get_device_properties(index).uuid
                    self._handles[index] = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")

    def sample(self) -> Sample:
        """Utilisation and memory of each, and the most that this worker's tensors have taken of its own so far."""
        sample: Sample = {}
        for index, handle in self._handles.items():
            with suppress(pynvml.NVMLError):  # one that has failed has no values; the others have theirs
                memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
                sample |= {
                    f"gpu_{index}_utilization_percentage": pynvml.nvmlDeviceGetUtilizationRates(handle).gpu,
                    f"gpu_{index}_memory_usage_megabytes": round(memory.used / 1e6),
                    f"gpu_{index}_memory_usage_percentage": round(100 * memory.used / memory.total, 1),
                }
        if self._own is not None:
            # The meter begins anew with every step.
            self._peak = max(self._peak, torch.cuda.max_memory_allocated(self._own))
            sample[f"gpu_{self._own}_peak_allocated_megabytes"] = round(self._peak / 1e6)
        return sample
