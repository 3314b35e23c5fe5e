"""Rotary extension against values worked out by hand: theta 10⁴, 8 rotary dimensions: frequencies 1, .1, .01, .001."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, PreTrainedConfig

from longlora.rope import METHODS, extend_rope

NATIVE, TARGET = 64, 256
TINY = {"vocab_size": 32, "num_hidden_layers": 1, "intermediate_size": 16, "max_position_embeddings": NATIVE}
FAMILIES = {
    "llama": {"hidden_size": 16, "num_attention_heads": 2},
    "mistral": {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1},
    "qwen2": {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2},
    "qwen3": {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    "gpt_neox": {"hidden_size": 64, "num_attention_heads": 2},  # a quarter of 32 dimensions is rotated
}
BY_HAND = {
    "linear": [0.25, 0.025, 0.0025, 0.00025],
    # theta · 4^(8/6): frequency i is divided by 4^(i/3)
    "ntk": [1.0, 0.1 / 4 ** (1 / 3), 0.01 / 4 ** (2 / 3), 0.00025],
    # the same with 4 · 4 − (4 − 1) = 13
    "dynamic": [1.0, 0.1 / 13 ** (1 / 3), 0.01 / 13 ** (2 / 3), 0.001 / 13],
    # ramp from dimension 0 (32 turns in 64 tokens) to dimension 2 (one turn): 0, ½, 1, 1 of the interpolation
    "yarn": [1.0, 0.5 * 0.1 + 0.5 * 0.025, 0.0025, 0.00025],
    # wavelengths 6, 63, 628, 6283: below 64 / 4 kept, above 64 divided by 4, between (64 · .1 / 2π − 1) / 3 of it kept
    "llama3": [1.0, 0.025 + 0.075 * (64 * 0.1 / (2 * torch.pi) - 1) / 3, 0.0025, 0.00025],
}


def tiny_config(family: str = "llama", **settings: object) -> PreTrainedConfig:
    return AutoConfig.for_model(family, **TINY | FAMILIES[family] | settings)


def inverse_frequencies(config: PreTrainedConfig) -> torch.Tensor:
    """What the family's own rotary module computes from the config."""
    return AutoModelForCausalLM.from_config(config).base_model.rotary_emb.inv_freq


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_frequencies_are_those_worked_out_by_hand(family, method):
    extended = extend_rope(tiny_config(family), TARGET, method)
    assert extended.max_position_embeddings == TARGET
    torch.testing.assert_close(inverse_frequencies(extended), torch.tensor(BY_HAND[method]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_frequencies_survive_saving_and_loading(family, method, tmp_path):
    extended = extend_rope(tiny_config(family), TARGET, method)
    extended.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert loaded.max_position_embeddings == TARGET
    assert torch.equal(inverse_frequencies(loaded), inverse_frequencies(extended))


@pytest.mark.parametrize("method", METHODS)
def test_the_fastest_frequencies_keep_a_theta_that_is_not_the_default(method):
    config = tiny_config(rope_parameters={"rope_type": "default", "rope_theta": 500_000.0})
    extended = extend_rope(config, TARGET, method)
    theta = extended.rope_parameters["rope_theta"]
    assert theta > 500_000 if method in ("ntk", "dynamic") else theta == 500_000
    assert config.rope_parameters["rope_theta"] == 500_000 and config.max_position_embeddings == NATIVE


@pytest.mark.parametrize("family", FAMILIES)
def test_dynamic_is_what_transformers_arrives_at_for_the_target_length(family):
    scaled = tiny_config(family)
    scaled.rope_parameters = scaled.rope_parameters | {"rope_type": "dynamic", "factor": TARGET / NATIVE}
    rotary = AutoModelForCausalLM.from_config(scaled).base_model.rotary_emb
    rotary(torch.zeros(1), torch.arange(TARGET)[None])
    torch.testing.assert_close(
        inverse_frequencies(extend_rope(tiny_config(family), TARGET, "dynamic")), rotary.inv_freq, rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("method", METHODS)
def test_frequencies_do_not_depend_on_the_batch(method):
    rotary = AutoModelForCausalLM.from_config(extend_rope(tiny_config(), TARGET, method)).base_model.rotary_emb
    before = rotary.inv_freq.clone()
    rotary(torch.zeros(1), torch.arange(4 * TARGET)[None])
    assert torch.equal(rotary.inv_freq, before)


@pytest.mark.parametrize("method", ["linear", "ntk", "yarn", "llama3"])
def test_extending_twice_is_extending_once(method):
    once = extend_rope(tiny_config(), TARGET, method)
    twice = extend_rope(extend_rope(tiny_config(), 2 * NATIVE, method), TARGET, method)
    assert twice.max_position_embeddings == TARGET
    torch.testing.assert_close(inverse_frequencies(twice), inverse_frequencies(once), rtol=1e-6, atol=0)


def test_a_linear_model_is_extended_by_ntk_from_its_own_frequencies():
    linear = extend_rope(tiny_config(), 2 * NATIVE, "linear")
    extended = extend_rope(linear, 4 * NATIVE, "ntk")
    expected = inverse_frequencies(linear) / torch.tensor([2.0 ** (i / 3) for i in range(4)])
    torch.testing.assert_close(inverse_frequencies(extended), expected, rtol=1e-5, atol=0)


def test_a_dynamic_model_becomes_static_at_its_full_length():
    config = tiny_config(rope_parameters={"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0})
    extended = extend_rope(config, TARGET, "linear")
    assert extended.max_position_embeddings == TARGET and extended.rope_parameters["rope_type"] == "default"
    torch.testing.assert_close(inverse_frequencies(extended), torch.tensor(BY_HAND["dynamic"]), rtol=1e-5, atol=0)
    doubled = extend_rope(config, 2 * TARGET, "linear")
    torch.testing.assert_close(inverse_frequencies(doubled), inverse_frequencies(extended) / 2, rtol=1e-6, atol=0)


def test_llama_3_1_is_extended_from_its_scaled_length():
    llama_3_1 = {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = tiny_config(max_position_embeddings=131_072, rope_parameters=llama_3_1)
    extended = extend_rope(config, 262_144, "llama3")
    assert extended.rope_parameters == llama_3_1 | {"factor": 16.0}


@pytest.mark.parametrize("method", METHODS)
def test_the_native_length_changes_nothing(method):
    assert extend_rope(tiny_config(), NATIVE, method).to_dict() == tiny_config().to_dict()


@pytest.mark.parametrize(
    ("config", "target", "method", "reason"),
    [
        (tiny_config(), NATIVE - 1, "linear", "target length 63 is below the model's 64"),
        (tiny_config(), TARGET, "longrope", "'longrope' is unknown: choose one of linear, ntk"),
        (extend_rope(tiny_config(), 128, "linear"), TARGET, "yarn", "'yarn' cannot continue .* 'linear'; use 'linear'"),
        (extend_rope(tiny_config(), 128, "yarn"), TARGET, "ntk", "'ntk' cannot continue .* 'yarn'; use 'yarn'"),
        (GPT2Config(), 2048, "linear", "gpt2 has no single set of rotary position parameters"),
    ],
)
def test_refusals(config, target, method, reason):
    with pytest.raises(ValueError, match=reason):
        extend_rope(config, target, method)
