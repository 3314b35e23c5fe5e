"""GPU types that `plan` knows: memory, and the rates that large products and copies reach."""

import re
from dataclasses import dataclass

from longlora.roofline import Rates
from pipeline.config import ConfigError

OVERHEAD_GIB = 1.5
"""Of the memory that torch reports: CUDA's context, cuBLAS, NCCL."""

_PRODUCTS, _COPIES = 0.67, 0.87  # of a datasheet's dense bf16 rate and bandwidth: what the measured cards reach


@dataclass(frozen=True)
class Gpu:
    name: str
    memory_gib: float
    """As torch reports it."""
    peak: float
    """Dense bf16 operations a second, by the datasheet."""
    rates: Rates
    """What large products and copies reach."""
    source: str
    """Where the rates are from."""

    @property
    def usable_gib(self) -> float:
        return self.memory_gib - OVERHEAD_GIB


def _measured(name: str, memory_gib: float, tflops: float, product: float, copy: float) -> Gpu:
    source = f"measured: {product:g} TFLOP/s, {copy:g} TB/s"
    return Gpu(name, memory_gib, tflops * 1e12, Rates(product * 1e12, copy * 1e12), source)


def _datasheet(name: str, memory_gib: float, tflops: float, terabytes: float) -> Gpu:
    rates = Rates(tflops * 1e12 * _PRODUCTS, terabytes * 1e12 * _COPIES)
    return Gpu(
        name,
        memory_gib,
        tflops * 1e12,
        rates,
        f"{_PRODUCTS:.0%} of {tflops:g} TFLOP/s, {_COPIES:.0%} of {terabytes:g} TB/s",
    )


# H200 and H100 (SXM, 700 W): benchmarks/gpu_rates.py, "later", 2026-11-26. Others: the vendors' datasheets, dense bf16.
GPUS = {
    gpu.name: gpu
    for gpu in (
        _measured("h200", 139.8, 989, 665, 4.1),
        _measured("h100", 79.1, 989, 670, 2.95),
        _datasheet("a100-80g", 79.1, 312, 2.04),
        _datasheet("a100-40g", 39.4, 312, 1.56),
        _datasheet("l40s", 44.4, 362, 0.864),
        _datasheet("a10g", 22.0, 70, 0.6),
        _datasheet("rtx-4090", 23.5, 165, 1.01),
    )
}


def gpu_named(name: str) -> Gpu:
    """ConfigError, with the names that there are, for any other."""
    if name.lower() not in GPUS:
        raise ConfigError(f"--gpu {name}: is not known; known are {', '.join(GPUS)}")
    return GPUS[name.lower()]


def gpu_of_torch(device_name: str) -> Gpu | None:
    """By torch's name of the device (NVIDIA H100 80GB HBM3, NVIDIA A100-SXM4-40GB, …); None for one not known.

    H100 and H200 as PCIe or NVL cards are slower than those measured, and not known.
    """
    words = {word.removesuffix("b") for word in re.split(r"[\s-]+", device_name.lower())}
    if words & {"h100", "h200"} and words & {"pcie", "nvl"}:
        return None
    return next((gpu for gpu in GPUS.values() if words.issuperset(gpu.name.split("-"))), None)


def gpu_of_ray(accelerator_type: str) -> Gpu | None:
    """By Ray's name of the type (H100, A100-40G, A10G, …); None for one that is not known."""
    name = accelerator_type.lower()
    return GPUS.get({"a100": "a100-80g"}.get(name, name))
