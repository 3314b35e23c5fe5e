"""Adapters: what trains, what it is called, and that PEFT reads back what was trained."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from longlora.adapters import (
    adapter_keys,
    attach_adapter,
    attention_projections,
    enable_full_training,
    norm_names,
    parameter_groups,
    peft_key,
    trainable_report,
)

VOCABULARY, WIDTH, RANK = 31, 16, 2
TINY = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
FAMILIES = {
    "llama": TINY | HEADS,
    "qwen2": TINY | HEADS | {"tie_word_embeddings": True},
    "qwen3": TINY | HEADS | {"head_dim": 4, "tie_word_embeddings": True},
    "mistral": TINY | HEADS,
    "phi3": TINY | HEADS | {"pad_token_id": 0},
    "gpt_neox": TINY | {"num_attention_heads": 4},
}
QKVO = ["k_proj", "o_proj", "q_proj", "v_proj"]


def tiny_model(family: str, **settings: object) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family] | settings)).eval()


def adapted(model: PreTrainedModel, **changes: object) -> PeftModel:
    settings = {
        "rank": RANK,
        "alpha": 4,
        "dropout": 0.0,
        "targets": "auto",
        "rslora": False,
        "dora": False,
        "train_embeddings": True,
        "train_norms": True,
    }
    return attach_adapter(model, **settings | changes).eval()


def trained(model: PeftModel) -> dict[str, torch.Tensor]:
    """The trainable parameters after a change that each of them shows."""
    generator = torch.Generator().manual_seed(1)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in named.values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return named


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(9)[None]).logits


@pytest.mark.parametrize(
    ("family", "projections"),
    [(f, QKVO) for f in ("llama", "qwen2", "qwen3", "mistral")]
    + [("phi3", ["o_proj", "qkv_proj"]), ("gpt_neox", ["dense", "query_key_value"])],
)
def test_attention_projections_are_found(family, projections):
    assert attention_projections(tiny_model(family)) == projections


def test_every_norm_is_found_by_its_full_name():
    layers = ["input_layernorm", "post_attention_layernorm"]
    assert norm_names(tiny_model("llama")) == [
        *(f"model.layers.{i}.{norm}" for i in range(2) for norm in layers),
        "model.norm",
    ]
    assert "model.layers.1.self_attn.q_norm" in norm_names(tiny_model("qwen3"))


def test_counts_by_hand():
    report = trainable_report(adapted(tiny_model("llama")))
    # a layer: q and o are 16 → 16, k and v 16 → 8; five norms of 16 in all
    a, b = 2 * 4 * WIDTH * RANK, 2 * (16 + 16 + 8 + 8) * RANK
    assert report.by_group == {"lora_a": a, "lora_b": b, "embeddings": VOCABULARY * WIDTH, "norms": 5 * WIDTH}
    assert report.trainable == a + b + VOCABULARY * WIDTH + 5 * WIDTH
    base = sum(p.numel() for p in tiny_model("llama").parameters())
    assert report.total == base + report.trainable
    assert str(report).startswith(f"{report.trainable:,} of {report.total:,} parameters train")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dora", [False, True])
def test_groups_hold_every_trainable_parameter_once(family, dora):
    model = adapted(tiny_model(family), dora=dora)
    groups = parameter_groups(model)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    members = [member for group in groups.values() for member in group]
    assert len(members) == len(named) and all(named[name] is p for name, p in members)
    assert all("lora_A" in name for name, _ in groups["lora_a"])
    assert all("lora_B" in name for name, _ in groups["lora_b"])
    assert all("norm" in name for name, _ in groups["norms"])
    assert len(groups["embeddings"]) == 1
    assert ("weights" in groups) == dora


@pytest.mark.parametrize("family", FAMILIES)
def test_full_training_trains_everything(family):
    model = enable_full_training(tiny_model(family))
    groups = parameter_groups(model)
    assert set(groups) == {"embeddings", "norms", "weights"}
    assert trainable_report(model).trainable == trainable_report(model).total == model.num_parameters()
    tied = model.config.tie_word_embeddings
    assert any("lm_head" in name for name, _ in groups["weights"]) == (not tied)


@pytest.mark.parametrize("settings", [{}, {"rslora": True}, {"dora": True}, {"train_norms": False}])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_by_name_is_what_peft_saves_and_loads(family, settings, tmp_path):
    model = adapted(tiny_model(family), **settings)
    named = trained(model)
    model.save_pretrained(tmp_path)
    by_peft = load_file(tmp_path / "adapter_model.safetensors")
    ours = {key: named[name] for key, name in adapter_keys(named, model).items()}
    assert set(ours) == set(by_peft)
    assert all(torch.equal(ours[key], by_peft[key]) for key in ours)
    save_file({key: value.detach().clone() for key, value in ours.items()}, tmp_path / "adapter_model.safetensors")
    loaded = PeftModel.from_pretrained(tiny_model(family), tmp_path).eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)
    assert not torch.allclose(logits(loaded), logits(tiny_model(family)))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_tied_embeddings_stay_one_weight_that_trains(family):
    base = adapted(tiny_model(family, tie_word_embeddings=True)).get_base_model()
    assert base.get_output_embeddings().weight is base.get_input_embeddings().weight
    assert base.get_input_embeddings().weight.requires_grad


def test_tied_embeddings_that_peft_takes_apart_are_refused():
    with pytest.raises(ValueError, match="tied embeddings of gpt_neox apart: set train_embeddings to false"):
        adapted(tiny_model("gpt_neox", tie_word_embeddings=True))
    adapted(tiny_model("gpt_neox", tie_word_embeddings=True), train_embeddings=False)


def test_only_lora_trains_without_embeddings_and_norms():
    groups = parameter_groups(adapted(tiny_model("qwen2"), train_embeddings=False, train_norms=False))
    assert set(groups) == {"lora_a", "lora_b"}


def test_settings_reach_peft():
    model = adapted(tiny_model("llama"), targets=["q_proj", "down_proj"], rslora=True, dropout=0.25)
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_rslora) == (RANK, 4, 0.25, True)
    layers = {name.split(".lora_A")[0].rpartition(".")[2] for name, _ in parameter_groups(model)["lora_a"]}
    assert layers == {"q_proj", "down_proj"}


def test_new_weights_have_the_type_of_the_base():
    model = adapted(tiny_model("llama").to(torch.bfloat16))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_an_unknown_target_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'query' names no linear layer; this model has .*q_proj"):
        adapted(tiny_model("llama"), targets=["q_proj", "query"])


def test_frozen_weights_have_no_peft_key():
    with pytest.raises(ValueError, match="is no adapter parameter"):
        peft_key("base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight")
