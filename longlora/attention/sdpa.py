"""S²-Attn by torch's scaled dot-product attention, which knows no variable lengths: any device, any float type.

Equal neighbouring segments are one batch, seen through a strided view, so a long document costs one call for the
straight heads and three for the shifted ones, plus one each for a tail. torch's operators return new tensors: one
write of the output and one of each gradient is the floor, and there is nothing above it.

On the CPU the fused operator and its backward are called directly. Elsewhere which operator fits depends on the
device, so torch chooses it in the forward pass, and the backward pass attends once more in order to differentiate.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention

from longlora.attention._function import Destination
from longlora.segments import Run, Segments

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
        queries, keys, values = (_batch(t, run) for t in (q, k, v))
        if _is_fused(q):
            attended, log_sum_exp = _forward_on_cpu(queries, keys, values, 0.0, True, scale=scale)
            state.append(log_sum_exp)
        else:
            attended = scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scale, enable_gqa=True)
        out[run.tokens] = _row(attended)
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
        grad, *batch = (_batch(t, run) for t in (grad_out, q, k, v))
        if _is_fused(q):
            gradients = _backward_on_cpu(grad, *batch, _batch(out, run), state[number], 0.0, True, scale=scale)
        else:
            gradients = _differentiated(grad, batch, scale)
        for destination, gradient in zip((dq, dk, dv), gradients, strict=True):
            destination[run.tokens] = _row(gradient)


def _is_fused(q: torch.Tensor) -> bool:
    return q.device.type == "cpu"


def _differentiated(grad_out: torch.Tensor, batch: list[torch.Tensor], scale: float) -> tuple[torch.Tensor, ...]:
    queries, keys, values = leaves = [t.detach().requires_grad_() for t in batch]
    with torch.enable_grad():
        attended = scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scale, enable_gqa=True)
    return torch.autograd.grad(attended, leaves, grad_out)


def _batch(row: torch.Tensor, run: Run) -> torch.Tensor:
    """(T, heads, d) → the run's segments as a view (repeats, heads, length, d)."""
    return row[run.tokens].unflatten(0, (run.repeats, run.length)).transpose(1, 2)


def _row(batch: torch.Tensor) -> torch.Tensor:
    """(repeats, heads, length, d) → (repeats · length, heads, d): a view, for the operator lays heads inside tokens."""
    return batch.transpose(1, 2).flatten(0, 1)
