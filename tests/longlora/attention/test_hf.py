"""``"s2"`` in transformers' models: the same numbers as their own attention, and one clear line for what it is not."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from longlora.attention import hf
from longlora.segments import SegmentPlan, plan_segments

SIZES = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, num_key_value_heads=2),
    "llama with an odd kv head": LlamaConfig(**SIZES, num_key_value_heads=3),
    "mistral without window": MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=None),
    "mistral with a longer window": MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=32),
    "qwen2": Qwen2Config(**SIZES, num_key_value_heads=2),
    "qwen3": Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16),
    "gpt-neox": GPTNeoXConfig(**SIZES),
}
DOCUMENTS = [7, 20, 5]


@pytest.fixture(autouse=True)
def registered() -> None:
    hf.register()
    hf.register()  # once more changes nothing


def tiny(config: PreTrainedConfig, attention: str = "s2") -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def row(documents: list[int]) -> dict[str, torch.Tensor]:
    ids = torch.randint(64, (1, sum(documents)), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(length) for length in documents]).unsqueeze(0)
    return {"input_ids": ids, "position_ids": positions}


def logits(model: Any, plan: SegmentPlan, **keywords: Any) -> torch.Tensor:
    return model(**row(list(plan.document_lengths)), use_cache=False, segment_plan=plan, **keywords).logits


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", CONFIGS)
def test_full_attention_in_a_packed_row_equals_sdpa_on_each_document(name: str) -> None:
    packed, alone = tiny(CONFIGS[name]), tiny(CONFIGS[name], "sdpa")
    out = logits(packed, plan_segments(DOCUMENTS, None))
    ids = row(DOCUMENTS)["input_ids"].split(DOCUMENTS, dim=1)
    wanted = torch.cat([alone(input_ids=document, use_cache=False).logits for document in ids], dim=1)
    torch.testing.assert_close(out, wanted)
    weight = torch.randn_like(out)
    for result in (out, wanted):
        (result * weight).sum().backward()
    torch.testing.assert_close(gradients(packed), gradients(alone), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_groups_change_only_what_lies_beyond_them(name: str) -> None:
    model = tiny(CONFIGS[name]).eval()
    dense, sparse = (logits(model, plan_segments([20], group_size)) for group_size in (None, 8))
    torch.testing.assert_close(
        sparse[:, :4], dense[:, :4]
    )  # the first G/2 tokens lie in the first segment of all heads
    assert (sparse[:, 4:] - dense[:, 4:]).abs().amax(dim=-1).min() > 1e-4


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_passes_the_plan_on(use_reentrant: bool) -> None:
    plan = plan_segments(DOCUMENTS, 8)
    plain, checkpointed = tiny(CONFIGS["llama"]).train(), tiny(CONFIGS["llama"]).train()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    for model in (plain, checkpointed):
        logits(model, plan).square().sum().backward()
    torch.testing.assert_close(gradients(checkpointed), gradients(plain), rtol=0, atol=0)


def test_peft_passes_the_plan_on() -> None:
    plan = plan_segments(DOCUMENTS, 8)
    wanted = logits(tiny(CONFIGS["llama"]), plan)
    model = get_peft_model(tiny(CONFIGS["llama"]), LoraConfig(target_modules=["q_proj", "v_proj"]))
    out = logits(model, plan)
    torch.testing.assert_close(out, wanted, rtol=0, atol=0)  # B is zero at the start
    out.square().sum().backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())
    assert any("lora_B" in name and gradient.any() for name, gradient in gradients(model).items())


def test_attention_can_be_switched_to_dense_and_back() -> None:
    model, plan = tiny(CONFIGS["llama"]), plan_segments([20], 8)
    sparse = logits(model, plan)
    model.set_attn_implementation("sdpa")
    dense = model(**row([20]), use_cache=False).logits
    model.set_attn_implementation("s2")
    torch.testing.assert_close(logits(model, plan), sparse, rtol=0, atol=0)
    assert (dense - sparse).abs().max() > 1e-4


GEMMA2 = Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8, sliding_window=64)
GPT_OSS = GptOssConfig(**SIZES, num_key_value_heads=2, head_dim=8, sliding_window=64, num_local_experts=2)
WINDOWED = MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=19)


@pytest.mark.parametrize(
    ("config", "keywords", "line"),
    [
        (GEMMA2, {}, "attention 's2' does not handle softcap: this model needs another attention"),
        (GPT_OSS, {}, "attention 's2' does not handle s_aux: this model needs another attention"),
        (WINDOWED, {}, "got a sliding window of 19 tokens and a document of 20: remove the window"),
        (CONFIGS["llama"], {"colour": "red"}, "attention 's2' does not handle colour"),
        (CONFIGS["llama"], {"is_causal": False}, "attention 's2' is causal, got is_causal=False"),
        (CONFIGS["llama"], {"output_attentions": True}, "never forms attention weights"),
        (CONFIGS["llama"], {"segment_plan": None}, "attention 's2' needs segment_plan: pass plan_segments"),
        (CONFIGS["llama"], {"segment_plan": plan_segments([19], 8)}, "q has 20 tokens and the plan 19"),
    ],
)
def test_what_it_does_not_do_is_refused_in_one_line(config: Any, keywords: dict[str, Any], line: str) -> None:
    asked = {"segment_plan": plan_segments([20], 8)} | keywords
    with pytest.raises(ValueError) as error:
        tiny(config)(**row([20]), use_cache=False, **asked)
    assert line in str(error.value) and "\n" not in str(error.value)


def test_dropout_is_refused_in_training_only() -> None:
    model = tiny(LlamaConfig(**SIZES, attention_dropout=0.1))
    plan = plan_segments([20], 8)
    logits(model.eval(), plan)
    with pytest.raises(ValueError, match=r"has no dropout, got 0.1: set attention_dropout to 0"):
        logits(model.train(), plan)


def test_batches_and_caches_are_refused() -> None:
    model, plan = tiny(CONFIGS["llama"]), plan_segments([8], 8)
    q, k = torch.zeros(1, 6, 8, 8), torch.zeros(1, 2, 8, 8)
    attend = hf.segment_attention
    with pytest.raises(ValueError, match="not a batch of 2: fold the rows into one"):
        model(input_ids=torch.zeros(2, 8, dtype=torch.int64), use_cache=False, segment_plan=plan)
    with pytest.raises(ValueError, match="not a batch of 1 with an attention mask"):
        attend(model, q, k, k, torch.zeros(1, 1, 8, 8), segment_plan=plan)
    with pytest.raises(ValueError, match="got 1 queries for 8 keys"):
        attend(model, q[:, :, :1], k, k, None, segment_plan=plan)
