"""What recomputing costs, exactly."""

import pytest
import torch

from longlora.activations import ActivationPolicy
from longlora.memory import ActivationCosts
from longlora.model import LongContextModel, build_base, training_model
from longlora.roofline import ATTENTION_SHARE, MATRIX_SHARE, PASSES, Rates, recomputation, step_seconds
from longlora.segments import plan_segments

LORA = {"rank": 4, "alpha": 8, "dropout": 0.0, "targets": "auto", "rslora": False, "dora": False}
LORA |= {"train_embeddings": True, "train_norms": True}
COSTS = ActivationCosts(layers=2, around=1, inputs=1, attention=1, everything=10, work=3, mlp=6)


def model_of(adapter: dict[str, object] | None = LORA) -> LongContextModel:
    config = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config |= {"intermediate_size": 96, "vocab_size": 128, "max_position_embeddings": 512}
    settings = {"dtype": torch.bfloat16, "rope": None, "context_length": 512, "init_seed": 0, "device": "meta"}
    return training_model(build_base(None, config, **settings), adapter)


def test_a_layer_is_made_again_without_its_last_product() -> None:
    """In pieces the last product of the MLP runs again too; an MLP that trains cannot run in pieces."""
    projections, mlp, down, lora = 4 * 64 * 64, 3 * 64 * 96, 64 * 96, 4 * 2 * 4 * 64
    again = recomputation(model_of())
    assert again.whole == 2 * (projections + mlp - down + lora)
    assert again.in_pieces == again.whole + 2 * down
    full = recomputation(model_of(adapter=None))
    assert full.in_pieces == full.whole


def test_seconds_are_the_sum_of_three_terms() -> None:
    model, plan = model_of(), plan_segments([512], 128)
    again = recomputation(model)
    products = step_seconds(model, plan, ActivationPolicy(2), COSTS, again, Rates(1e12, 1e30))
    traffic = step_seconds(model, plan, ActivationPolicy(2), COSTS, again, Rates(1e30, 1e12))
    both = step_seconds(model, plan, ActivationPolicy(2), COSTS, again, Rates(1e12, 1e12))
    assert both == pytest.approx(products + traffic)
    assert traffic == pytest.approx(PASSES * 10 * 512 * 2 / 1e12)
    recomputed = step_seconds(model, plan, ActivationPolicy(0), COSTS, again, Rates(1e12, 1e30))
    attended = 2 * 2 * 4 * 16 * (512 * 128 - 128**2 / 4) / 2
    more = (2 * 512 * again.whole / MATRIX_SHARE + 2 * attended / ATTENTION_SHARE) / 1e12
    assert recomputed - products == pytest.approx(more)
    kept = step_seconds(model, plan, ActivationPolicy(0, 2), COSTS, again, Rates(1e12, 1e30))
    assert recomputed - kept == pytest.approx(2 * attended / ATTENTION_SHARE / 1e12)
