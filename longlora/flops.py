"""Operations of a training step, counted from shapes: what the method needs, not what a machine happens to do twice.

A multiplication and an addition are two operations. Causal attention counts the half of the pairs that it needs.
"""

from functools import lru_cache
from math import prod
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from longlora.segments import SegmentPlan, plan_segments


def attention_pairs(plan: SegmentPlan) -> float:
    """Query-key pairs a head, the mean of both halves of the heads: ½ Σ l² over the segments of l tokens.

    (N·G − G²/4) / 2 for one document of N tokens; each half of the heads is weighed alike.
    """
    halves = (plan.straight_runs, plan.shifted_runs)
    return sum(run.repeats * run.length**2 for runs in halves for run in runs) / len(halves) / 2


@lru_cache(maxsize=2**16)
def document_pairs(length: int, group_size: int | None) -> float:
    """`attention_pairs` of a document as if it were alone in its row; lengths of packed documents come again."""
    return attention_pairs(plan_segments([length], group_size))


def pair_operations(config: PreTrainedConfig) -> int:
    """Of one layer's attention in the forward pass, a query-key pair of every head: two products of 2·d operations."""
    settings: Any = config
    heads = settings.num_attention_heads
    head_dim = getattr(settings, "head_dim", None) or settings.hidden_size // heads
    return 2 * 2 * heads * head_dim


def attention_operations(config: PreTrainedConfig, plan: SegmentPlan) -> float:
    """Of one layer's attention in the forward pass of the row."""
    return pair_operations(config) * attention_pairs(plan)


def linear_operations(model: nn.Module, config: PreTrainedConfig) -> float:
    """Of all matrices in forward and backward, a token.

    Those that are frozen take 4 operations a weight (forward, gradient of the input), trained ones 6; embeddings none.
    """
    settings: Any = config
    embeddings = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    weights = {id(p): p for p in model.parameters() if len(_shape(p)) == 2 and id(p) not in embeddings}
    linear = sum((6 if p.requires_grad else 4) * prod(_shape(p)) for p in weights.values())
    if getattr(settings, "tie_word_embeddings", False):  # then the embeddings are the output layer as well
        trains = any(p.requires_grad for p in model.parameters() if id(p) in embeddings)
        linear += (6 if trains else 4) * settings.vocab_size * settings.hidden_size
    return linear


def step_operations(model: nn.Module, config: PreTrainedConfig, plan: SegmentPlan) -> float:
    """Forward and backward of one row, recomputation not counted.

    Attention takes 7 products where its forward pass takes 2 (FlashAttention forms the scores again).
    """
    attention = attention_operations(config, plan) * 7 / 2
    return linear_operations(model, config) * plan.tokens + attention * config.num_hidden_layers


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 keeps the shape of what it has partitioned
