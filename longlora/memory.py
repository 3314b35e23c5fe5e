"""Activation memory of a step from the costs of one layer, and the policy that makes the most of what is free.

Bytes from bytes: pure. `longlora.probe` measures the costs on the model itself.
"""

from dataclasses import dataclass
from itertools import product

from longlora.activations import ActivationPolicy

MLP_TILE = 16384
MARGIN = 0.05
"""Share of the free memory that is left alone: fragments, kernels' workspaces, NCCL."""

_ATTENTION_RATE = 0.7  # of attention kernels relative to matrix products, for which of the two to keep first


@dataclass(frozen=True)
class ActivationCosts:
    """Bytes a token of one layer, and of what stands around the layers.

    around: kept beside the layers: input and output of the last norm above all, gone only in the backward pass.
    inputs: of a layer, which a recomputed layer keeps. attention: of its output and log-sum-exp. everything: that a
    layer keeps if it is not recomputed, input included. work: at the peak of a layer's backward pass beside what it
    keeps. mlp: the part of everything + work that an MLP in pieces needs for one piece instead of the row; 0 where the
    MLP trains and cannot run in pieces.
    """

    layers: int
    around: float
    inputs: float
    attention: float
    everything: float
    work: float
    mlp: float

    def held(self, policy: ActivationPolicy, tokens: int) -> float:
        """Bytes that the layers keep when the forward pass has gone through all of them."""
        kept = min(policy.kept, self.layers)
        return kept * self.everything * tokens + self._waiting(policy, tokens)

    def peak(self, policy: ActivationPolicy, tokens: int) -> float:
        """Bytes at the peak of the layers' backward pass.

        That of the last layers starts with everything of all layers kept; when the first recomputed layer has its turn,
        what the kept ones held is free again.
        """
        again = self.everything + self.work
        if policy.mlp_tile is not None:
            again -= self.mlp * max(0.0, 1 - policy.mlp_tile / tokens)
        if policy.offload:
            again += 2 * self.inputs  # one on its way out or back
        of_kept = self.held(policy, tokens) + self.work * tokens if policy.kept else 0.0
        of_recomputed = self._waiting(policy, tokens) + again * tokens if policy.kept < self.layers else 0.0
        return max(of_kept, of_recomputed)

    def _waiting(self, policy: ActivationPolicy, tokens: int) -> float:
        recomputed = self.layers - min(policy.kept, self.layers)
        inputs = 0.0 if policy.offload else recomputed * self.inputs
        return (self.around + inputs + min(policy.kept_attention, recomputed) * self.attention) * tokens


def head_bytes(vocabulary: int, hidden: int, tokens: int, fused: bool) -> float:
    """Bytes beside what is held while the loss is made: chunks of logits, gradients of the hidden states.

    Chunks as Liger cuts them (as many logits as hidden states, rounded up to a power of two of tokens) in bf16; without
    it 2048 tokens, logits once in bf16 and in fp32 with their gradients.
    """
    if fused:
        chunk = 1 << max(0, (-(-tokens // -(-vocabulary // hidden)) - 1).bit_length())
        return min(chunk, tokens) * vocabulary * 2 + tokens * hidden * 2 * 2
    return min(2048, tokens) * vocabulary * (2 + 2 + 4 + 4 + 4) + tokens * hidden * 2 * 2


def choose_policy(
    costs: ActivationCosts,
    tokens: int,
    free: float,
    head: float,
    attention_work: float,
    layer_work: float,
    *,
    may_offload: bool = True,
) -> ActivationPolicy | None:
    """The policy that recomputes least within `free` bytes; None if none fits.

    head: bytes that the loss needs, after the last layer and before the first backward pass. attention_work and
    layer_work: operations a token of one layer's attention and of the rest of its forward pass. Layers keep attention
    or everything, whichever spares more for its bytes; pieces of the MLP, then host memory, come only where it does not
    fit otherwise, since they cost time.
    """
    attention_work /= _ATTENTION_RATE
    offloads = (False, True) if may_offload else (False,)
    tiles = (None, MLP_TILE) if costs.mlp and tokens > MLP_TILE else (None,)
    for offload, tile in product(offloads, tiles):
        fitting = [
            policy
            for kept in range(costs.layers + 1)
            for attention in range(costs.layers - kept + 1)
            if required(costs, policy := ActivationPolicy(kept, attention, offload, tile), tokens, head) <= free
        ]
        if fitting:
            return max(
                fitting, key=lambda p: p.kept * (layer_work + attention_work) + p.kept_attention * attention_work
            )
    return None


def required(costs: ActivationCosts, policy: ActivationPolicy, tokens: int, head: float) -> float:
    """Bytes of activations at the peak of a step: in the layers' backward pass, or at the loss."""
    return max(costs.peak(policy, tokens), costs.held(policy, tokens) + head)
