"""The passkey test: can a model repeat a number that stands somewhere in a long text of no interest?

After LongLoRA, §4.3 (from Mohtashami & Jaggi 2023, arXiv 2305.16300): a task, filler sentences, the key, more filler,
and the question. Lengths are exact and in tokens, whatever the tokenizer; the key's depth is set, not drawn; the
answer is the digits that the model writes, so that neither a leading space nor text after them decides.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

TASK = "A pass key is hidden somewhere in a long text of no importance. Find it and keep it in mind.\n"
FILLER = "The river runs to the sea. The wind comes and goes. The road is long. We walk on and rest at night. "
KEY = "\nThe pass key is {key}. Remember it: {key} is the pass key.\n"
QUESTION = "\nWhat is the pass key? The pass key is"
ANSWER_TOKENS = 12  # room for 5 digits, one by one, and a space before each


@dataclass(frozen=True)
class PasskeyResult:
    length: int
    """Tokens of the prompt."""
    depth: float
    """Where the key stands: 0 at the start of the filler, 1 at its end."""
    correct: int
    trials: int


def passkey(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    trials: int = 10,
    seed: int = 0,
) -> list[PasskeyResult]:
    """How often `model`, a plain transformers causal LM with dense attention, finds the key in prompts of `length`
    tokens.

    Greedy decoding; a trial is right if the first number in the answer is the key, five digits drawn from `seed`, the
    same for every model. Raises ValueError if task, key and question leave no room for filler.
    """
    model.eval()
    results = []
    for depth in depths:
        keys = random.Random(f"{seed} {depth}").choices(range(10_000, 100_000), k=trials)
        correct = sum(_answer(model, tokenizer, passkey_prompt(tokenizer, length, depth, key)) == key for key in keys)
        results.append(PasskeyResult(length, depth, correct, trials))
    return results


def passkey_prompt(tokenizer: PreTrainedTokenizerBase, length: int, depth: float, key: int) -> list[int]:
    """Token ids of a prompt of exactly `length` tokens, the key's sentence at `depth` of the filler.

    Only filler is cut, so that task, key and question are whole.
    """
    start = tokenizer(TASK)["input_ids"]
    if start and start[-1] == tokenizer.eos_token_id:
        start = start[:-1]  # tokenizers that end each text
    key_ids, question, filler = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (KEY.format(key=key), QUESTION, FILLER)
    )
    room = length - len(start) - len(key_ids) - len(question)
    if room < 1:
        raise ValueError(f"a prompt of {length} tokens has no room for filler: {length - room + 1} is the least")
    before = round(depth * room)
    padding = filler * (room // len(filler) + 1)
    return [*start, *padding[:before], *key_ids, *padding[before:room], *question]


@torch.inference_mode()
def _answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: list[int]) -> int | None:
    inputs = torch.tensor([prompt], device=model.device)
    output = cast(Any, model).generate(
        inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=ANSWER_TOKENS, do_sample=False
    )
    answer = str(tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True))
    number = re.search(r"\d+", answer)
    return int(number.group()) if number else None
