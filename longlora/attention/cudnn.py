"""S²-Attn by cuDNN's attention (CUDA) on dense batches: the fastest kernel on Hopper, and nothing to install.

cuDNN builds a graph for each shape, so it suits rows of one document, whose segments are all G or G/2 long and which
therefore come in few shapes; rows of several documents are for the kernels with variable lengths. Equal neighbouring
segments are one batch, seen through a strided view. The operator returns new tensors: one write of the output and one
of each gradient is the floor.
"""

import torch

from longlora.attention._cuda import kernel_refusal
from longlora.attention._function import Destination, write
from longlora.attention._runs import as_batch, as_row, copy_rows
from longlora.segments import Segments

_forward = torch.ops.aten._scaled_dot_product_cudnn_attention
_backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward

STATES_PER_RUN = 5


def refusal(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why it cannot run there; None if it can."""
    if torch.are_deterministic_algorithms_enabled():
        return "its backward pass is not deterministic"
    if device.type == "cuda" and not torch.backends.cudnn.is_available():
        return "this torch has no cuDNN"
    if head_dim > 128:
        return f"needs a head size of at most 128, not {head_dim}"
    return kernel_refusal(device, dtype, head_dim)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, scale: float, out: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Write ``out``; returns what the backward operator needs of each run."""
    state: list[torch.Tensor] = []
    for run in segments.runs:
        attended, log_sum_exp, bounds_q, bounds_k, _, _, seed, offset, _ = _forward(
            *(as_batch(t, run) for t in (q, k, v)), None, True, 0.0, True, False, scale=scale
        )
        copy_rows(as_row(attended), out[run.tokens])
        state += [log_sum_exp, bounds_q, bounds_k, seed, offset]
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
    for run, of_run in zip(segments.runs, zip(*[iter(state)] * STATES_PER_RUN, strict=True), strict=True):
        log_sum_exp, bounds_q, bounds_k, seed, offset = of_run
        gradients = _backward(
            *(as_batch(t, run) for t in (grad_out, q, k, v, out)),
            log_sum_exp, seed, offset, None, bounds_q, bounds_k, run.length, run.length, 0.0, True, scale=scale,
        )  # fmt: skip
        for destination, gradient in zip((dq, dk, dv), gradients, strict=True):
            write(as_row(gradient), destination, run.tokens)
