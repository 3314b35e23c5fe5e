"""Perplexity of a causal language model under ordinary dense attention, at a given context length.

A window of `length` tokens starts from nothing: its i-th token predicts the next one from i + 1 tokens of context, so
that a window makes `length` predictions. Two figures come of it (LongLoRA, §4, uses a sliding window of stride 256):
- over the whole window, every prediction counts, also those at its start, which have little context;
- over the last 256 tokens, only predictions with (nearly) the full context count.
They differ much, and publications seldom say which they give; here both are given, with the tokens that each is over.

Windows are cut from one document at a time, by its length alone: which tokens are predicted never depends on the
model, so models are compared on the same targets.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from longlora.loss import summed_cross_entropy

LAST_TOKENS = 256
BATCH_TOKENS = 8192  # tokens that go through the model at once, if a window is not longer: keeps all cores busy


@dataclass(frozen=True)
class PerplexityResult:
    length: int
    perplexity: float
    """exp of the mean −log p over all predictions of all windows."""
    perplexity_last256: float
    """The same over the last 256 predictions of each window (all of them in shorter windows)."""
    tokens: int
    """Predictions that `perplexity` is over."""
    tokens_last256: int


def perplexity(
    model: PreTrainedModel,
    documents: Sequence[Tensor],
    length: int,
    stride: int | None = None,
    max_tokens: int | None = None,
    progress: Callable[[int], None] = lambda tokens: None,
) -> PerplexityResult:
    """Perplexity of `model`, a plain transformers causal LM with dense attention, at windows of `length` tokens.

    documents: integer tensors (tokens,). stride: distance between windows of a document; by default `length`, so that
    windows do not overlap and every token is predicted once; with 256, the last 256 predictions of the windows tile
    the document. max_tokens: the predictions that may be spent, in whole windows but at least one, taken evenly from
    all windows. progress is called with the number of tokens of each batch that is done.

    Raises ValueError if no document is long enough for a window.
    """
    chosen = windows(documents, length, stride or length, None if max_tokens is None else max(1, max_tokens // length))
    early = max(0, length - LAST_TOKENS)
    losses = target_losses(model, chosen, [(0, early), (early, length)], progress)
    tokens, tokens_last = len(chosen) * length, len(chosen) * (length - early)
    whole, last = float(losses.sum()), float(losses[:, 1].sum())
    return PerplexityResult(length, math.exp(whole / tokens), math.exp(last / tokens_last), tokens, tokens_last)


def windows(documents: Sequence[Tensor], length: int, stride: int, count: int | None = None) -> list[Tensor]:
    """Pieces of `length` + 1 tokens, `stride` apart, each inside one document: inputs, and the same moved on by one as
    targets.

    At most `count` of them, evenly spaced among all in document order, so that long documents give more and every part
    of a document has its share. What is left at the end of a document, shorter than a window, is not used.
    """
    if length < 1 or stride < 1:
        raise ValueError(f"window length is {length} and stride {stride}: both must be at least 1")
    places = [(n, start) for n, tokens in enumerate(documents) for start in range(0, len(tokens) - length, stride)]
    if not places:
        longest = max((len(tokens) for tokens in documents), default=0)
        raise ValueError(
            f"the longest of {len(documents)} documents has {longest} tokens: "
            f"a window of {length} needs one of at least {length + 1}"
        )
    wanted = min(count or len(places), len(places))
    chosen = [places[(2 * i + 1) * len(places) // (2 * wanted)] for i in range(wanted)]
    return [documents[n][start : start + length + 1] for n, start in chosen]


@torch.inference_mode()
def target_losses(
    model: PreTrainedModel,
    windows: Sequence[Tensor],
    ranges: Sequence[tuple[int, int]],
    progress: Callable[[int], None] = lambda tokens: None,
) -> Tensor:
    """Summed −log p, in nats, of the predictions in each range of each window: (windows, ranges), float64, on the CPU.

    windows: pieces of equal length, of T + 1 tokens; prediction i, of T, is that of token i + 1. Logits are made for
    the predictions in `ranges` only, a chunk at a time.
    """
    model.eval()
    device, head, length = model.device, model.get_output_embeddings(), len(windows[0]) - 1
    losses = []
    for first in range(0, len(windows), max(1, BATCH_TOKENS // length)):
        batch = torch.stack(list(windows[first : first + max(1, BATCH_TOKENS // length)])).long().to(device)
        hidden = model.get_decoder()(input_ids=batch[:, :-1], use_cache=False).last_hidden_state
        for states, targets in zip(hidden, batch[:, 1:], strict=True):
            losses.append(torch.stack([summed_cross_entropy(states[a:b], head, targets[a:b]) for a, b in ranges]))
        progress(len(batch) * length)
    return torch.stack(losses).double().cpu()
