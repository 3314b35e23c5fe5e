import re
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from longlora.passkey import FILLER, PasskeyResult, passkey, passkey_prompt


def byte_tokenizer(single: str = "<s> $A") -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: n for n, token in enumerate(["<s>", "</s>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


class Reader:
    """Stands in for a model: writes what `answer` makes of the prompt's text."""

    device = torch.device("cpu")

    def __init__(self, tokenizer: PreTrainedTokenizerFast, answer: Any) -> None:
        self.tokenizer, self.answer = tokenizer, answer
        self.lengths: list[int] = []

    def eval(self) -> None: ...

    def generate(self, inputs: torch.Tensor, max_new_tokens: int, **options: Any) -> torch.Tensor:
        assert options["do_sample"] is False
        self.lengths.append(inputs.shape[1])
        written = self.answer(self.tokenizer.decode(inputs[0], skip_special_tokens=True))
        ids = self.tokenizer(written, add_special_tokens=False)["input_ids"][:max_new_tokens]
        return torch.cat([inputs, torch.tensor([ids])], dim=1)


def find(text: str) -> str:
    return re.search(r"pass key is (\d+)", text).group(1)


@pytest.mark.parametrize("length", [300, 301, 1024])
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_prompt_has_the_exact_length_and_depth(length: int, depth: float) -> None:
    tokenizer = byte_tokenizer()
    ids = passkey_prompt(tokenizer, length, depth, key=12345)
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert len(ids) == length
    assert ids[0] == tokenizer.bos_token_id
    assert text.count("12345") == 2
    assert text.endswith("What is the pass key? The pass key is")
    head, tail = text.split("\nThe pass key is 12345. Remember it: 12345 is the pass key.\n")
    before = head[head.index("\n") + 1 :]
    after = tail[: tail.index("\nWhat")]
    assert (before + after)[: len(FILLER)] == FILLER[: len(before + after)]
    assert len(before) == round(depth * len(before + after))


def test_filler_goes_on_after_the_key_where_it_was_cut() -> None:
    text = byte_tokenizer().decode(passkey_prompt(byte_tokenizer(), 500, 0.3, key=11111), skip_special_tokens=True)
    without_key = text.replace("\nThe pass key is 11111. Remember it: 11111 is the pass key.\n", "")
    assert FILLER in without_key


def test_end_of_text_added_by_the_tokenizer_does_not_stand_inside_the_prompt() -> None:
    assert 1 not in passkey_prompt(byte_tokenizer("<s> $A </s>"), 400, 0.5, key=12345)


def test_too_short_a_prompt_is_refused() -> None:
    tokenizer = byte_tokenizer()
    with pytest.raises(ValueError, match=r"a prompt of 100 tokens has no room for filler: \d+ is the least") as error:
        passkey_prompt(tokenizer, 100, 0.5, key=12345)
    least = int(re.search(r"(\d+) is", str(error.value)).group(1))
    assert len(passkey_prompt(tokenizer, least, 0.5, key=12345)) == least


@pytest.mark.parametrize(
    ("answer", "correct"),
    [
        (lambda text: f" {find(text)}. And then", 3),
        (lambda text: find(text), 3),
        (lambda text: f" {find(text)}0", 0),
        (lambda text: f" {find(text)[:4]}", 0),
        (lambda text: " 7, no: " + find(text), 0),
        (lambda text: " unknown", 0),
    ],
)
def test_only_the_key_itself_is_right(answer: Any, correct: int) -> None:
    tokenizer = byte_tokenizer()
    model = Reader(tokenizer, answer)
    results = passkey(model, tokenizer, length=400, depths=[0.0, 1.0], trials=3)
    assert results == [PasskeyResult(400, 0.0, correct, 3), PasskeyResult(400, 1.0, correct, 3)]
    assert model.lengths == [400] * 6


def test_keys_differ_by_trial_depth_and_seed_and_repeat() -> None:
    tokenizer = byte_tokenizer()

    def keys(seed: int) -> list[str]:
        seen: list[str] = []
        model = Reader(tokenizer, lambda text: seen.append(find(text)) or "")
        passkey(model, tokenizer, 300, [0.0, 1.0], trials=3, seed=seed)
        return seen

    assert keys(0) == keys(0)
    assert len({*keys(0), *keys(1)}) == 12


def test_a_random_model_does_not_find_the_key() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    results = passkey(LlamaForCausalLM(config), byte_tokenizer(), length=300, depths=[0.5], trials=2)
    assert results == [PasskeyResult(300, 0.5, 0, 2)]
