"""How a worker's GPU is used: fused operators, and which activations are kept. The same on all workers of a run."""

from typing import Any

import torch
import torch.distributed as dist

from longlora import fused
from longlora.activations import ActivationPolicy
from longlora.model import LongContextModel
from longlora.probe import auto_policy, probe
from longlora.segments import plan_segments
from pipeline.assignment import FinalError
from pipeline.config import Config


def may_fuse(config: Config) -> bool:
    """Whether fused operators are put in where there are any."""
    return config.model.fused == "auto" and torch.cuda.is_available()


def fusion_told(config: Config, model: LongContextModel) -> str:
    """What is fused, or why it is not."""
    if config.model.fused == "off":
        return "off"
    refused = fused.refusal(model.causal_lm.config.model_type, model.causal_lm.device)
    return f"LoRA ({refused})" if refused and may_fuse(config) else refused or "norms, MLP, rotation, loss, LoRA"


def agreed_policy(config: Config, model: LongContextModel) -> ActivationPolicy:
    """The config's policy; for `auto` the one that fits every worker, by what is free on each now.

    Collective. FinalError, with the figures, where a worker's memory is too small for any.
    """
    if config.model.activations == "keep":
        return ActivationPolicy(kept=model.layers)
    # Under ZeRO-3 a row run aside would disturb DeepSpeed's record of which weights come next.
    if config.model.activations == "recompute" or config.workers.zero_stage == 3:
        return ActivationPolicy(kept=0)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, _own_policy(config, model))
    for answer in everyone:
        if isinstance(answer, str):
            raise FinalError(answer)
    return min(everyone, key=lambda policy: (not policy.offload, policy.mlp_tile is None, _spared(policy)))


def probed_group_size(config: Config) -> int | None:
    """The config's, or None if rows ever attend in full: in the last steps, or because they are no longer than it."""
    group_size = config.attention.group_size
    is_ever_full = config.attention.full_last > 0 or config.context.length <= (group_size or 0)
    return None if is_ever_full else group_size


def _own_policy(config: Config, model: LongContextModel) -> ActivationPolicy | str:
    """This worker's policy, or why there is none."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    gradients = trained * (model.causal_lm.dtype.itemsize + 4)  # and sums of them, in fp32
    row = [config.context.length] * config.optimization.micro_batch
    plan = plan_segments(row, config.attention.group_size).to(model.causal_lm.device)
    try:
        return auto_policy(model, plan, probe(model, probed_group_size(config)), gradients)
    except ValueError as error:
        return str(error)


def _spared(policy: ActivationPolicy) -> int:
    """More is kept with a larger number; only the order of policies on equal machines matters."""
    return 2 * policy.kept + policy.kept_attention
