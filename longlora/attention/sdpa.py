"""S²-Attn by torch's scaled dot-product attention, which knows no variable lengths: any device, any float type.

Equal neighbouring segments are one batch, seen through a strided view, so a long document costs one call for the
straight heads and three for the shifted ones, plus one each for a tail. torch's operators return new tensors: one
write of the output and one of each gradient is the floor, and there is nothing above it.

On the CPU, and for shapes alone, the fused operator and its backward are called directly. Elsewhere which operator fits
depends on the device, so torch chooses it in the forward pass, and the backward pass attends once more in order to
differentiate. cuDNN's is left out there: its gradients of segments of one token are not numbers (torch 2.11, H200).
"""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from longlora.attention._function import Destination, write
from longlora.attention._runs import as_batch, as_row, copy_rows
from longlora.segments import Segments

_forward_on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward_on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def refusal(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """None: it runs anywhere."""
    return None


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, scale: float, out: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Write ``out``; returns the log-sum-exp of each run (CPU), or nothing (elsewhere)."""
    state = []
    for run in segments.runs:
        queries, keys, values = (as_batch(t, run) for t in (q, k, v))
        if _is_fused(q):
            attended, log_sum_exp = _forward_on_cpu(queries, keys, values, 0.0, True, scale=scale)
            state.append(log_sum_exp)
        else:
            attended = _attend(queries, keys, values, scale)
        copy_rows(as_row(attended), out[run.tokens])
    return tuple(state)


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
    for number, run in enumerate(segments.runs):
        grad, *batch = (as_batch(t, run) for t in (grad_out, q, k, v))
        if _is_fused(q):
            gradients = _backward_on_cpu(grad, *batch, as_batch(out, run), state[number], 0.0, True, scale=scale)
        else:
            gradients = _differentiated(grad, batch, scale)
        for destination, gradient in zip((dq, dk, dv), gradients, strict=True):
            write(as_row(gradient), destination, run.tokens)


def _attend(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scale, enable_gqa=True)


def _is_fused(q: torch.Tensor) -> bool:
    return q.device.type in ("cpu", "meta")


def _differentiated(grad_out: torch.Tensor, batch: list[torch.Tensor], scale: float) -> tuple[torch.Tensor, ...]:
    queries, keys, values = leaves = [t.detach().requires_grad_() for t in batch]
    with torch.enable_grad():
        attended = _attend(queries, keys, values, scale)
    return torch.autograd.grad(attended, leaves, grad_out)
