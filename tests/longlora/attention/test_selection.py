"""Which backend is chosen. That kernels are timed is tested on a GPU (test_gpu.py); what is timed is played here."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from longlora.attention import Shape, choose_backend, selection
from longlora.attention import sdpa as right
from longlora.segments import SegmentPlan, plan_segments

ALONE, PACKED = plan_segments([8192], 2048), plan_segments([4000, 4192], 2048)
CPU = Shape(torch.device("cpu"), torch.float32, 4, 2, 16)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Shape:
    """A GPU on which cuDNN takes 2 ms, torch's variable lengths 3 ms, and flash-attn is not installed."""
    milliseconds = {"cudnn": 2.0, "varlen": 3.0}
    for name in milliseconds:
        monkeypatch.setattr(selection.BACKENDS[name], "refusal", lambda device, dtype, head_dim: None)
    monkeypatch.setattr(selection, "_wrong", lambda backend, shape: None)
    monkeypatch.setattr(SegmentPlan, "to", lambda plan, device: plan)
    monkeypatch.setattr(
        selection,
        "_milliseconds",
        lambda backend, *unused: next(t for name, t in milliseconds.items() if selection.BACKENDS[name] is backend),
    )
    selection._choose.cache_clear()
    yield Shape(torch.device("cuda", 0), torch.bfloat16, 8, 8, 64)
    selection._choose.cache_clear()


def test_the_fastest_runs(gpu: Shape) -> None:
    choice = choose_backend(gpu, ALONE)
    assert (choice.name, choice.timed) == ("cudnn", {"cudnn": 2.0, "varlen": 3.0})
    assert "cudnn 2.00 ms; varlen 3.00 ms" in str(choice)


def test_packed_rows_go_to_kernels_with_variable_lengths(gpu: Shape) -> None:
    choice = choose_backend(gpu, PACKED)
    assert choice.name == "varlen"
    assert choice.refused["cudnn"] == "is for rows of one document"
    with pytest.raises(ValueError, match="'cudnn' cannot run here: is for rows of one document"):
        choose_backend(gpu, PACKED, "cudnn")


def test_a_kernel_that_computes_something_else_is_refused(gpu: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = "its dk differs from the definition by 0.3 (relative)"
    monkeypatch.setattr(
        selection, "_wrong", lambda backend, shape: wrong if backend is selection.BACKENDS["cudnn"] else None
    )
    choice = choose_backend(gpu, ALONE)
    assert (choice.name, choice.refused["cudnn"]) == ("varlen", wrong)


@pytest.mark.parametrize(
    ("documents", "group_size", "timed", "segments"),
    [
        ([8192], 2048, 8192, 2048),
        ([6144], 2048, 8192, 2048),
        ([102400], 8192, 32768, 8192),
        ([102400], None, 32768, 32768),
        ([1536], 2048, 2048, 2048),
        ([9000, 3000], 2048, 16384, 2048),
        ([500] * 60, 2048, 32768, 512),  # none is longer than a group
    ],
)
def test_rows_as_long_as_those_asked_for_are_timed(
    gpu: Shape, monkeypatch: pytest.MonkeyPatch, documents: list[int], group_size: int | None, timed: int, segments: int
) -> None:
    plans = []
    monkeypatch.setattr(selection.BACKENDS["flash"], "refusal", lambda device, dtype, head_dim: None)
    monkeypatch.setattr(selection, "_milliseconds", lambda backend, shape, plan: plans.append(plan) or 1.0)
    choose_backend(gpu, plan_segments(documents, group_size))
    assert {(plan.tokens, plan.max_straight) for plan in plans} == {(timed, segments)}


def test_where_memory_is_full_nothing_is_timed(gpu: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*unused: Any) -> float:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(selection.BACKENDS["flash"], "refusal", lambda device, dtype, head_dim: None)
    monkeypatch.setattr(selection, "_milliseconds", fails)
    choice = choose_backend(gpu, ALONE)
    assert (choice.name, choice.timed) == ("cudnn", {})


def test_deterministic_runs_do_not_choose_by_the_clock(gpu: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert choose_backend(gpu, ALONE).timed == {}


def scaled(factors: tuple[float, float, float, float]) -> Any:
    """The backend that runs anywhere, with output, dq, dk and dv multiplied."""

    def forward(q, k, v, segments, scale, out):
        state = right.forward(q, k, v, segments, scale, out)
        out.mul_(factors[0])
        return state

    def backward(grad_out, q, k, v, out, state, segments, scale, dq, dk, dv):
        right.backward(grad_out, q, k, v, out / factors[0], state, segments, scale, dq, dk, dv)
        for gradient, factor in zip((dq, dk, dv), factors[1:], strict=True):
            gradient.mul_(factor)

    return SimpleNamespace(forward=forward, backward=backward)


@pytest.mark.parametrize(
    ("factors", "part"),
    [((1.1, 1, 1, 1), "output"), ((1, 1.1, 1, 1), "dq"), ((1, 1, 0.9, 1), "dk"), ((1, 1, 1, 0), "dv")],
)
def test_a_wrong_part_is_found(factors: tuple[float, float, float, float], part: str) -> None:
    assert selection._wrong(right, CPU) is None
    reason = selection._wrong(scaled(factors), CPU)
    assert reason is not None and reason.startswith(f"its {part} differs from the definition by ")


@pytest.mark.parametrize(
    ("documents", "group_size", "uniform"),
    [
        ([8192], 2048, True),
        ([102400], 8192, True),
        ([8192], None, True),
        ([8100], 2048, False),
        ([4096, 4096], 2048, False),
    ],
)
def test_rows_whose_shapes_repeat(documents: list[int], group_size: int | None, uniform: bool) -> None:
    assert plan_segments(documents, group_size).uniform == uniform
