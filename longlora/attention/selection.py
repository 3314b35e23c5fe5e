"""Which backend attends: those that can run there, checked against the definition, the fastest of them first.

On the CPU there is one. On a GPU which of two kernels is faster depends on the card, the shape and the versions, so
both are timed once for a shape, for a fraction of a second, on a row about as long as those asked for: the time to
start a kernel decides on short rows, and on long ones it does not. With deterministic algorithms the order is fixed
instead, since a choice by the clock could fall otherwise after a restart.
"""

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import torch

from longlora.attention import cudnn, flash, sdpa, varlen
from longlora.attention._function import Backend, SegmentedAttention
from longlora.attention.reference import reference_attention
from longlora.segments import SegmentPlan, plan_segments

# In the order that holds where nothing is timed: cuDNN is fastest on long rows of one document, flash-attn copies
# nothing, varlen writes each result once more, SDPA runs anywhere.
BACKENDS: dict[str, Backend] = {"cudnn": cudnn, "flash": flash, "varlen": varlen, "sdpa": sdpa}

_LONGEST_TIMED = 32768  # tokens: starting a kernel no longer counts there
_ROUNDS = 3
_TOLERANCE = 0.02  # relative error, root mean square: bf16 gives 0.002 to 0.005


class Shape(NamedTuple):
    """What a choice depends on beside the plan."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, q: torch.Tensor, k: torch.Tensor) -> "Shape":
        return cls(q.device, q.dtype, q.shape[1], k.shape[1], q.shape[2])


@dataclass(frozen=True)
class BackendChoice:
    """The backend that runs, why others do not, and what was timed (milliseconds, forward and backward)."""

    name: str
    refused: dict[str, str] = field(default_factory=dict)
    timed: dict[str, float] = field(default_factory=dict)

    @property
    def module(self) -> Backend:
        return BACKENDS[self.name]

    def __str__(self) -> str:
        reasons = dict.fromkeys(self.refused.values())
        notes = [f"{', '.join(n for n, r in self.refused.items() if r == reason)}: {reason}" for reason in reasons]
        notes += [f"{name} {milliseconds:.2f} ms" for name, milliseconds in self.timed.items()]
        return f"{self.name} ({'; '.join(notes)})" if notes else self.name


def available_backends(device: torch.device | str, dtype: torch.dtype, head_dim: int) -> dict[str, str | None]:
    """Each backend, in order of preference, and why it cannot run there (None: it can)."""
    return {name: backend.refusal(torch.device(device), dtype, head_dim) for name, backend in BACKENDS.items()}


def choose_backend(shape: Shape, plan: SegmentPlan, backend: str = "auto") -> BackendChoice:
    """The fastest backend for rows like this one, or ``backend`` itself; ValueError where that one cannot run."""
    # Rows, and segments other than groups, have any length; a power of two stands for those below it.
    tokens = min(_power_of_two(plan.tokens), _LONGEST_TIMED)
    longest = plan.max_straight if plan.uniform and not plan.full else _power_of_two(plan.max_straight)
    longest = min(longest, tokens if plan.full else tokens // 2)
    deterministic = torch.are_deterministic_algorithms_enabled()
    return _choose(shape, plan.uniform, tokens, longest, plan.full, backend, deterministic)


def _power_of_two(n: int) -> int:
    """The smallest that is not below n."""
    return 1 << (n - 1).bit_length()


@cache
def _choose(
    shape: Shape, uniform: bool, tokens: int, longest: int, full: bool, backend: str, deterministic: bool
) -> BackendChoice:
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"attention backend is {backend!r}: it must be auto, {', '.join(BACKENDS)}")
    refused = available_backends(shape.device, shape.dtype, shape.head_dim)
    if not uniform and refused["cudnn"] is None:
        refused["cudnn"] = "is for rows of one document"
    if backend != "auto":
        if refused[backend] is not None:
            raise ValueError(f"attention backend {backend!r} cannot run here: {refused[backend]}")
        return BackendChoice(backend)
    candidates = [name for name, reason in refused.items() if reason is None]
    faster = candidates[: candidates.index("sdpa")]
    if not faster or shape.device.type != "cuda":
        return _first(candidates, refused)
    with _aside(shape.device):
        refused |= {name: _wrong(BACKENDS[name], shape) for name in faster}
        faster = [name for name in faster if refused[name] is None]
        if len(faster) < 2 or deterministic:
            return _first([*faster, "sdpa"], refused)
        plan = plan_segments([longest] * (tokens // longest), None) if full else plan_segments([tokens], longest)
        plan = plan.to(shape.device)
        try:
            timed = {name: _milliseconds(BACKENDS[name], shape, plan) for name in faster}
        except torch.OutOfMemoryError:  # beside the activations of a step
            return _first([*faster, "sdpa"], refused)
    fastest = min(timed, key=lambda name: timed[name])
    return BackendChoice(fastest, {name: reason for name, reason in refused.items() if reason}, timed)


def _first(candidates: list[str], refused: dict[str, str | None]) -> BackendChoice:
    """The first candidate, and the reasons against those preferred to it."""
    preferred = list(BACKENDS)[: list(BACKENDS).index(candidates[0])]
    return BackendChoice(candidates[0], {name: reason for name in preferred if (reason := refused[name])})


@contextmanager
def _aside(device: torch.device) -> Iterator[None]:
    """Apart from what surrounds it: evaluation without gradients, autocast, a checkpoint that counts saved tensors."""
    with (
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor),
    ):
        yield


def _wrong(backend: Backend, shape: Shape) -> str | None:
    """What is wrong with the backend's results on a short row, outputs and gradients; None if nothing is."""
    plan = plan_segments([1024], 256).to(shape.device)
    *row, grad = _row(shape, plan.tokens)
    ours = SegmentedAttention.apply(*row, plan, shape.head_dim**-0.5, backend, None)
    results = [ours.detach(), *torch.autograd.grad(ours, row, grad)]
    exact_row = [t.detach().float().requires_grad_() for t in row]
    q, k, v = exact_row
    exact = reference_attention(q, k, v, plan.document_lengths, plan.group_size)
    wanted = [exact.detach(), *torch.autograd.grad(exact, exact_row, grad.float())]
    for name, result, right in zip(("output", "dq", "dk", "dv"), results, wanted, strict=True):
        error = float((result.float() - right).norm() / right.norm())
        if not error <= _TOLERANCE:
            return f"its {name} differs from the definition by {error:.3g} (relative)"
    return None


def _milliseconds(backend: Backend, shape: Shape, plan: SegmentPlan) -> float:
    """Forward and backward on a row of the plan; the median of a few rounds."""
    *row, grad = _row(shape, plan.tokens)
    measured = []
    for _ in range(1 + _ROUNDS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        out = SegmentedAttention.apply(*row, plan, shape.head_dim**-0.5, backend, None)
        torch.autograd.grad(out, row, grad)
        end.record()
        end.synchronize()
        measured.append(start.elapsed_time(end))
    return statistics.median(measured[1:])


def _row(shape: Shape, tokens: int) -> list[torch.Tensor]:
    """Random q, k, v as leaves, and a gradient of the output; the generators of the run are left alone."""
    generator = torch.Generator(shape.device).manual_seed(0)
    heads = (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    q, k, v, grad = (
        torch.randn(tokens, n, shape.head_dim, generator=generator, device=shape.device, dtype=shape.dtype)
        for n in heads
    )
    return [q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad]
