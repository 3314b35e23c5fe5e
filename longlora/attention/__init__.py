"""Shifted sparse attention (S²-Attn, arXiv 2309.12307, section 3.2) over rows of packed documents.

Two block-diagonal causal attentions, one for each half of the query heads: no roll, no padding, no wrap-around.
"""

import torch

from longlora.attention._function import KeptOutput, SegmentedAttention
from longlora.attention.selection import BackendChoice, Shape, available_backends, choose_backend
from longlora.segments import SegmentPlan

__all__ = ["BackendChoice", "KeptOutput", "Shape", "available_backends", "choose_backend", "s2_attention"]


def s2_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: SegmentPlan,
    scale: float | None = None,
    backend: str = "auto",
    kept: KeptOutput | None = None,
) -> torch.Tensor:
    """Causal attention inside the plan's segments: straight for the first ⌊H/2⌋ query heads, shifted for the others.

    q (T, H, d); k, v (T, Hkv, d), Hkv dividing H; one floating type, which autocast may lower as it does for torch's
    own attention. ``scale`` is d^-½ unless given. ``kept`` spares the second attention where the layer is recomputed
    (see `KeptOutput`). Returns (T, H, d), contiguous. Differentiable once.
    Raises ValueError for shapes that do not fit each other or the plan, and for a backend that cannot run here.
    """
    _check(q, k, v, plan)
    if q.device.type != "meta" and torch.is_autocast_enabled(q.device.type):
        q, k, v = (t.to(torch.get_autocast_dtype(q.device.type)) for t in (q, k, v))
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))  # kernels read whole head vectors
    chosen = choose_backend(Shape.of(q, k), plan, backend).module
    return SegmentedAttention.apply(q, k, v, plan, q.shape[2] ** -0.5 if scale is None else scale, chosen, kept)


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
