"""Merging: the plain model computes what the adapter on its base computed, and keeps the extended positions."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from longlora.adapters import attach_adapter
from longlora.merge import merged_model
from longlora.model import build_base

NATIVE, TARGET, VOCABULARY = 32, 128, 31
TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
MODELS = {
    "llama": TINY | {"model_type": "llama", "num_key_value_heads": 2},
    "tied qwen3": TINY | {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 4, "tie_word_embeddings": True},
    "gpt_neox": TINY | {"model_type": "gpt_neox", "hidden_size": 32},
}


def built(name_or_path: str | None, config: dict | None, rope: str | None, length: int) -> PreTrainedModel:
    return build_base(
        name_or_path,
        config,
        dtype=torch.float32,
        rope=rope,
        context_length=length,
        init_seed=0,
        attention="sdpa",
    ).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model((torch.arange(TARGET) % VOCABULARY)[None]).logits


@pytest.fixture(params=MODELS)
def trained(request, tmp_path):
    """(base folder, adapter folder, logits of the trained model) as a run leaves them."""
    torch.manual_seed(0)  # LoRA's A matrices are drawn from it
    base_folder, adapter_folder = tmp_path / "base", tmp_path / "adapter"
    built(None, MODELS[request.param] | {"max_position_embeddings": NATIVE}, None, NATIVE).save_pretrained(base_folder)
    network = attach_adapter(
        built(str(base_folder), None, "linear", TARGET),
        rank=2,
        alpha=4,
        dropout=0.0,
        targets="auto",
        rslora=False,
        dora=False,
        train_embeddings=True,
        train_norms=True,
    ).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    network.save_pretrained(adapter_folder)
    network.get_base_model().config.save_pretrained(adapter_folder)
    return str(base_folder), adapter_folder, logits(network)


@pytest.mark.parametrize("given", ["folder", "extended model"])
def test_merged_logits_are_those_of_the_adapter(trained, given):
    base, adapter, wanted = trained
    merged = merged_model(base if given == "folder" else built(base, None, "linear", TARGET), adapter)
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-4, atol=1e-5)
    assert not any("lora" in name or "modules_to_save" in name for name, _ in merged.named_parameters())


def test_the_saved_model_needs_transformers_alone(trained, tmp_path):
    base, adapter, wanted = trained
    merged_model(base, adapter).save_pretrained(tmp_path / "export")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()
    assert plain.config.max_position_embeddings == TARGET
    assert plain.config.rope_parameters["rope_type"] == "linear" and plain.config.rope_parameters["factor"] == 4
    torch.testing.assert_close(logits(plain), wanted, rtol=1e-4, atol=1e-5)
    tied = plain.config.tie_word_embeddings
    assert (plain.get_output_embeddings().weight is plain.get_input_embeddings().weight) == tied
    weights = load_file(tmp_path / "export" / "model.safetensors").values()
    assert sum(weight.shape[0] == VOCABULARY for weight in weights) == (1 if tied else 2)
    assert "s2" not in (tmp_path / "export" / "config.json").read_text()


def test_a_base_that_is_not_extended_is_refused(trained):
    base, adapter, _ = trained
    with pytest.raises(ValueError, match="differ from those that the adapter was trained with"):
        merged_model(built(base, None, None, NATIVE), adapter)


def test_an_adapter_without_its_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json"):
        merged_model("base", tmp_path)
