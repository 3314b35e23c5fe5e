"""Fused RMSNorm, RoPE, SwiGLU and head + loss on a GPU: the kernels of Liger (optional), put into one model.

They read and write each activation once where the model's own operators do so several times, and save for the backward
pass the input instead of several copies of it. Trained norms and embeddings receive their gradients as before.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from longlora.fused_shapes import fuse_shapes

_PARTS = {"rope": True, "rms_norm": True, "swiglu": True, "geglu": True}
_NOT_OURS = {"cross_entropy": False, "fused_linear_cross_entropy": False}  # the loss is `fused_head_loss`


def refusal(model_type: str, device: torch.device | str) -> str | None:
    """Why the model's own operators stay; None if they can be replaced (on the meta device by what stands for them)."""
    if torch.device(device).type == "meta":
        return None
    if torch.device(device).type != "cuda":
        return f"needs a CUDA device, not {torch.device(device).type}"
    if find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    if model_type not in _liger_patches().MODEL_TYPE_TO_APPLY_LIGER_FN:
        return f"liger-kernel knows no {model_type}"
    return None


def fuse(model: PreTrainedModel) -> None:
    """Replaces the operators of this model, before an adapter is attached to it.

    Liger also replaces classes for models made later, and the rotation for all models of the family: both are undone,
    except for the rotation of tensors on a GPU. A model on the meta device gets stand-ins that keep as much.
    """
    if model.device.type == "meta":
        fuse_shapes(model)
        return
    modeling: Any = sys.modules[type(model).__module__]
    before = dict(vars(modeling))
    _liger_patches()._apply_liger_kernel_to_instance(model, **_PARTS, **_NOT_OURS)
    for name, value in before.items():
        if vars(modeling)[name] is value:
            continue
        setattr(modeling, name, value if isinstance(value, type) else _on_gpu(vars(modeling)[name], value))


def can_fuse_head(head: nn.Module, device: torch.device) -> bool:
    """Whether head and loss can be one kernel: a plain linear layer on a GPU, without a hook that must run with it."""
    return (
        device.type == "cuda"
        and type(head) is nn.Linear
        and not head._forward_pre_hooks  # ZeRO-3 gathers the weight in one
        and not head._forward_hooks
        and find_spec("liger_kernel") is not None
    )


def fused_head_loss(hidden: Tensor, head: nn.Linear, targets: Tensor, no_target: int) -> Tensor:
    """Σ −log softmax(head(hidden))[target], fp32 scalar; the gradient of `hidden` is made in the forward pass.

    hidden (T, D), targets (T,) int64. No logits are made again: 4·T·D·V operations, where chunks take 6·T·D·V.
    """
    function = import_module("liger_kernel.ops.fused_linear_cross_entropy").LigerFusedLinearCrossEntropyFunction
    loss, *_ = function.apply(
        hidden, head.weight, targets, head.bias, None, no_target, 0.0, 0.0, "sum", None, False, torch.float32
    )
    return loss


def _liger_patches() -> Any:
    return import_module("liger_kernel.transformers.monkey_patch")


def _on_gpu(fused: Any, own: Any) -> Any:
    """The fused function for tensors on a GPU, the model's own for others."""

    def function(first: Tensor, *arguments: Any, **keywords: Any) -> Any:
        return (fused if first.is_cuda else own)(first, *arguments, **keywords)

    return function
