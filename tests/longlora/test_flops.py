"""Operations by formula against those that torch counts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from longlora.activations import ActivationPolicy
from longlora.flops import attention_operations, attention_pairs, step_operations
from longlora.model import LongContextModel, build_base, training_model
from longlora.segments import plan_segments

pytestmark = pytest.mark.skipif(
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu not in flop_registry,
    reason="this torch's FlopCounterMode does not count the CPU's attention operator (2.11)",
)
TOKENS, GROUP, LAYERS, HIDDEN, WIDTH = 512, 128, 4, 64, 96
LORA = {"rank": 4, "alpha": 8, "dropout": 0.0, "targets": "auto", "rslora": False, "dora": False}
LORA |= {"train_embeddings": True, "train_norms": True}


def model_of(adapter: dict[str, object] | None = LORA, **changes: object) -> LongContextModel:
    config = {"model_type": "llama", "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    config |= {"num_key_value_heads": 2, "intermediate_size": WIDTH, "vocab_size": 128, "max_position_embeddings": 512}
    settings = {"dtype": torch.float32, "rope": None, "context_length": 512, "init_seed": 0, "device": "meta"}
    return training_model(build_base(None, config | changes, **settings), adapter)


def counted(model: LongContextModel, policy: ActivationPolicy) -> int:
    """Operations of forward and backward without the loss, attention's pairs in full as torch counts them."""
    plan = plan_segments([TOKENS], GROUP).to("meta")
    ids = torch.zeros(1, TOKENS, dtype=torch.int64, device="meta")
    model.follow(policy)
    with FlopCounterMode(display=False) as counter:
        hidden = model.hidden_states(ids, torch.arange(TOKENS, device="meta")[None], plan)
        hidden.sum().backward()
    return counter.get_total_flops()


def whole(model: LongContextModel) -> float:
    """The formula for the same: attention's pairs twice, without the output layer."""
    plan, config = plan_segments([TOKENS], GROUP), model.causal_lm.config
    attention = attention_operations(config, plan) * 7 / 2 * LAYERS
    return step_operations(model, config, plan) + attention - 4 * 128 * HIDDEN * TOKENS


def test_pairs_of_a_document() -> None:
    assert attention_pairs(plan_segments([4096], 1024)) == (4096 * 1024 - 1024**2 / 4) / 2
    assert attention_pairs(plan_segments([40, 24], None)) == (40**2 + 24**2) / 2


def test_a_step_that_keeps_everything_costs_what_the_formula_says() -> None:
    model = model_of()
    assert counted(model, ActivationPolicy(LAYERS)) == whole(model)


def test_full_training_costs_six_operations_a_weight() -> None:
    model = model_of(adapter=None)
    head = 2 * 128 * HIDDEN * TOKENS  # `whole` takes a frozen output layer off; this one trains
    assert counted(model, ActivationPolicy(LAYERS)) + head == whole(model)


@pytest.mark.parametrize("policy", [ActivationPolicy(0), ActivationPolicy(1, 2), ActivationPolicy(0, 4)], ids=str)
def test_what_a_policy_computes_again(policy: ActivationPolicy) -> None:
    """A recomputed layer: its forward pass without down_proj (nothing is saved after it), attention unless kept."""
    model = model_of()
    plan, config = plan_segments([TOKENS], GROUP), model.causal_lm.config
    layer = model.causal_lm.get_decoder().layers[0]
    matrices = sum(p.numel() for name, p in layer.named_parameters() if p.ndim == 2 and "down_proj" not in name)
    recomputed = LAYERS - policy.kept
    again = recomputed * 2 * matrices * TOKENS
    again += (recomputed - policy.kept_attention) * 2 * attention_operations(config, plan)
    assert counted(model, policy) - whole(model) == again


def test_tied_embeddings_that_train_are_counted_as_a_trained_output_layer() -> None:
    frozen, trained = (
        model_of({**LORA, "train_embeddings": trains}, tie_word_embeddings=True) for trains in (False, True)
    )
    plan, config = plan_segments([TOKENS], GROUP), frozen.causal_lm.config
    difference = step_operations(trained, config, plan) - step_operations(frozen, config, plan)
    assert difference == 2 * config.vocab_size * HIDDEN * TOKENS
