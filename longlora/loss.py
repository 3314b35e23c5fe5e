"""Summed token cross-entropy that never holds the logits of a whole row.

A row of 100k tokens and a vocabulary of 128k would need 51 GB of fp32 logits. Here the head runs over chunks of tokens,
and each chunk's logits are made again in the backward pass, so that one chunk's worth is the most that ever exists.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longlora.fused import can_fuse_head, fused_head_loss

NO_TARGET = -100


def summed_cross_entropy(
    hidden: Tensor, head: nn.Module, targets: Tensor, chunk_tokens: int = 2048, fuse: bool = True
) -> Tensor:
    """Σ −log softmax(head(hidden))[target] over the tokens that have a target; an fp32 scalar, in nats.

    hidden (T, D); head maps (n, D) to logits (n, vocabulary) and is called as a module, so that hooks on it run (ZeRO-3
    gathers its weight there); targets (T,) int64, −100 where a token has none. The softmax is taken in fp32. Gradients
    reach `hidden` and whatever of the head requires them. Costs one more product with the head than the plain loss;
    `fuse` takes Liger's kernel for both where it can run, which does not.
    """
    if hidden.shape[0] != targets.shape[0]:
        raise ValueError(f"{hidden.shape[0]} hidden states and {targets.shape[0]} targets: give one target a token")

    if fuse and can_fuse_head(head, hidden.device):
        return fused_head_loss(hidden, cast(nn.Linear, head), targets, NO_TARGET)

    def chunk_loss(hidden_chunk: Tensor, targets_chunk: Tensor) -> Tensor:
        logits = head(hidden_chunk).float()
        return F.cross_entropy(logits, targets_chunk, ignore_index=NO_TARGET, reduction="sum")

    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for hidden_chunk, targets_chunk in zip(hidden.split(chunk_tokens), targets.split(chunk_tokens), strict=True):
        # A head has no dropout: there is no random state to restore.
        total = total + checkpoint(
            chunk_loss, hidden_chunk, targets_chunk, use_reentrant=False, preserve_rng_state=False
        )
    return total
