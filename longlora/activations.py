"""What a layer keeps of its forward pass for the backward pass, and what it makes again.

Everything (fastest, about 100 kB a token and layer in a 7B model), only the layer's input (8 kB, and the forward pass
runs twice), or the input and the attention output (16 kB, and attention does not run again). The *last* layers keep
most: their backward pass comes first, so that their memory is free again when the others are recomputed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from longlora.attention import KeptOutput
from longlora.offload import HostCopies


@dataclass(frozen=True)
class ActivationPolicy:
    """What the layers of a model keep.

    kept: the last so many layers keep everything; the others are recomputed from their inputs.
    kept_attention: of the recomputed layers, the last so many keep their attention output besides.
    offload: the inputs of recomputed layers wait in pinned host memory.
    mlp_tile: tokens of one piece of the MLP in recomputed layers, None for the whole row at once.
    """

    kept: int
    kept_attention: int = 0
    offload: bool = False
    mlp_tile: int | None = None

    def __str__(self) -> str:
        parts = [f"the last {self.kept} layers keep all"]
        if self.kept_attention:
            parts.append(f"{self.kept_attention} others their attention output")
        if self.offload:
            parts.append("layer inputs wait in host memory")
        if self.mlp_tile:
            parts.append(f"MLP in pieces of {self.mlp_tile:,} tokens")
        return ", ".join(parts)


def layers_of(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """The model's layers that can be recomputed, in order."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def apply_policy(model: nn.Module, policy: ActivationPolicy) -> None:
    """Makes the layers of `model` follow `policy` from the next row on; it can be called again with another.

    Raises ValueError for a model without layers that can be recomputed, and for an MLP in pieces that trains.
    """
    layers = layers_of(model)
    if policy.kept < len(layers) and not layers:
        raise ValueError(f"{type(model).__name__} has no layers that can be recomputed: keep all activations")
    recomputed = len(layers) - min(policy.kept, len(layers))
    drops_out = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    recompute = partial(checkpoint, use_reentrant=False, preserve_rng_state=drops_out)
    copies = HostCopies() if policy.offload else None
    for number, layer in enumerate(layers):
        layer.gradient_checkpointing = number < recomputed
        function = copies.around(recompute) if copies is not None else recompute
        layer._gradient_checkpointing_func = function  # type: ignore[assignment]
        _tile(layer, policy.mlp_tile if number < recomputed else None)


def kept_outputs(policy: ActivationPolicy, layers: int) -> dict[int, KeptOutput]:
    """For one row: where each recomputed layer leaves its attention output, by the layer's number."""
    recomputed = layers - min(policy.kept, layers)
    first = recomputed - min(policy.kept_attention, recomputed)
    return {number: KeptOutput() for number in range(first, recomputed)}


def _tile(layer: nn.Module, tokens: int | None) -> None:
    mlp = cast(Any, getattr(layer, "mlp", None))
    if mlp is None:
        if tokens is not None:
            raise ValueError(f"{type(layer).__name__} has no module 'mlp' to run in pieces")
        return
    if isinstance(mlp.forward, _Tiled):
        mlp.forward = mlp.forward.whole
    if tokens is None:
        return
    if any(parameter.requires_grad for parameter in mlp.parameters()):
        raise ValueError("an MLP that trains cannot run in pieces: take its projections out of adapter.targets")
    mlp.forward = _Tiled(mlp.forward, tokens)


class _Tiled:
    """A frozen MLP in pieces of so many tokens: (1, T, D) → (1, T, D).

    Two functions on either side of the MLP: the first saves the input, and in the backward pass runs the MLP again
    piece by piece; the second runs it forward and saves nothing. When its layer is recomputed, everything to be saved
    is there once the first has run, so the recomputation ends before the MLP: it runs twice in all, as in one piece.
    """

    def __init__(self, whole: Callable[[Tensor], Tensor], tokens: int) -> None:
        self.whole, self.tokens = whole, tokens

    def __call__(self, hidden: Tensor) -> Tensor:
        return _MlpForward.apply(_MlpBackward.apply(hidden, self), self)


class _MlpForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, tiled: _Tiled) -> Tensor:
        out = torch.empty_like(hidden)
        for piece, destination in zip(hidden.split(tiled.tokens, 1), out.split(tiled.tokens, 1), strict=True):
            destination.copy_(tiled.whole(piece))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None]:
        return grad_out, None  # of the MLP's output, not of its input: `_MlpBackward` makes one of the other


class _MlpBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, tiled: _Tiled) -> Tensor:
        ctx.tiled = tiled
        ctx.save_for_backward(hidden)
        return hidden.view_as(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None]:
        (hidden,) = ctx.saved_tensors
        gradient, size = torch.empty_like(hidden), ctx.tiled.tokens
        for piece, grad, destination in zip(*(t.split(size, 1) for t in (hidden, grad_out, gradient)), strict=True):
            leaf = piece.detach().requires_grad_()
            with torch.enable_grad():
                out = ctx.tiled.whole(leaf)
            destination.copy_(torch.autograd.grad(out, leaf, grad)[0])
        return gradient, None
