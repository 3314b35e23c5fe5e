"""Parameter groups, AdamW and its state, and the learning rate as a function of the step."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from longlora.adapters import parameter_groups
from pipeline.config import Config
from pipeline.sections import Optimization

MOMENTS = ("exp_avg", "exp_avg_sq")
DECAYED = {"lora_a", "lora_b", "weights"}


@dataclass
class ParameterState:
    """A trainable parameter: fp32 master and both Adam moments, each of the parameter's shape."""

    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


@dataclass
class Fragment:
    """What one rank holds of a parameter's state: elements `start` … of it, flattened; each tensor (n,), fp32."""

    start: int
    state: ParameterState


def build_optimizer(model: torch.nn.Module, config: Config) -> torch.optim.AdamW:
    """AdamW over explicit groups: A, B, embeddings, norms (LoRA), or embeddings, norms, weights (full training).

    Each group carries `lr_ratio`, its learning rate over that of the step; see `set_learning_rate`.
    """
    settings = config.optimization
    groups = [
        {
            "name": name,
            "params": [parameter for _, parameter in named],
            "weight_decay": settings.weight_decay if name in DECAYED else 0.0,
            "lr_ratio": config.adapter.lora_b_lr_ratio if name == "lora_b" else 1.0,
        }
        for name, named in parameter_groups(model).items()
        if named
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps)


def learning_rate(step: int, settings: Optimization) -> float:
    """Learning rate of step `step` (from 0): linear warm-up, then constant, cosine or linear to `final_lr_ratio`."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.learning_rate
    done = (step - settings.warmup_steps + 1) / (settings.steps - settings.warmup_steps)
    shape = (1 + math.cos(math.pi * done)) / 2 if settings.schedule == "cosine" else 1 - done
    return settings.learning_rate * (settings.final_lr_ratio + (1 - settings.final_lr_ratio) * shape)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Gives every group `rate` × its `lr_ratio`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_ratio"]
