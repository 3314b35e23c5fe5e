"""S²-Attn under transformers' ``AttentionInterface``, as ``"s2"``: models are reached without patching a class.

    register()
    model.set_attn_implementation("s2")
    model(input_ids, position_ids=positions, use_cache=False, segment_plan=plan_segments(document_lengths, group_size))

A row of documents is one sequence, batch size 1: input_ids (1, T), position_ids (1, T) restarting at each document.
"""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AttentionInterface

from longlora.attention import KeptOutput, s2_attention
from longlora.segments import SegmentPlan

NAME = "s2"

# Keywords that models hand down and that say nothing about which token attends to which.
_WITHOUT_EFFECT = frozenset(
    {
        "position_ids",
        "cache_position",
        "use_cache",
        "output_hidden_states",
        "output_router_logits",
        "num_items_in_batch",
    }
)


def register() -> None:
    """Make ``"s2"`` known to transformers. Calling it again changes nothing.

    No mask function goes with it: without one, transformers builds no mask and does not look at the position ids.
    """
    AttentionInterface.register(NAME, segment_attention)


def segment_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    segment_plan: SegmentPlan | None = None,
    attention_backend: str = "auto",
    kept_outputs: Mapping[int, KeptOutput] | None = None,
    scaling: float | None = None,
    **keywords: Any,
) -> tuple[torch.Tensor, None]:
    """query (1, H, T, d), key and value (1, Hkv, T, d), RoPE applied → (1, T, H, d), and no attention weights.

    ``kept_outputs``: by the number of a layer that will be recomputed, where it leaves its output (see `KeptOutput`).

    Raises ValueError, in one line, where the call asks for what segments do not do: a mask, a key-value cache,
    dropout, a window that a document outgrows, or any keyword that is not known to be harmless (softcap, sinks).
    """
    if segment_plan is None:
        raise ValueError(
            "attention 's2' needs segment_plan: pass plan_segments(document_lengths, group_size) to model()"
        )
    if query.shape[0] != 1 or attention_mask is not None:
        raise ValueError(
            f"attention 's2' takes one row of documents without a mask, not a batch of {query.shape[0]}"
            f"{'' if attention_mask is None else ' with an attention mask'}: fold the rows into one and plan them"
        )
    if key.shape[2] != query.shape[2]:
        raise ValueError(
            f"attention 's2' got {query.shape[2]} queries for {key.shape[2]} keys: it trains on whole rows and has no "
            "key-value cache; generate with 'sdpa'"
        )
    refuse_unhandled(segment_plan, keywords)
    # squeeze, whose gradient is a view; that of an index would be a tensor of zeros and a copy into it.
    q, k, v = (t.squeeze(0).transpose(0, 1) for t in (query, key, value))
    kept = kept_outputs.get(module.layer_idx) if kept_outputs else None  # type: ignore[call-overload]
    return s2_attention(q, k, v, segment_plan, scaling, attention_backend, kept).unsqueeze(0), None


def refuse_unhandled(plan: SegmentPlan, keywords: dict[str, Any]) -> None:
    """Raises ValueError for what a model hands to its attention beside q, k and v and segments do not do."""
    asked = {name: value for name, value in keywords.items() if value is not None and name not in _WITHOUT_EFFECT}
    if asked.pop("dropout", 0.0):
        raise ValueError(f"attention 's2' has no dropout, got {keywords['dropout']}: set attention_dropout to 0")
    window, longest = asked.pop("sliding_window", None), max(plan.document_lengths)
    if window is not None and window < longest:
        raise ValueError(
            f"attention 's2' got a sliding window of {window} tokens and a document of {longest}: remove the window "
            "(sliding_window: null)"
        )
    if not asked.pop("is_causal", True):
        raise ValueError("attention 's2' is causal, got is_causal=False: it extends decoders only")
    if asked.pop("output_attentions", False):
        raise ValueError("attention 's2' never forms attention weights, got output_attentions=True: use 'eager'")
    if asked:
        raise ValueError(
            f"attention 's2' does not handle {', '.join(sorted(asked))}: this model needs another attention"
        )
