"""A frozen linear layer and its LoRA as one autograd function, in place of PEFT's chain of operators.

The low-rank product is added into the layer's output by the matrix product itself, and so is its share of the input's
gradient. PEFT's chain (product, scaling, sum, and their gradients) reads and writes tensors of the size of the
activations nine times more in a forward and backward pass; at rank 8 that costs as much time as the products.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from longlora.adapters import ADAPTER_NAME


def fuse_lora(network: nn.Module) -> int:
    """Replaces the forward pass of PEFT's plain LoRA layers in `network`; returns how many there are.

    Layers with dropout, DoRA or other variants, and those that ZeRO-3 has partitioned, stay as they are.
    """
    layers = [module for module in network.modules() if isinstance(module, LoraLinear) and _is_plain(module)]
    for layer in layers:
        layer.forward = _Fused(layer, layer.forward)  # type: ignore[method-assign]
    return len(layers)


def _is_plain(layer: LoraLinear) -> bool:
    return (
        type(layer.base_layer) is nn.Linear
        and list(layer.lora_A) == [ADAPTER_NAME]
        and not layer.lora_variant
        and not layer.fan_in_fan_out
        and not any(layer.lora_bias.values())
        and isinstance(layer.lora_dropout[ADAPTER_NAME], nn.Identity)
        and not hasattr(layer.base_layer.weight, "ds_id")
        and not layer.base_layer.weight.requires_grad
    )


class _Fused:
    """The forward pass of one layer; PEFT's own where the adapter is merged or switched off, or types differ."""

    def __init__(self, layer: LoraLinear, own: Callable[..., Tensor]) -> None:
        self.layer, self.own = layer, own

    def __call__(self, x: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        layer = self.layer
        base, a, b = layer.base_layer, layer.lora_A[ADAPTER_NAME].weight, layer.lora_B[ADAPTER_NAME].weight
        is_lowered = x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)
        if (
            layer.merged
            or layer.disable_adapters
            or arguments
            or keywords
            or is_lowered
            or x.dtype != base.weight.dtype
        ):
            return self.own(x, *arguments, **keywords)
        return _LoraFunction.apply(x, base.weight, base.bias, a, b, layer.scaling[ADAPTER_NAME])


class _LoraFunction(torch.autograd.Function):
    """``apply(x, W, bias, A, B, s)`` → x Wᵀ + bias + s (x Aᵀ) Bᵀ; x (…, in), W (out, in), A (r, in), B (out, r)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        out = F.linear(x, weight, bias)
        low = x.reshape(-1, x.shape[-1]) @ a.t()
        out.view(-1, out.shape[-1]).addmm_(low, b.t(), alpha=scale)
        ctx.save_for_backward(x, weight, a, b, low)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, low = ctx.saved_tensors
        grad = grad_out.reshape(-1, grad_out.shape[-1])
        grad_low = grad @ b
        rows = x.reshape(-1, x.shape[-1])
        grad_a = (grad_low.t() @ rows).mul_(ctx.scale)
        grad_b = (grad.t() @ low).mul_(ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight).addmm_(grad_low, a, alpha=ctx.scale).view_as(x)
        return grad_x, None, None, grad_a, grad_b, None
