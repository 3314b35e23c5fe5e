"""Documents into token ids, with the model's own tokenizer."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer as Backend

from pipeline.config import Config, ConfigError, local_path
from pipeline.documents import Document

BATCH_CHARACTERS = 2**20
"""Documents are tokenised together up to this many characters: at most a few hundred MB inside the tokenizer."""


class Tokenizer:
    """A fast tokenizer as plain text: what is hashed into the packs' fingerprint is exactly what tokenises.

    `definition` is the content of a tokenizer.json; `eos` is appended to each document that does not end in it.
    """

    def __init__(self, definition: str, eos: int | None):
        self.definition = definition
        self.eos = eos
        self._backend = Backend.from_str(definition)

    @classmethod
    def load(cls, config: Config) -> "Tokenizer":
        """The tokenizer of the config: a folder or a name on the hub. ConfigError if there is none that is fast."""
        from transformers import AutoTokenizer

        source = config.model.tokenizer_source
        revision = config.model.revision if source == config.model.base else None
        try:
            tokenizer = AutoTokenizer.from_pretrained(local_path(source), revision=revision, trust_remote_code=False)
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"model.tokenizer = {source!r}: cannot be loaded ({reason})") from None
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ConfigError(f"model.tokenizer = {source!r}: has no fast tokenizer (tokenizer.json)")
        definition = json.loads(backend.to_str())
        definition |= {"truncation": None, "padding": None}  # documents are neither cut nor filled up
        return cls(json.dumps(definition, ensure_ascii=False, sort_keys=True), tokenizer.eos_token_id)

    def identity(self) -> dict[str, Any]:
        """What decides the token ids of a text."""
        return {"definition": self.definition, "eos": self.eos}

    def encode(self, texts: list[str]) -> list[npt.NDArray[np.int32]]:
        """Token ids of each text, special tokens as the tokenizer adds them, and the end-of-text token."""
        encoded = [np.array(e.ids, np.int32) for e in self._backend.encode_batch_fast(texts, add_special_tokens=True)]
        return [self._ended(ids) for ids in encoded]

    def _ended(self, ids: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        if self.eos is None or (len(ids) and ids[-1] == self.eos):
            return ids
        return np.append(ids, np.int32(self.eos))


def tokenise(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[tuple[Document, npt.NDArray[np.int32]]]:
    """Each readable document with its token ids, in order, a batch of about BATCH_CHARACTERS at a time."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield from zip(batch, tokenizer.encode([d.text for d in batch]), strict=True)
            batch, characters = [], 0
    yield from zip(batch, tokenizer.encode([d.text for d in batch]), strict=True)
