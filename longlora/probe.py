"""What one layer's activations cost, measured on the model itself, and the policy for the memory that is there.

A short row is run through the model under a few policies; the differences are what a layer keeps a token, with whatever
kernels, precision and adapter are in use. On a GPU torch's allocator counts, elsewhere `LiveBytes` does: also on the
meta device, before there is a GPU.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longlora.activations import ActivationPolicy, layers_of
from longlora.flops import attention_operations
from longlora.live_bytes import LiveBytes
from longlora.memory import MARGIN, MLP_TILE, ActivationCosts, choose_policy, head_bytes, required
from longlora.model import LongContextModel
from longlora.segments import SegmentPlan, plan_segments

PROBE_TOKENS = {"cuda": 4096, "meta": 4096, "cpu": 256}


def auto_policy(
    model: LongContextModel, plan: SegmentPlan, costs: ActivationCosts, reserved: float = 0.0
) -> ActivationPolicy:
    """The policy for rows like the plan's in what is free on the model's device, less `reserved` bytes for gradients.

    costs: by `probe`. Raises ValueError, with the figures, where not even recomputing every layer with its input in
    host memory fits.
    """
    device = model.causal_lm.device
    free = free_bytes(device) * (1 - MARGIN) - reserved
    head = head_cost(model, plan.tokens, model.is_head_fused)
    return policy_within(free, model, plan, costs, head, is_gpu=device.type == "cuda")


def policy_within(
    free: float, model: LongContextModel, plan: SegmentPlan, costs: ActivationCosts, head: float, *, is_gpu: bool
) -> ActivationPolicy:
    """The policy that recomputes least in `free` bytes; on a GPU inputs may wait in host memory. ValueError if none."""
    config: Any = model.causal_lm.config
    tokens = plan.tokens
    layer_work = 2 * sum(parameter.numel() for parameter in layers_of(model)[0].parameters())
    attention_work = attention_operations(config, plan) / tokens
    policy = choose_policy(costs, tokens, free, head, attention_work, layer_work, may_offload=is_gpu)
    if policy is None:
        least = ActivationPolicy(0, 0, is_gpu, MLP_TILE if costs.mlp else None)
        raise ValueError(
            f"{tokens:,} tokens need {required(costs, least, tokens, head) / 2**30:.1f} GiB of activations even if "
            f"every layer is recomputed, and {max(0.0, free) / 2**30:.1f} GiB are free: "
            "shorten context.length or optimization.micro_batch"
        )
    return policy


def head_cost(model: LongContextModel, tokens: int, is_fused: bool) -> float:
    """Bytes that the output layer and the loss of a row take at their peak."""
    config: Any = model.causal_lm.config
    return head_bytes(config.vocab_size, config.hidden_size, tokens, is_fused)


def free_bytes(device: torch.device) -> float:
    """What can still be allocated: on a GPU free on the card or held by torch without use; else this process's share.

    The share of the host's memory is what is available, also to its control group, over the workers on the machine.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    available = next(float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.exists() and (most := limit.read_text(encoding="ascii").strip()) != "max":
        available = min(available, float(most) - float(used.read_text(encoding="ascii")))
    return available / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def probe(model: LongContextModel, group_size: int | None) -> ActivationCosts:
    """Measures the costs on the model's device with a short row; gradients of parameters are not made.

    group_size: None (full attention) needs most: all heads attend in one call.
    """
    base = model.causal_lm
    tokens = PROBE_TOKENS[base.device.type]
    inputs = base.config.hidden_size * base.dtype.itemsize
    plan = plan_segments([tokens], group_size and min(group_size, tokens // 4))  # of several groups, as a long row
    measure = _Measure(model, plan.to(base.device))
    with _policy_restored(model):
        held, peak = measure(ActivationPolicy(0))
        held_attention, _ = measure(ActivationPolicy(0, 1))
        held_layer, _ = measure(ActivationPolicy(1))
        mlp = 0.0
        if _is_frozen(getattr(layers_of(model)[0], "mlp", None)):
            _, peak_of_pieces = measure(ActivationPolicy(0, mlp_tile=tokens // 4))
            mlp = max(0.0, peak - peak_of_pieces) / tokens / (1 - 1 / 4)
    everything = (held_layer - held) / tokens + inputs
    return ActivationCosts(
        layers=model.layers,
        around=held / tokens - model.layers * inputs,
        inputs=inputs,
        attention=(held_attention - held) / tokens,
        everything=everything,
        work=max((peak - held) / tokens - everything, 2 * inputs),
        mlp=mlp,
    )


class _Measure:
    """Bytes held after the forward pass through the layers, and at the peak of the backward pass, above the start."""

    def __init__(self, model: LongContextModel, plan: SegmentPlan) -> None:
        self.model, self.plan = model, plan
        self.device = model.causal_lm.device
        if self.device.type == "cuda":
            self(ActivationPolicy(0))  # workspaces and compiled kernels are there from now on

    def __call__(self, policy: ActivationPolicy) -> tuple[int, int]:
        self.model.follow(policy)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            start = torch.cuda.memory_allocated(self.device)
            embedded, out = self._forward()
            held = torch.cuda.memory_allocated(self.device) - start
            torch.cuda.reset_peak_memory_stats(self.device)
            torch.autograd.grad(out, embedded, torch.ones_like(out))
            return held, torch.cuda.max_memory_allocated(self.device) - start
        with LiveBytes() as live:
            embedded, out = self._forward()
            held = live.now
            live.reset_peak()
            torch.autograd.grad(out, embedded, torch.ones_like(out))
            return held, live.peak

    def _forward(self) -> tuple[Tensor, Tensor]:
        """The embedded row, and the last hidden state."""
        embedded: list[Tensor] = []

        def keep(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            embedded.append(output.detach().requires_grad_())
            return embedded[0]

        ids = torch.zeros(1, self.plan.tokens, dtype=torch.int64, device=self.device)
        positions = torch.arange(self.plan.tokens, device=self.device)[None]
        hook = self.model.causal_lm.get_input_embeddings().register_forward_hook(keep)
        try:
            out = self.model.hidden_states(ids, positions, self.plan)
        finally:
            hook.remove()
        return embedded[0], out


@contextmanager
def _policy_restored(model: LongContextModel) -> Iterator[None]:
    policy = model.policy
    try:
        yield
    finally:
        model.follow(policy)


def _is_frozen(mlp: nn.Module | None) -> bool:
    return mlp is not None and not any(parameter.requires_grad for parameter in mlp.parameters())
