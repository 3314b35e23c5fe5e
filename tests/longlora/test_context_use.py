import math
from collections.abc import Sequence

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from longlora.context_use import block_losses, context_use, paired_difference, t_quantile, target_blocks


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def documents(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 32, (n,), generator=generator, dtype=torch.int32) for n in lengths]


def test_blocks_are_disjoint_and_in_one_document_each() -> None:
    first, second = torch.arange(3000), torch.arange(10_000, 12_000)
    blocks = target_blocks([first, second], longest_context=1024, count=50)
    assert all(len(b) == 1025 and b[-1] - b[0] == 1024 for b in blocks)
    targets = torch.cat([b[-256:] for b in blocks])
    assert len(targets.unique()) == len(targets)
    # (3000 − 1025) // 256 + 1 and (2000 − 1025) // 256 + 1
    assert len(blocks) == 8 + 4


def test_fewer_blocks_are_spread_over_the_documents() -> None:
    first, second = torch.arange(5000), torch.arange(10_000, 15_000)
    blocks = target_blocks([first, second], longest_context=512, count=6)
    assert [int(b[0]) >= 10_000 for b in blocks] == [False] * 3 + [True] * 3


def test_block_loss_sees_the_stated_context_and_no_more(model: LlamaForCausalLM) -> None:
    block = documents(1025)[0]
    for context in (256, 700):
        ids = block[-context - 1 :].long()
        with torch.inference_mode():
            logits = model(input_ids=ids[None, :-1]).logits[0, -256:].double()
        by_hand = torch.nn.functional.cross_entropy(logits, ids[-256:]).item()
        assert block_losses(model, [block], context) == [pytest.approx(by_hand, rel=1e-5)]


def test_rows_are_paired_with_the_shortest_context(model: LlamaForCausalLM) -> None:
    blocks = target_blocks(documents(3000, 3000), longest_context=1024, count=8)
    rows = context_use(model, blocks, contexts=[1024, 256, 512])
    assert [row.context for row in rows] == [256, 512, 1024]
    assert (rows[0].difference, rows[0].interval95) == (0.0, (0.0, 0.0))
    short, long = block_losses(model, blocks, 256), block_losses(model, blocks, 1024)
    assert rows[2].loss == pytest.approx(sum(long) / 8)
    assert (rows[2].difference, rows[2].interval95) == paired_difference(long, short)
    assert rows[2].loss - rows[0].loss == pytest.approx(rows[2].difference)


def test_paired_difference_by_hand() -> None:
    # Differences 1, 2, 3, 4, 5: mean 3, variance 2.5, standard error √0.5, t(0.975, 4) = 2.7764.
    mean, (low, high) = paired_difference([2, 4, 6, 8, 10], [1, 2, 3, 4, 5])
    assert mean == 3
    assert (low, high) == pytest.approx((3 - 2.7764 * math.sqrt(0.5), 3 + 2.7764 * math.sqrt(0.5)), rel=1e-3)


def test_pairing_removes_what_the_blocks_share() -> None:
    hard_and_easy = [9.0, 1.0, 5.0, 7.0, 3.0]
    mean, (low, high) = paired_difference([x - 0.1 for x in hard_and_easy], hard_and_easy)
    assert mean == pytest.approx(-0.1)
    assert high - low < 1e-6


@pytest.mark.parametrize(
    ("degrees", "table", "tolerance"),
    [(3, 3.18245, 2e-3), (4, 2.77645, 4e-4), (10, 2.228139, 1e-5), (30, 2.042272, 1e-6), (199, 1.971957, 1e-6)],
)
def test_t_quantile_against_the_table(degrees: int, table: float, tolerance: float) -> None:
    assert t_quantile(0.975, degrees) == pytest.approx(table, rel=tolerance)


def test_refuses_too_few_blocks() -> None:
    with pytest.raises(ValueError, match="3 blocks of 256 tokens: an interval needs at least 4"):
        target_blocks(documents(1024 + 3 * 256), 1024, 200)


@pytest.mark.parametrize("contexts", [[255, 512], [256, 1025]])
def test_refuses_contexts_without_the_block_or_beyond_its_piece(
    model: LlamaForCausalLM, contexts: Sequence[int]
) -> None:
    with pytest.raises(ValueError, match="from 256 to 1024"):
        context_use(model, target_blocks(documents(4000), 1024, 8), contexts)
