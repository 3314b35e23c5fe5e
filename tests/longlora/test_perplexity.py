import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from longlora import perplexity as module
from longlora.perplexity import perplexity, target_losses, windows


def tiny_model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.3,  # far from uniform predictions
    )
    return LlamaForCausalLM(config).eval()


def documents(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 64, (n,), generator=generator, dtype=torch.int32) for n in lengths]


def log_probability(model: LlamaForCausalLM, context: torch.Tensor, target: int) -> float:
    with torch.inference_mode():
        logits = model(input_ids=context.long()[None]).logits[0, -1].double()
    return float(logits.log_softmax(-1)[target])


def test_windows_stay_in_their_document_and_stop_before_its_short_end() -> None:
    first, second = torch.arange(10), torch.arange(100, 106)
    cut = windows([first, second], length=4, stride=4)
    # 0..8 holds two windows of 4 predictions, and token 9 is left; the second document holds one.
    assert [w.tolist() for w in cut] == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8], [100, 101, 102, 103, 104]]


def test_a_window_needs_one_token_more_than_its_length() -> None:
    assert len(windows([torch.arange(5)], 4, 4)) == 1
    with pytest.raises(ValueError, match=r"longest of 2 documents has 4 tokens: a window of 4 needs one of at least 5"):
        windows([torch.arange(4), torch.arange(2)], 4, 4)


def test_overlapping_windows_are_a_stride_apart() -> None:
    assert [w[0].item() for w in windows([torch.arange(10)], 4, 2)] == [0, 2, 4]


def test_chosen_windows_are_evenly_spaced() -> None:
    places = [w[0].item() for w in windows([torch.arange(11)], length=1, stride=1, count=5)]
    assert places == [1, 3, 5, 7, 9]
    assert len(windows([torch.arange(11)], 1, 1, count=99)) == 10


@pytest.mark.parametrize(("length", "stride"), [(0, 4), (4, 0)])
def test_windows_refuses_lengths_and_strides_below_one(length: int, stride: int) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        windows([torch.arange(10)], length, stride)


def test_perplexity_by_hand_one_prediction_at_a_time() -> None:
    model, texts = tiny_model(), documents(11, 3)
    # The first document has two windows of 5 predictions, the second is too short.
    total = sum(
        log_probability(model, texts[0][start : start + i + 1], int(texts[0][start + i + 1]))
        for start in (0, 5)
        for i in range(5)
    )
    result = perplexity(model, texts, length=5)
    assert (result.length, result.tokens, result.tokens_last256) == (5, 10, 10)
    assert result.perplexity == pytest.approx(math.exp(-total / 10), rel=1e-5)
    assert result.perplexity_last256 == result.perplexity  # no window is longer than 256


def test_last256_counts_the_last_predictions_of_each_window() -> None:
    model, texts = tiny_model(), documents(601)
    result = perplexity(model, texts, length=300)
    assert (result.tokens, result.tokens_last256) == (600, 512)
    losses = []
    for start in (0, 300):
        ids = texts[0][start : start + 301].long()
        with torch.inference_mode():
            logits = model(input_ids=ids[None, :-1]).logits[0].double()
        losses.append(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none"))
    assert result.perplexity == pytest.approx(torch.cat(losses).mean().exp().item(), rel=1e-5)
    assert result.perplexity_last256 == pytest.approx(
        torch.cat([x[-256:] for x in losses]).mean().exp().item(), rel=1e-5
    )


def test_a_stride_of_256_tiles_the_document_with_last_predictions() -> None:
    result = perplexity(tiny_model(), documents(300 + 3 * 256 + 1), length=300, stride=256)
    assert (result.tokens, result.tokens_last256) == (4 * 300, 4 * 256)


@pytest.mark.parametrize(("budget", "tokens"), [(None, 120), (60, 60), (59, 40), (1, 20)])
def test_budget_counts_whole_windows_and_at_least_one(budget: int | None, tokens: int) -> None:
    assert perplexity(tiny_model(), documents(121), length=20, max_tokens=budget).tokens == tokens


def test_the_same_targets_at_every_length_of_a_piece() -> None:
    pieces = windows(documents(2000, 900), length=256, stride=256, count=4)
    assert {length: perplexity(tiny_model(), pieces, length).tokens for length in (32, 64, 256)} == {
        32: 1024,
        64: 1024,
        256: 1024,
    }


def test_predictions_do_not_depend_on_later_tokens_nor_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_model(), documents(41)[0]
    changed = ids.clone()
    changed[21:] = (changed[21:] + 7) % 64
    ranges = [(0, 20), (20, 40)]
    both = target_losses(model, [ids, changed], ranges)
    assert both.shape == (2, 2)
    assert both[0, 0] == pytest.approx(both[1, 0].item(), rel=1e-6)
    assert both[0, 1] != pytest.approx(both[1, 1].item(), rel=1e-2)
    monkeypatch.setattr(module, "BATCH_TOKENS", 1)
    torch.testing.assert_close(target_losses(model, [ids, changed], ranges), both, rtol=1e-6, atol=0)


def test_logits_are_made_for_the_asked_predictions_only() -> None:
    model, rows = tiny_model(), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[0]))
    target_losses(model, documents(401, 401), [(300, 400)])
    assert rows == [100, 100]


def test_progress_adds_up_to_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []
    monkeypatch.setattr(module, "BATCH_TOKENS", 100)
    result = perplexity(tiny_model(), documents(201), length=40, progress=done.append)
    assert result.tokens == 200
    assert done == [80, 80, 40]  # two windows of 40 fit a batch
