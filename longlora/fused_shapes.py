"""What Liger's functions keep and allocate, without their kernels: for models on the meta device.

Memory can then be counted before there is a GPU. Each function here saves the tensors that its namesake in
liger-kernel 0.8 saves, and like it returns the gradient in the memory of what it no longer needs. The rotation needs no
stand-in: neither its own operators nor Liger's keep more than cosines and sines.
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn


class RmsNorm(torch.autograd.Function):
    """Keeps its input and one fp32 number a token; the gradient takes the place of the output's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor]:
        _, weight, _ = ctx.saved_tensors
        return grad_out.view_as(grad_out), torch.empty_like(weight)


class SiluMul(torch.autograd.Function):
    """silu(gate) · up: keeps both, and writes their gradients over them."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return torch.empty_like(gate)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return gate.view_as(gate), up.view_as(up)


def fuse_shapes(model: nn.Module) -> None:
    """Puts the functions in place of the norms and gated MLPs of a model on the meta device."""
    for module in model.modules():
        if "RMSNorm" in type(module).__name__:
            module.forward = MethodType(_norm_forward, module)
        elif all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj")):
            module.forward = MethodType(_mlp_forward, module)


def _norm_forward(module: Any, hidden: Tensor) -> Tensor:
    return RmsNorm.apply(hidden, module.weight)


def _mlp_forward(module: Any, hidden: Tensor) -> Tensor:
    return module.down_proj(SiluMul.apply(module.gate_proj(hidden), module.up_proj(hidden)))
