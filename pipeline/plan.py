"""What a run would take, from its config alone: memory, time, money. Nothing is loaded and nothing is started.

The model is built on the meta device. What its layers keep is counted there byte by byte (`longlora.probe`), the time
follows from a roofline (`longlora.roofline`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from longlora.activations import ActivationPolicy
from longlora.memory import MARGIN, MLP_TILE, ActivationCosts, required
from longlora.probe import head_cost, policy_within, probe
from longlora.roofline import Recomputation, recomputation, step_seconds
from longlora.segments import SegmentPlan, plan_segments
from pipeline.activation_policy import probed_group_size
from pipeline.config import Config
from pipeline.gpus import Gpu
from pipeline.models import build_model

GIB = 2**30
HOUR = 3600
ROUND = 1024  # tokens: contexts are looked for in multiples of it
ADAM_BYTES = 28
"""Read and written a trained parameter: gradient, master, both moments."""
SNAPSHOT_RATE = 1e10
"""Bytes a second at which a save holds up a worker: 838 MB in 0.084 s (docs/reliability.md, its cost)."""
RECOVERY_S = 120.0
"""From the loss of a machine to the next step with a 7B model, loading included; docs/reliability.md has the phases."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the peak of a step."""

    weights: float
    optimizer: float
    """fp32 masters and both moments."""
    gradients: float
    activations: float
    """Of the layers and the loss, whichever peak is higher."""

    @property
    def total(self) -> float:
        return self.weights + self.optimizer + self.gradients + self.activations


@dataclass(frozen=True)
class Preemptions:
    """Losses an hour of one machine, with so many of the GPUs, and seconds until the next step."""

    per_hour: float
    recovery_s: float = RECOVERY_S
    gpus_per_machine: int = 1

    def a_second(self, workers: int) -> float:
        """Losses among the machines of so many workers."""
        return self.per_hour / HOUR * math.ceil(workers / self.gpus_per_machine)


@dataclass(frozen=True)
class Plan:
    """What a run takes on `workers` GPUs of a type. Times in seconds, memory in bytes."""

    gpu: Gpu
    workers: int
    context: int
    trained: int
    parameters: int
    memory: Memory
    policy: ActivationPolicy | None
    """None: it does not fit."""
    reason: str
    """Why not."""
    longest_context: int
    """Tokens of the longest row that fits, all layers recomputed if need be, without host memory."""
    largest_micro_batch: int
    step_s: float
    steps: int
    tokens_a_step: int
    checkpoint_bytes: int
    checkpoint_steps: int

    @property
    def fits(self) -> bool:
        return self.policy is not None

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_a_step / self.step_s

    @property
    def seconds(self) -> float:
        """Of all steps, undisturbed."""
        return self.step_s * self.steps

    def seconds_with(self, preemptions: Preemptions) -> float:
        """Each loss costs the recovery and, without a notice, half of the steps between two checkpoints."""
        lost = preemptions.recovery_s + self.step_s * self.checkpoint_steps / 2
        share = preemptions.a_second(self.workers) * lost
        return float("inf") if share >= 1 else self.seconds / (1 - share)

    def best_checkpoint_steps(self, preemptions: Preemptions) -> int:
        """Steps between checkpoints that waste least, between what saves hold up and what losses undo.

        √(2 × save × time between losses), by Young: "A first order approximation to the optimum checkpoint interval"
        (1974).
        """
        losses = preemptions.a_second(self.workers)
        if not losses:
            return self.steps
        save_s = self.checkpoint_bytes / self.workers / SNAPSHOT_RATE
        return min(max(round(math.sqrt(2 * save_s / losses) / self.step_s), 1), self.steps)

    def cost(self, price: float, preemptions: Preemptions | None = None) -> float:
        """At `price` per GPU-hour."""
        return price * self.workers * (self.seconds_with(preemptions) if preemptions else self.seconds) / HOUR


Counted = dict[str, tuple[ActivationCosts, Recomputation]]
"""What has been counted on models of the same shapes, by their settings: a sweep counts once."""


def make_plan(config: Config, gpu: Gpu, workers: int, counted: Counted | None = None) -> Plan:
    """ConfigError or ValueError for a model that cannot be built."""
    subject = _Subject(config, gpu, workers, {} if counted is None else counted)
    policy, reason = subject.policy()
    longest = _longest(lambda tokens: subject.activations(tokens) is not None)
    trained = subject.numel(trained=True)
    return Plan(
        gpu=gpu,
        workers=workers,
        context=config.context.length,
        trained=trained,
        parameters=subject.numel(),
        memory=subject.memory(policy or ActivationPolicy(0)),
        policy=policy,
        reason=reason,
        longest_context=longest,
        largest_micro_batch=longest // config.context.length,
        step_s=subject.step_seconds(policy or ActivationPolicy(0)),
        steps=config.optimization.steps,
        tokens_a_step=config.optimization.global_batch * config.context.length,
        checkpoint_bytes=12 * trained,
        checkpoint_steps=config.checkpoint.every_steps,
    )


class _Subject:
    """The model of a config on one of `workers` GPUs."""

    def __init__(self, config: Config, gpu: Gpu, workers: int, counted: Counted) -> None:
        self.config, self.gpu, self.workers = config, gpu, workers
        fuse = config.model.fused == "auto"
        self.model = build_model(config, device="meta", fuse=fuse)
        self.is_head_fused = fuse and config.workers.zero_stage != 3 and type(self._head) is nn.Linear
        group_size = probed_group_size(config)
        shapes = [config.model, config.adapter, group_size]
        key = repr(shapes)
        if key not in counted:
            counted[key] = probe(self.model, group_size), recomputation(self.model)
        self.costs, self.again = counted[key]

    def numel(self, *, trained: bool = False) -> int:
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad or not trained)

    def policy(self) -> tuple[ActivationPolicy | None, str]:
        """What the workers will choose; or None, and the reason in one line."""
        row = self._row(self.config.optimization.micro_batch)
        fixed = {"keep": ActivationPolicy(self.model.layers), "recompute": ActivationPolicy(0)}
        kind = self.config.model.activations
        if kind == "auto" and self.config.workers.zero_stage != 3:
            try:
                head = head_cost(self.model, row.tokens, self.is_head_fused)
                return policy_within(self._free, self.model, row, self.costs, head, is_gpu=True), ""
            except ValueError as error:
                return None, str(error)
        policy = fixed.get(kind, ActivationPolicy(0))
        needed = self._needed(policy, row.tokens)
        if needed <= self._free:
            return policy, ""
        return None, (
            f"{row.tokens:,} tokens need {needed / GIB:.1f} GiB of activations with model.activations = {kind}, and "
            f"{max(0.0, self._free) / GIB:.1f} GiB are free: shorten context.length or optimization.micro_batch"
        )

    def activations(self, tokens: int) -> ActivationPolicy | None:
        """A policy for a row of so many tokens that needs no host memory; None if there is none."""
        allowed = [ActivationPolicy(0)]
        if self.config.model.activations == "keep":
            allowed = [ActivationPolicy(self.model.layers)]
        elif self.costs.mlp and self.config.model.activations == "auto" and self.config.workers.zero_stage != 3:
            allowed.append(ActivationPolicy(0, mlp_tile=MLP_TILE))
        return next((policy for policy in allowed if self._needed(policy, tokens) <= self._free), None)

    def memory(self, policy: ActivationPolicy | None) -> Memory:
        """At the peak of a step; None for what is there before and after one."""
        shards = self.workers if self.config.workers.zero_stage == 3 else 1
        itemsize, trained = self.model.causal_lm.dtype.itemsize, self.numel(trained=True)
        micro_batch = self.config.optimization.micro_batch
        return Memory(
            weights=self.numel() * itemsize / shards,
            optimizer=12 * trained / self.workers,
            gradients=trained * (itemsize + self._gradient_sums(itemsize)),
            activations=0.0 if policy is None else self._needed(policy, self._row(micro_batch).tokens),
        )

    def _gradient_sums(self, itemsize: int) -> float:
        """Bytes a parameter: of several micro-batches in bf16 whole (`gradient_sums.py`), else DeepSpeed's shares."""
        several = self.config.optimization.global_batch > self.workers * self.config.optimization.micro_batch
        return 4 if several and itemsize < 4 else 4 / self.workers

    def step_seconds(self, policy: ActivationPolicy) -> float:
        """Of the worker with most rows; without communication."""
        rows = -(-self.config.optimization.global_batch // self.workers)
        micro = self.config.optimization.micro_batch
        whole, rest = divmod(rows, micro)
        seconds = self.numel(trained=True) * ADAM_BYTES / self.workers / self.gpu.rates.bytes
        for count, size in ((whole, micro), (1, rest)):
            if count and size:
                seconds += count * step_seconds(
                    self.model, self._row(size), policy, self.costs, self.again, self.gpu.rates
                )
        return seconds

    def _row(self, sequences: int) -> SegmentPlan:
        """Sequences of one document each, as long as the context: what costs most."""
        return plan_segments([self.config.context.length] * sequences, self.config.attention.group_size)

    @property
    def _head(self) -> nn.Module:
        return self.model.causal_lm.get_output_embeddings()

    @property
    def _free(self) -> float:
        """As the workers find it: what weights and optimizer leave, less the margin and the gradients."""
        static = self.memory(None)
        return (self.gpu.usable_gib * GIB - static.weights - static.optimizer) * (1 - MARGIN) - static.gradients

    def _needed(self, policy: ActivationPolicy, tokens: int) -> float:
        return required(self.costs, policy, tokens, head_cost(self.model, tokens, self.is_head_fused))


def _longest(fits: Callable[[int], bool]) -> int:
    """The most tokens, in multiples of `ROUND`, that fit; 0 if not even one multiple does."""
    low, high = 0, 1
    while fits(high * ROUND):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * ROUND) else (low, middle)
    return low * ROUND
