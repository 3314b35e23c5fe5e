"""How long a step should take on a GPU: operations over the rates that its kernels reach, bytes over its bandwidth.

Three terms that follow one another: matrix products, attention, and what reads and writes activations between them.
The shares are fitted to steps of an H200 (benchmarks/step.py, with cuDNN's attention and Liger's kernels).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from longlora.activations import ActivationPolicy
from longlora.flops import attention_operations, step_operations
from longlora.memory import ActivationCosts
from longlora.model import LongContextModel
from longlora.segments import SegmentPlan, plan_segments

MATRIX_SHARE = 1.03
"""Of the rate of a product of two 8192 × 8192 matrices (benchmarks/gpu_rates.py), over all products of a step."""
ATTENTION_SHARE = 0.72
"""Of the same rate, forward and backward at segments of 8k tokens; shorter ones reach less."""
PASSES = 11.5
"""How often what a layer keeps of a token is read or written in a forward and backward pass outside of products."""
PASSES_AGAIN = 0.4
"""Share of these that recomputing a layer adds."""

_COUNTED_TOKENS = 256


@dataclass(frozen=True)
class Rates:
    """What a GPU reaches: operations a second in large bf16 products, bytes a second of large copies."""

    operations: float
    bytes: float


@dataclass(frozen=True)
class Recomputation:
    """Operations a token that a recomputed layer does again, without attention: its MLP in one piece, and in pieces."""

    whole: float
    in_pieces: float


def step_seconds(
    model: LongContextModel,
    plan: SegmentPlan,
    policy: ActivationPolicy,
    costs: ActivationCosts,
    again: Recomputation,
    rates: Rates,
) -> float:
    """Seconds for forward and backward of a row like the plan's under `policy`, without optimizer and communication."""
    config, layers = model.causal_lm.config, costs.layers
    recomputed = layers - min(policy.kept, layers)
    one_attention = attention_operations(config, plan)
    attention = one_attention * (layers * 7 / 2 + recomputed - min(policy.kept_attention, recomputed))
    products = step_operations(model, config, plan) - one_attention * layers * 7 / 2
    products += recomputed * plan.tokens * (again.whole if policy.mlp_tile is None else again.in_pieces)
    traffic = PASSES * costs.everything * plan.tokens * (layers + PASSES_AGAIN * recomputed)
    return (products / MATRIX_SHARE + attention / ATTENTION_SHARE) / rates.operations + traffic / rates.bytes


def recomputation(model: LongContextModel) -> Recomputation:
    """Counted on the model, which must be on the meta device."""
    kept = _products(model, ActivationPolicy(kept=model.layers))
    whole = _products(model, ActivationPolicy(0))
    pieces = whole
    if not any(p.requires_grad for name, p in model.named_parameters() if ".mlp." in name):
        pieces = _products(model, ActivationPolicy(0, mlp_tile=_COUNTED_TOKENS // 2))
    model.follow(ActivationPolicy(kept=model.layers))
    return Recomputation(*((count - kept) / model.layers / _COUNTED_TOKENS for count in (whole, pieces)))


def _products(model: LongContextModel, policy: ActivationPolicy) -> int:
    """Operations of all matrix products in forward and backward of a short row."""
    model.follow(policy)
    ids = torch.zeros(1, _COUNTED_TOKENS, dtype=torch.int64, device="meta")
    positions = torch.arange(_COUNTED_TOKENS, device="meta")[None]
    with _Counter() as counter:
        hidden = model.hidden_states(ids, positions, plan_segments([_COUNTED_TOKENS], None).to("meta"))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        torch.autograd.grad(hidden, trained, torch.ones_like(hidden), allow_unused=True)
    return counter.operations


class _Counter(TorchDispatchMode):
    """Operations of products, by torch's formulas; its own counter follows modules, which pieces of an MLP upset."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None and "attention" not in str(func):
            self.operations += formula(*args, **(kwargs or {}), out_val=out)
        return out
