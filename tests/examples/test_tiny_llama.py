"""The tiny model's tokenizer gives back every text as it was."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

FOLDER = Path(__file__).parent.parent.parent / "examples" / "tiny-llama"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " two  spaces , and a comma .\r\n\n\t",
        "naïve e\u0301 ﬁ 日本語 🎉",
        "".join(map(chr, range(0xD800))),
        "a </s> b <s>",
    ],
    ids=["empty", "whitespace", "unicode", "every code point below the surrogates", "spelled special tokens"],
)
def test_round_trip(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id == 0
    assert not {tokenizer.bos_token_id, tokenizer.eos_token_id} & set(ids[1:])  # a text cannot spell them
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_size(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(tokenizer) == 2048
    assert tokenizer.model_max_length == 512
