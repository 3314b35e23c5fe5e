"""Shifted sparse attention (S²-Attn, arXiv 2309.12307, section 3.2) over rows of packed documents.

Two block-diagonal causal attentions, one for each half of the query heads: no roll, no padding, no wrap-around.
"""

from dataclasses import dataclass

import torch

from longlora.attention import flash, sdpa, varlen
from longlora.attention._function import Backend, SegmentedAttention
from longlora.segments import SegmentPlan

__all__ = ["BackendChoice", "available_backends", "choose_backend", "s2_attention"]

# In order of preference: flash-attn copies nothing, torch's variable lengths copy each result once, SDPA runs anywhere.
_BACKENDS: dict[str, Backend] = {"flash": flash, "varlen": varlen, "sdpa": sdpa}


@dataclass(frozen=True)
class BackendChoice:
    """The backend that runs, and why those preferred to it do not."""

    name: str
    refused: dict[str, str]

    def __str__(self) -> str:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in self.refused.items())
        return f"{self.name} ({reasons})" if reasons else self.name


def available_backends(device: torch.device | str, dtype: torch.dtype, head_dim: int) -> dict[str, str | None]:
    """Each backend, in order of preference, and why it cannot run there (None: it can)."""
    return {name: backend.refusal(torch.device(device), dtype, head_dim) for name, backend in _BACKENDS.items()}


def choose_backend(
    device: torch.device | str, dtype: torch.dtype, head_dim: int, backend: str = "auto"
) -> BackendChoice:
    """The first backend that can run there, or ``backend`` itself; ValueError where that one cannot run."""
    if backend != "auto" and backend not in _BACKENDS:
        raise ValueError(f"attention backend is {backend!r}: it must be auto, {', '.join(_BACKENDS)}")
    refused: dict[str, str] = {}
    for name, reason in available_backends(device, dtype, head_dim).items():
        if backend not in ("auto", name):
            continue
        if reason is None:
            return BackendChoice(name, refused)
        refused[name] = reason
    raise ValueError(f"attention backend {backend!r} cannot run here: {refused[backend]}")


def s2_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: SegmentPlan,
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Causal attention inside the plan's segments: straight for the first ⌊H/2⌋ query heads, shifted for the others.

    q (T, H, d); k, v (T, Hkv, d), Hkv dividing H; one floating type, which autocast may lower as it does for torch's
    own attention. ``scale`` is d^-½ unless given. Returns (T, H, d), contiguous. Differentiable once.
    Raises ValueError for shapes that do not fit each other or the plan, and for a backend that cannot run here.
    """
    _check(q, k, v, plan)
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (t.to(torch.get_autocast_dtype(q.device.type)) for t in (q, k, v))
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))  # kernels read whole head vectors
    chosen = choose_backend(q.device, q.dtype, q.shape[2], backend)
    return SegmentedAttention.apply(
        q, k, v, plan, q.shape[2] ** -0.5 if scale is None else scale, _BACKENDS[chosen.name]
    )


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: SegmentPlan) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.ndim != 3 or k.shape != v.shape or k.shape[::2] != q.shape[::2] or q.shape[1] % k.shape[1]:
        raise ValueError(f"{shapes}: they must be (T, H, d), (T, Hkv, d), (T, Hkv, d) with Hkv dividing H")
    if q.shape[0] != plan.tokens:
        raise ValueError(f"q has {q.shape[0]} tokens and the plan {plan.tokens}: plan the documents of this very row")
    if plan.straight.device != q.device:
        raise ValueError(
            f"the plan is on {plan.straight.device} and q on {q.device}: call plan.to(device) once a batch"
        )
