"""Predictions from shapes alone, on the meta device, against what `benchmarks/step.py` has measured on an H200."""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from longlora.activations import ActivationPolicy
from longlora.memory import MLP_TILE, ActivationCosts, head_bytes, required
from longlora.model import LongContextModel, build_base, training_model
from longlora.probe import probe
from longlora.roofline import Rates, Recomputation, recomputation, step_seconds
from longlora.segments import plan_segments

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
H200 = Rates(790e12, 4.3e12)
LORA = {"rank": 8, "alpha": 16, "dropout": 0.0, "targets": "auto", "rslora": False, "dora": False}
LORA |= {"train_embeddings": True, "train_norms": True}
SHAPES = {
    "llama2-7b": {"intermediate_size": 11008, "num_key_value_heads": 32, "vocab_size": 32000},
    "llama3-8b": {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256},
}


def rows() -> Iterator[Any]:
    """Rows of the newest results that follow a policy and attend by S²-Attn, with the model's name."""
    for name in ("step-llama2-7b", "step-policies", "step-longest", "step-llama3-8b"):
        measured = json.loads(sorted(RESULTS.glob(f"*-{name}.json"))[-1].read_text(encoding="utf-8"))
        for row in measured["rows"]:
            if row["contender"] in ("recompute", "auto") and "seconds" in row:
                yield pytest.param(measured["model"], row, id=f"{name}-{row['contender']}-{row['tokens']}")


@cache
def counted(name: str) -> tuple[LongContextModel, ActivationCosts, Recomputation]:
    shapes = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
    settings = {"dtype": torch.bfloat16, "rope": None, "context_length": 512, "init_seed": 0, "device": "meta"}
    base = build_base(None, shapes | {"max_position_embeddings": 512} | SHAPES[name], fuse=True, **settings)
    model = training_model(base, LORA, fuse=True)
    return model, probe(model, 8192), recomputation(model)


@pytest.mark.parametrize(("name", "row"), rows())
def test_peak_memory(name: str, row: dict[str, Any]) -> None:
    """Within 3 %; `auto` leaves 5 % of the memory alone."""
    model, costs, _ = counted(name)
    config = model.causal_lm.config
    # Weights; and of what trains masters, both moments and a gradient.
    static = sum(p.numel() * (p.element_size() + 14 * p.requires_grad) for p in model.parameters())
    head = head_bytes(config.vocab_size, config.hidden_size, row["tokens"], fused=True)
    activations = required(costs, policy_named(row["policy"]), row["tokens"], head)
    assert (static + activations) / 2**30 == pytest.approx(row["peak GiB"], rel=0.03)


@pytest.mark.parametrize(("name", "row"), rows())
def test_seconds_a_step(name: str, row: dict[str, Any]) -> None:
    """Within a tenth."""
    model, costs, again = counted(name)
    plan = plan_segments([row["tokens"]], row["group_size"])
    seconds = step_seconds(model, plan, policy_named(row["policy"]), costs, again, H200)
    assert seconds == pytest.approx(row["seconds"], rel=0.1)


def policy_named(text: str) -> ActivationPolicy:
    """The policy that says so of itself."""
    policies = [
        ActivationPolicy(kept, attention, mlp_tile=tile)
        for kept in range(33)
        for attention in range(33 - kept)
        for tile in (None, MLP_TILE)
    ]
    return next(policy for policy in policies if str(policy) == text)
