import threading
import time
from types import SimpleNamespace

import pytest
import torch

from pipeline import system_metrics
from pipeline.system_metrics import Gpus, Sample, Sampler, host_sample


def test_the_host_has_these() -> None:
    sample = host_sample()
    assert list(sample) == [
        "cpu_utilization_percentage",
        "system_memory_usage_megabytes",
        "system_memory_usage_percentage",
    ]
    assert 0 <= sample["cpu_utilization_percentage"] <= 100 and 0 < sample["system_memory_usage_percentage"] <= 100


def test_samples_are_told_until_the_end_and_no_error_ends_them() -> None:
    told: list[Sample] = []
    enough = threading.Event()

    def tell(sample: Sample) -> None:
        told.append(sample)
        if len(told) == 2:
            raise RuntimeError("the run's log is gone")
        if len(told) == 4:
            enough.set()

    with Sampler(tell, Gpus(), interval_s=0.01) as sampler:
        assert enough.wait(30)
    sampler._thread.join(30)
    count = len(told)
    time.sleep(0.1)
    assert len(told) == count and not sampler._thread.is_alive()


def test_a_sampler_that_hangs_holds_up_nothing() -> None:
    """As NVML does where a GPU has fallen off its bus."""
    hangs = threading.Event()
    began = threading.Event()

    def tell(sample: Sample) -> None:
        began.set()
        hangs.wait(60)

    with Sampler(tell, Gpus(), interval_s=0.01):
        assert began.wait(30)
        before = time.perf_counter()
    assert time.perf_counter() - before < 1
    hangs.set()


def test_gpus_have_mlflows_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs of which the second has failed; this worker's own is the first."""

    class Nvml:
        NVMLError = ValueError

        @staticmethod
        def nvmlInit() -> None: ...

        @staticmethod
        def nvmlDeviceGetHandleByUUID(uuid: str) -> str:
            return uuid

        @staticmethod
        def nvmlDeviceGetMemoryInfo(handle: str) -> SimpleNamespace:
            if handle == "GPU-b":
                raise ValueError("GPU is lost")
            return SimpleNamespace(used=20_000_000_000, total=80_000_000_000)

        @staticmethod
        def nvmlDeviceGetUtilizationRates(handle: str) -> SimpleNamespace:
            return SimpleNamespace(gpu=97)

    monkeypatch.setattr(system_metrics, "pynvml", Nvml)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="ab"[index]))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 18_000_000_000)
    assert Gpus().sample() == {
        "gpu_0_utilization_percentage": 97,
        "gpu_0_memory_usage_megabytes": 20_000,
        "gpu_0_memory_usage_percentage": 25.0,
        "gpu_0_peak_allocated_megabytes": 18_000,
    }


def test_without_a_gpu_there_is_none() -> None:
    assert Gpus().sample() == {}
