"""S²-Attn by flash-attn (Dao-AILab, 2.8; optional, CUDA) without a copy.

The compiled extension is called below flash-attn's own Python: it takes views of half the heads and writes into views
of the output and of the gradients. Only the kv head that a half boundary cuts needs a partial gradient beside.
"""

from functools import cache
from importlib import import_module
from types import ModuleType

import torch

from longlora.attention._cuda import kernel_refusal
from longlora.attention._function import Destination
from longlora.segments import Segments


@cache
def _extension() -> ModuleType | None:
    try:
        return import_module("flash_attn_2_cuda")
    except ImportError:
        return None


def refusal(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why it cannot run there; None if it can."""
    if device.type == "cuda" and _extension() is None:
        return "flash-attn is not installed, or was built for another torch"
    return kernel_refusal(device, dtype, head_dim)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, scale: float, out: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Write ``out``; returns log-sum-exp and the (unused) random state."""
    bounds, longest, _ = segments
    _, log_sum_exp, _, random_state = _extension().varlen_fwd(  # type: ignore[union-attr]
        q, k, v, out, bounds, bounds,
        None,  # seqused_k
        None,  # leftpad_k
        None,  # block_table
        None,  # alibi_slopes
        longest, longest,
        0.0,  # dropout
        scale,
        False,  # zero_tensors
        True,  # causal
        -1, -1,  # window
        0.0,  # softcap
        False,  # return_softmax
        None,  # generator
    )  # fmt: skip
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
    bounds, longest, _ = segments
    log_sum_exp, random_state = state
    dk_written = dk if isinstance(dk, torch.Tensor) else torch.empty_like(k)
    dv_written = dv if isinstance(dv, torch.Tensor) else torch.empty_like(v)
    _extension().varlen_bwd(  # type: ignore[union-attr]
        grad_out, q, k, v, out, log_sum_exp, dq, dk_written, dv_written, bounds, bounds,
        None,  # alibi_slopes
        longest, longest,
        0.0,  # dropout
        scale,
        False,  # zero_tensors
        True,  # causal
        -1, -1,  # window
        0.0,  # softcap
        torch.are_deterministic_algorithms_enabled(),
        None,  # generator
        random_state,
    )  # fmt: skip
    if dk_written is not dk:
        dk[0 : len(k)], dv[0 : len(v)] = dk_written, dv_written
