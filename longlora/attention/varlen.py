"""S²-Attn by torch's own variable-length attention (CUDA): FlashAttention-2, or cuDNN where torch prefers it.

The operators under ``torch.nn.attention.varlen.varlen_attn`` are called, forward and backward, so that both halves fit
into one autograd.Function. They return new tensors: one write of the output and one of each gradient is the floor.
"""

from typing import Any

import torch
from torch.nn.attention import varlen

from longlora.attention._cuda import kernel_refusal
from longlora.attention._function import Destination, write
from longlora.attention._runs import copy_rows
from longlora.segments import Segments


def refusal(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why it cannot run there; None if it can."""
    return kernel_refusal(device, dtype, head_dim)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, scale: float, out: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Write ``out``; returns log-sum-exp and the (unused) random state."""
    attended, log_sum_exp, random_state = _call(
        torch.ops.torch_attn._varlen_attn.default,
        segments,
        query=q,
        key=k,
        value=v,
        scale=scale,
        **_kernel(q, k, v, segments),
    )
    copy_rows(attended, out)
    return log_sum_exp, random_state


def backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    state: tuple[torch.Tensor, ...],
    segments: Segments,
    scale: float,
    dq: torch.Tensor,
    dk: Destination,
    dv: Destination,
) -> None:
    log_sum_exp, random_state = state
    gradients = _call(
        torch.ops.torch_attn._varlen_attn_backward.default,
        segments,
        **dict(
            grad_out=grad_out, query=q, key=k, value=v, out=out, lse=log_sum_exp, rng_state=random_state, scale=scale
        ),
        **_kernel(q, k, v, segments),
    )
    for destination, gradient in zip((dq, dk, dv), gradients, strict=True):
        write(gradient, destination, slice(0, len(q)))


def _call(operator: Any, segments: Segments, **arguments: Any) -> tuple[torch.Tensor, ...]:
    """Call with the arguments that this torch's operator has: ``enable_gqa`` and ``backend`` came after 2.11."""
    bounds, longest, _ = segments
    arguments |= dict(cu_seq_q=bounds, cu_seq_k=bounds, max_q=longest, max_k=longest)
    arguments |= dict(is_causal=True, window_size=[-1, 0], enable_gqa=True)
    names = {argument.name for argument in operator._schema.arguments}
    return operator(**{name: value for name, value in arguments.items() if name in names})


def _kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments) -> dict[str, int]:
    """torch's choice between cuDNN and FlashAttention-2, where it has one to make."""
    choose = getattr(varlen, "_select_backend", None)
    if choose is None:
        return {}
    with torch.enable_grad():  # some head sizes have a cuDNN forward but no backward: ask for training
        asked = q.detach().requires_grad_()
        return {"backend": choose(asked, k, v, segments.bounds, segments.bounds, segments.longest, [-1, 0])}
