"""The CUDA kernels' calling conventions on the CPU, so that what calls them is tested where there is no GPU."""

from collections.abc import Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from longlora.attention import cudnn, flash

FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _attend(q: Any, k: Any, v: Any, bounds: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention inside one segment after another: (T, heads, d) and log-sum-exp (heads, T)."""
    out, log_sum_exp = torch.empty_like(q), torch.empty(q.shape[1], len(q))
    for first, last in pairwise(bounds.tolist()):
        segment = [t[first:last].transpose(0, 1).unsqueeze(0) for t in (q, k, v)]
        attended, normaliser = FORWARD(*segment, 0.0, True, scale=scale)
        out[first:last], log_sum_exp[:, first:last] = attended[0].transpose(0, 1), normaliser[0]
    return out, log_sum_exp


def _differentiate(
    grad_out: Any, q: Any, k: Any, v: Any, out: Any, log_sum_exp: torch.Tensor, bounds: torch.Tensor, scale: float
) -> list[torch.Tensor]:
    gradients = [torch.empty_like(t) for t in (q, k, v)]
    for first, last in pairwise(bounds.tolist()):
        segment = [t[first:last].transpose(0, 1).unsqueeze(0) for t in (grad_out, q, k, v, out)]
        parts = BACKWARD(*segment, log_sum_exp[None, :, first:last], 0.0, True, scale=scale)
        for gradient, part in zip(gradients, parts, strict=True):
            gradient[first:last] = part[0].transpose(0, 1)
    return gradients


def _aten_forward(q, k, v, bounds, bounds_k, longest, longest_k, dropout, causal, debug, *, scale, **window):
    assert causal and not dropout and bounds.dtype == torch.int32
    assert longest == longest_k == bounds.diff().max()
    assert (window["window_size_left"], window["window_size_right"]) == (-1, 0)
    return *_attend(q, k, v, bounds, scale), torch.zeros(2), torch.zeros(0), torch.zeros(0)


def _aten_backward(
    grad_out, q, k, v, out, lse, bounds, bounds_k, longest, longest_k, dropout, causal, rng, unused, *, scale, **window
):
    assert causal and not dropout and longest == longest_k == bounds.diff().max()
    return tuple(_differentiate(grad_out, q, k, v, out, lse, bounds, scale))


@pytest.fixture
def emulated_varlen() -> Iterator[None]:
    """``aten._flash_attention_forward`` and ``_backward``, which torch's varlen operators call, on the CPU."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", _aten_forward, "CPU")
        library.impl("_flash_attention_backward", _aten_backward, "CPU")
        yield


def _varlen_fwd(
    q, k, v, out, bounds, bounds_k, seqused_k, leftpad_k, block_table, alibi, longest, longest_k, dropout, scale,
    zero_tensors, causal, left, right, softcap, return_softmax, generator,
):  # fmt: skip
    assert causal and not dropout and not softcap and longest == bounds.diff().max()
    attended, log_sum_exp = _attend(q, k, v, bounds, scale)
    return out.copy_(attended), log_sum_exp, None, torch.zeros(2)


def _varlen_bwd(
    grad_out, q, k, v, out, lse, dq, dk, dv, bounds, bounds_k, alibi, longest, longest_k, dropout, scale,
    zero_tensors, causal, left, right, softcap, deterministic, generator, random_state,
):  # fmt: skip
    assert causal and not dropout and not softcap and longest == bounds.diff().max()
    gradients = _differentiate(grad_out, q, k, v, out, lse, bounds, scale)
    for destination, gradient in zip((dq, dk, dv), gradients, strict=True):
        destination.copy_(gradient)
    return dq, dk, dv, None


@pytest.fixture
def emulated_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attn's extension, with the arguments of 2.8, on the CPU."""
    extension = SimpleNamespace(varlen_fwd=_varlen_fwd, varlen_bwd=_varlen_bwd)
    monkeypatch.setattr(flash, "_extension", lambda: extension)


def _cudnn_forward(q, k, v, bias, with_log_sum_exp, dropout, causal, debug, *, scale):
    assert bias is None and with_log_sum_exp and not dropout and causal and not debug
    out, log_sum_exp = FORWARD(q, k, v, 0.0, True, scale=scale)
    length = q.shape[2]
    return out, log_sum_exp, None, None, length, length, torch.zeros(()), torch.zeros(()), None


def _cudnn_backward(
    grad_out, q, k, v, out, lse, seed, offset, bias, bounds_q, bounds_k, longest_q, longest_k, dropout, causal, *, scale
):
    assert bounds_q is None and bounds_k is None and bias is None and not dropout and causal
    assert longest_q == longest_k == q.shape[2]
    return BACKWARD(grad_out, q, k, v, out, lse, 0.0, True, scale=scale)


@pytest.fixture
def emulated_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's cuDNN operators, with the arguments of 2.11 and 2.15, on the CPU."""
    monkeypatch.setattr(cudnn, "_forward", _cudnn_forward)
    monkeypatch.setattr(cudnn, "_backward", _cudnn_backward)
