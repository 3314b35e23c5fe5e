"""The whole model: what it computes, where it comes from, and which models are refused."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from longlora.activations import ActivationPolicy
from longlora.adapters import trainable_report
from longlora.model import LongContextModel, build_base, check_supported, check_vocabulary, training_model
from longlora.segments import plan_segments

VOCABULARY, NATIVE, TARGET = 31, 32, 64
TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": NATIVE,
    "initializer_range": 0.3,  # large enough for attention patterns to matter
}
GQA = {"num_key_value_heads": 2}
FAMILIES = {
    "llama": TINY | GQA,
    "mistral": TINY | GQA | {"sliding_window": None},
    "qwen2": TINY | GQA | {"tie_word_embeddings": True},
    "qwen3": TINY | GQA | {"head_dim": 8},
    "phi3": TINY | GQA | {"pad_token_id": 0},
    "gemma": TINY | GQA | {"head_dim": 8},
    "gpt_neox": TINY,
}
LORA = {
    "rank": 2,
    "alpha": 4,
    "dropout": 0.0,
    "targets": "auto",
    "rslora": False,
    "dora": False,
    "train_embeddings": True,
    "train_norms": True,
}
LENGTHS = [9, 1, 14]  # documents of the row


def base(family: str = "llama", **changes: object) -> PreTrainedModel:
    settings = {
        "dtype": torch.float32,
        "rope": "linear",
        "context_length": TARGET,
        "init_seed": 0,
    }
    return build_base(None, {"model_type": family} | FAMILIES[family], **settings | changes)


def row(lengths: list[int] = LENGTHS) -> tuple[Tensor, Tensor, Tensor]:
    """(input_ids, position_ids, targets) of documents that differ with their lengths."""
    documents = [torch.arange(n) * (n + 3) % VOCABULARY for n in lengths]
    targets = [torch.cat([document[1:], torch.tensor([-100])]) for document in documents]
    return torch.cat(documents)[None], torch.cat([torch.arange(n) for n in lengths])[None], torch.cat(targets)


def dense_loss(network: torch.nn.Module, lengths: list[int] = LENGTHS) -> Tensor:
    """Σ of the losses that transformers' own forward pass has, a document at a time."""
    input_ids, _, targets = row(lengths)
    losses = []
    for ids, wanted in zip(input_ids[0].split(lengths), targets.split(lengths), strict=True):
        plan = plan_segments([len(ids)], None)
        logits = network(input_ids=ids[None], use_cache=False, segment_plan=plan).logits[0]
        losses.append(F.cross_entropy(logits, wanted, reduction="sum") if len(ids) > 1 else logits.sum() * 0)
    return torch.stack(losses).sum()


def gradients(model: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def train_all_of(model: LongContextModel) -> LongContextModel:
    """The model with B matrices that are not zero, so that every gradient is not."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.05)
    return model.train()


@pytest.mark.parametrize("adapter", [LORA, None], ids=["lora", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_all_gradients_are_those_of_the_documents_alone(family, adapter):
    model = train_all_of(training_model(base(family), adapter))
    wanted = dense_loss(model.network)
    loss = model(*row(), plan_segments(LENGTHS, None))
    assert loss.dtype == torch.float32 and loss.shape == ()
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)
    ours, reference = gradients(model, loss), gradients(model, wanted)
    for name in ours:
        torch.testing.assert_close(ours[name], reference[name], rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_cut_long_documents_only(family):
    model = training_model(base(family), LORA).eval()
    full = model(*row(), plan_segments(LENGTHS, None))
    torch.testing.assert_close(model(*row(), plan_segments(LENGTHS, 14)), full, rtol=1e-6, atol=0)
    assert abs(model(*row(), plan_segments(LENGTHS, 4)) - full) > 1e-3


def test_positions_are_those_given():
    model = training_model(base(), LORA).eval()
    input_ids, positions, targets = row()
    plan = plan_segments(LENGTHS, None)
    loss = model(input_ids, positions, targets, plan)
    # rotary attention sees differences of positions alone: a shift changes nothing, a stretch does
    torch.testing.assert_close(model(input_ids, positions + 5, targets, plan), loss, rtol=1e-5, atol=0)
    assert abs(model(input_ids, positions * 2, targets, plan) - loss) > 1e-2


def test_a_documents_loss_does_not_depend_on_what_it_is_packed_with():
    model = training_model(base(), LORA).eval()
    alone = [model(*row([n]), plan_segments([n], 4)) for n in LENGTHS]
    torch.testing.assert_close(model(*row(), plan_segments(LENGTHS, 4)), sum(alone), rtol=1e-5, atol=0)


@pytest.mark.parametrize("adapter", [LORA, None], ids=["lora", "full"])
def test_a_loaded_model_recomputes_its_layers(tmp_path, adapter):
    """transformers loads models in eval mode, in which it keeps all activations whatever it was asked."""
    base(rope=None, context_length=NATIVE).save_pretrained(tmp_path)
    settings = {"dtype": torch.float32, "rope": "linear", "context_length": TARGET, "init_seed": 0}
    model = training_model(build_base(str(tmp_path), None, **settings), adapter)
    model.follow(ActivationPolicy(kept=0))
    layer = next(module for name, module in model.named_modules() if name.endswith("layers.0.mlp"))
    calls = []
    layer.register_forward_pre_hook(lambda *_: calls.append(1))  # before: recomputing ends with what it needs
    model(*row(), plan_segments(LENGTHS, 4)).backward()
    assert len(calls) == 2


def test_random_weights_are_those_of_the_seed():
    state = torch.random.get_rng_state()
    first, again, other = base(init_seed=1), base(init_seed=1), base(init_seed=2)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_a_folder_is_loaded_extended_and_saved_without_traces(tmp_path):
    base(rope=None, context_length=NATIVE).save_pretrained(tmp_path / "base")
    model = build_base(
        str(tmp_path / "base"),
        None,
        dtype=torch.bfloat16,
        rope="yarn",
        context_length=TARGET,
        init_seed=0,
    )
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.lm_head.weight, base(rope=None, context_length=NATIVE).lm_head.weight.bfloat16())
    model.save_pretrained(tmp_path / "extended")
    saved = json.loads((tmp_path / "extended" / "config.json").read_text())
    assert saved["max_position_embeddings"] == TARGET and saved["rope_parameters"]["rope_type"] == "yarn"
    assert "s2" not in json.dumps(saved)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "extended").config._attn_implementation == "sdpa"


# parameters of Llama-2-7B and 70B, and of what LongLoRA trains of them: r = 8 on q, k, v, o, embeddings, norms
LLAMA_2 = {"model_type": "llama", "vocab_size": 32_000, "max_position_embeddings": 4096}
LLAMA_2_7B = LLAMA_2 | {"hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32}
LLAMA_2_70B = LLAMA_2 | {
    "hidden_size": 8192,
    "intermediate_size": 28_672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}


@pytest.mark.parametrize(
    ("config", "length", "parameters", "by_group"),
    [
        (LLAMA_2_7B, 102_400, 6_738_415_616, (8_388_608, 131_072_000, 65 * 4096)),
        # a layer: A 4 · 8192 · 8, B (8192 + 1024 + 1024 + 8192) · 8
        (LLAMA_2_70B, 32_768, 68_976_648_192, (80 * 8 * (4 * 8192 + 18_432), 262_144_000, 161 * 8192)),
    ],
    ids=["7B", "70B"],
)
def test_large_models_build_on_the_meta_device(config, length, parameters, by_group):
    model = build_base(
        None,
        config,
        dtype=torch.bfloat16,
        rope="linear",
        context_length=length,
        init_seed=0,
        device="meta",
    )
    assert model.num_parameters() == parameters and model.config.max_position_embeddings == length
    report = trainable_report(training_model(model, LORA | {"rank": 8}))
    lora = report.by_group["lora_a"] + report.by_group["lora_b"]
    assert (lora, report.by_group["embeddings"], report.by_group["norms"]) == by_group


FAMILIES_OF_THE_HUB = ["llama", "mistral", "qwen2", "qwen3", "gpt_neox", "phi3", "gemma", "olmo2", "starcoder2"]


@pytest.mark.parametrize("family", [*FAMILIES_OF_THE_HUB, "mixtral", "qwen3_moe"])
def test_decoders_with_ordinary_attention_are_supported(family):
    check_supported(AutoConfig.for_model(family))


@pytest.mark.parametrize(
    ("family", "settings", "reason"),
    [
        ("t5", {}, "t5 is no decoder-only language model"),
        ("bert", {}, "bert has no rotary positions"),
        ("gpt2", {}, "gpt2 has no rotary positions"),
        ("mamba", {}, "mamba does not go through transformers' attention interface"),
        ("lfm2", {"layer_types": ["conv"] * 20 + ["full_attention"] * 12}, "12 times in 32 layers"),
        ("gpt_oss", {}, "does not handle s_aux"),
        ("gemma2", {}, "softcap"),
        ("deepseek_v3", {"num_hidden_layers": 2}, r"heads have \(192, 192, 128\) dimensions"),
        ("granite", {}, "granite scales or caps its logits"),
        ("llama", {"attention_dropout": 0.1}, "has no dropout, got 0.1"),
    ],
)
def test_what_cannot_be_trained_is_refused_with_the_reason(family, settings, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        check_supported(AutoConfig.for_model(family, **settings))
    assert "\n" not in str(caught.value)


def mistral(window: int | None, sliding_window: str | None) -> PreTrainedModel:
    config = FAMILIES["mistral"] | {"model_type": "mistral", "sliding_window": window}
    return build_base(
        None,
        config,
        dtype=torch.float32,
        rope="linear",
        context_length=TARGET,
        sliding_window=sliding_window,
        init_seed=0,
    )


def test_a_window_shorter_than_the_context_is_refused_unless_removed(tmp_path):
    with pytest.raises(ValueError, match="sliding window of 63 tokens is shorter than the context length 64"):
        mistral(TARGET - 1, "model")
    mistral(TARGET - 1, None).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["sliding_window"] is None
    assert mistral(TARGET, "model").config.sliding_window == TARGET


def test_a_scaled_model_that_kept_its_old_length_is_extended_from_the_length_that_is_given():
    """Published like this: 16 tokens stretched to 32 by a factor of 2, and `max_position_embeddings` still 16."""
    scaled = FAMILIES["llama"] | {"max_position_embeddings": NATIVE // 2}
    scaled |= {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}
    settings = {"dtype": torch.float32, "rope": "linear", "context_length": TARGET, "init_seed": 0}
    settings |= {"device": "meta"}
    model = build_base(None, {"model_type": "llama"} | scaled, native_length=NATIVE, **settings)
    assert model.config.max_position_embeddings == TARGET
    assert model.config.rope_parameters["factor"] == 2 * TARGET / NATIVE


def test_removing_the_window_makes_every_layer_attend_in_full():
    windowed = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    config = {"model_type": "qwen2"} | FAMILIES["qwen2"] | windowed
    options = {"dtype": torch.float32, "rope": None, "context_length": NATIVE, "init_seed": 0}
    model = build_base(None, config, **options, sliding_window=None)
    assert model.config.layer_types == ["full_attention"] * 2 and not model.config.use_sliding_window
    lengths = [NATIVE]
    loss = LongContextModel(model)(*row(lengths), plan_segments(lengths, None))
    unwindowed = base("qwen2", rope=None, context_length=NATIVE)
    torch.testing.assert_close(loss, dense_loss(unwindowed, lengths), rtol=1e-5, atol=0)


def test_the_tokenizer_must_fit_the_embeddings():
    config = base().config
    check_vocabulary(config, VOCABULARY - 3)
    with pytest.raises(ValueError, match="tokenizer has 32 tokens and the model 31"):
        check_vocabulary(config, VOCABULARY + 1)


def from_folder(folder: object) -> PreTrainedModel:
    options = {"dtype": torch.float32, "rope": None, "context_length": NATIVE, "init_seed": 0}
    return build_base(str(folder), None, **options)


def test_a_folder_that_lacks_weights_is_refused(tmp_path):
    model = base(rope=None, context_length=NATIVE)
    weights = model.state_dict()
    del weights["lm_head.weight"]
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match=r"lacks 1 weights, e\.g\. lm_head\.weight"):
        from_folder(tmp_path)


def test_pickled_weights_are_not_loaded(tmp_path):
    base().config.save_pretrained(tmp_path)
    torch.save(base().state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be loaded") as caught:
        from_folder(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name_or_path", "config", "changes", "reason"),
    [
        (None, None, {}, "exactly one of a model folder or name and a model config"),
        ("base", {"model_type": "llama"}, {}, "exactly one of"),
        ("/no/such/folder", None, {}, "'/no/such/folder' cannot be used"),
        (None, {"hidden_size": 8}, {}, "model_type is None"),
        (None, {"model_type": "lama"}, {}, "model_type is 'lama': give one that transformers knows"),
        (None, {"model_type": "llama"} | TINY | {"hidden_size": 33}, {}, "cannot be used: .*33"),
        (None, {"model_type": "llama"} | TINY, {"rope": None}, "context length 64 exceeds the model's 32"),
        (None, {"model_type": "llama"} | TINY, {"context_length": 16}, "target length 16 is below the model's 32"),
    ],
)
def test_bad_input_is_refused_in_one_line(name_or_path, config, changes, reason):
    settings = {
        "dtype": torch.float32,
        "rope": "linear",
        "context_length": TARGET,
        "init_seed": 0,
    }
    with pytest.raises(ValueError, match=reason) as caught:
        build_base(name_or_path, config, **settings | changes)
    assert "\n" not in str(caught.value)


def test_the_attention_backend_is_the_one_asked_for():
    model = training_model(base(), LORA, "sdpa")
    plan = plan_segments(LENGTHS, 4)
    assert model.backend_choice("cpu", plan).name == "sdpa"
    wanted = training_model(base(), LORA)
    wanted.load_state_dict(model.state_dict())
    assert torch.equal(model(*row(), plan), wanted(*row(), plan))
    with pytest.raises(ValueError, match="'varlen' cannot run here: needs a CUDA device, not cpu"):
        training_model(base(), LORA, "varlen")(*row(), plan)
    with pytest.raises(ValueError, match="'varlen' cannot run here"):
        training_model(base(), LORA, "varlen").backend_choice("cpu", plan)
