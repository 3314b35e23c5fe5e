"""Documents into token ids."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers
from transformers import AutoTokenizer

from pipeline import tokens
from pipeline.config import Config, ConfigError, parse_config
from pipeline.documents import Document
from pipeline.tokens import Tokenizer, tokenise

WORDS = {"</s>": 0, "a": 1, "b": 2, "c": 3, "?": 4}


def words(eos: int | None = 0) -> Tokenizer:
    """One token a word: a b c, and ? for others."""
    backend = Backend(models.WordLevel(WORDS, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["</s>"])
    return Tokenizer(backend.to_str(), eos)


def config(tokenizer: str) -> Config:
    return parse_config(
        {
            "run": {"name": "t"},
            "model": {"architecture": {"model_type": "llama"}, "tokenizer": tokenizer},
            "context": {"length": 8},
            "attention": {"group_size": None},
            "data": {"train": ["x.txt"]},
            "optimization": {"steps": 30, "global_batch": 2},
        }
    )


@pytest.mark.parametrize(("eos", "expected"), [(0, [[1, 2, 0], [3, 0], [0]]), (None, [[1, 2], [3, 0], []])])
def test_the_end_of_text_token_is_appended_once(eos: int | None, expected: list[list[int]]) -> None:
    encoded = words(eos).encode(["a b", "c </s>", ""])
    assert [ids.tolist() for ids in encoded] == expected
    assert all(ids.dtype == np.int32 for ids in encoded)


def test_ids_are_those_of_the_models_tokenizer(tiny_base: Path) -> None:
    ours, theirs = Tokenizer.load(config(str(tiny_base))), AutoTokenizer.from_pretrained(tiny_base)
    texts = ["The cat sat.", "日本 \n\t x", "a </s> b", "long " * 500]  # its model_max_length of 256 does not cut
    begin, end = theirs.bos_token_id, theirs.eos_token_id
    for text, ids in zip(texts, ours.encode(texts), strict=True):
        assert ids.tolist() == [*theirs(text)["input_ids"], end]
        assert ids[0] == begin


def test_documents_keep_their_order_and_batches_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "BATCH_CHARACTERS", 10)
    held = most = 0

    def read() -> Iterator[Document]:
        nonlocal held, most
        for n in range(50):
            held += 1
            most = max(most, held)
            yield Document(str(n), "a b c")

    names = []
    for document, ids in tokenise(read(), words()):
        held -= 1
        names.append(document.id)
        assert ids.tolist() == [1, 2, 3, 0]
    assert names == [str(n) for n in range(50)]
    assert most == 2  # two documents of 5 characters make a batch of 10


def test_the_definition_neither_cuts_nor_pads(tmp_path: Path, tiny_base: Path) -> None:
    for file in tiny_base.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    definition = json.loads((tmp_path / "tokenizer.json").read_text())
    definition["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    cut, plain = Tokenizer.load(config(str(tmp_path))), Tokenizer.load(config(str(tiny_base)))
    assert cut.identity() == plain.identity()
    assert len(cut.encode(["abcdefgh"])[0]) == 10


@pytest.mark.parametrize("content", [None, b"{}", b"not json"])
def test_a_tokenizer_that_cannot_be_loaded_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"model.tokenizer = .* cannot be loaded") as error:
        Tokenizer.load(config(str(tmp_path)))
    assert "\n" not in str(error.value)
