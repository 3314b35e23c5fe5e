"""What a step did with its time, and what it needed."""

import time
from types import SimpleNamespace

import pytest
import torch

from longlora.flops import step_operations
from longlora.model import LongContextModel
from longlora.segments import plan_segments
from pipeline.gpus import GPUS, gpu_of_ray, gpu_of_torch
from pipeline.meter import Meter, peak_rate
from pipeline.models import build_model

CPU = torch.device("cpu")


@pytest.fixture
def model(make_run) -> LongContextModel:
    config, _ = make_run()
    return build_model(config, device="meta")


def test_time_is_counted_by_part(model: LongContextModel) -> None:
    meter = Meter(model, CPU)
    for _ in range(2):
        with meter.part("feed"):
            time.sleep(0.02)
    with meter.part("update"):
        pass
    parts = meter.parts()
    assert 0.04 <= parts["feed"] < 1
    assert 0 <= parts["update"] < 0.02
    assert meter.parts() == {}, "the next step begins at nothing"


def test_operations_are_those_of_the_batches(model: LongContextModel) -> None:

    meter = Meter(model, CPU)
    config = model.causal_lm.config
    plans = [plan_segments([300, 84], 128), plan_segments([384], 128)]
    batches = [batch_of(plan.document_lengths) for plan in plans]
    wanted = sum(step_operations(model, config, plan) for plan in plans)
    assert meter.operations(batches, 128) == pytest.approx(wanted)
    assert meter.operations(batches, None) > wanted
    assert meter.operations([], 128) == 0


@pytest.mark.parametrize("group_size", [128, None])
def test_a_row_costs_what_its_documents_would_alone(model: LongContextModel, group_size: int | None) -> None:
    config = model.causal_lm.config
    plans = [plan_segments([length], group_size) for length in (300, 84)]
    wanted = sum(step_operations(model, config, plan) for plan in plans)
    assert Meter(model, CPU).row_operations([300, 84], group_size) == pytest.approx(wanted)


def batch_of(lengths: tuple[int, ...]) -> SimpleNamespace:
    """All that the meter reads of a micro-batch."""
    return SimpleNamespace(document_lengths=lengths)


def test_without_a_gpu_there_is_no_gpu_memory_and_no_rate(model: LongContextModel) -> None:
    assert Meter(model, CPU).peak_bytes() == 0
    assert peak_rate(CPU) is None


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA A100-SXM4-80GB", "a100-80g"),
        ("NVIDIA A100-PCIE-40GB", "a100-40g"),
        ("NVIDIA A10G", "a10g"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("Tesla T4", None),
    ],
)
def test_gpus_by_torchs_name(name: str, gpu: str | None) -> None:
    assert gpu_of_torch(name) is GPUS.get(gpu or "")


@pytest.mark.parametrize(
    ("name", "gpu"), [("H100", "h100"), ("A100", "a100-80g"), ("A100-40G", "a100-40g"), ("A10G", "a10g"), ("T4", None)]
)
def test_gpus_by_rays_name(name: str, gpu: str | None) -> None:
    assert gpu_of_ray(name) is GPUS.get(gpu or "")
