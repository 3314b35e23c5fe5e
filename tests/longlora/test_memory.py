"""The arithmetic of activation memory, by hand."""

import pytest

from longlora.activations import ActivationPolicy
from longlora.memory import MLP_TILE, ActivationCosts, choose_policy, head_bytes, required

COSTS = ActivationCosts(layers=4, around=2, inputs=1, attention=1, everything=10, work=3, mlp=6)


@pytest.mark.parametrize(
    ("policy", "held", "peak"),
    [
        (ActivationPolicy(4), 2 + 40, 2 + 40 + 3),
        (ActivationPolicy(0), 2 + 4, 2 + 4 + 10 + 3),
        (ActivationPolicy(0, 2), 2 + 6, 2 + 6 + 10 + 3),
        (ActivationPolicy(2), 2 + 22, 2 + 22 + 3),  # once the kept layers are done: 2 + 2 + 10 + 3
        (ActivationPolicy(1), 2 + 13, 2 + 3 + 10 + 3),  # the recomputed layers' turn needs as much as the kept one's
        (ActivationPolicy(0, offload=True), 2, 2 + 0 + 10 + 3 + 2),
    ],
)
def test_what_is_held_and_the_peak(policy: ActivationPolicy, held: int, peak: int) -> None:
    assert COSTS.held(policy, 100) == 100 * held
    assert COSTS.peak(policy, 100) == 100 * peak


def test_pieces_of_the_mlp_count_for_one_piece() -> None:
    whole, pieces = (COSTS.peak(ActivationPolicy(0, mlp_tile=tile), 1000) for tile in (None, 250))
    assert whole - pieces == 1000 * 6 * 0.75
    assert COSTS.peak(ActivationPolicy(0, mlp_tile=2000), 1000) == whole


def test_the_loss_may_be_the_peak() -> None:
    assert required(COSTS, ActivationPolicy(4), 100, head=1000) == 4200 + 1000
    assert required(COSTS, ActivationPolicy(4), 100, head=10) == 4500


@pytest.mark.parametrize(
    ("free", "attention_work", "wanted"),
    [
        (10_000, 1, ActivationPolicy(4)),
        (4_499, 1, ActivationPolicy(3, 1)),
        (1_850, 1, ActivationPolicy(1)),
        (2_700, 1, ActivationPolicy(2)),
        (2_700, 9, ActivationPolicy(1, 3)),  # attention is dear: three outputs spare more than a layer
    ],
)
def test_the_policy_recomputes_least(free: int, attention_work: float, wanted: ActivationPolicy) -> None:
    chosen = choose_policy(COSTS, 100, free, 0, attention_work, 5)
    assert chosen == wanted
    assert required(COSTS, chosen, 100, 0) <= free


def least_of(tokens: int, mlp_tile: int | None) -> float:
    """Without host memory. One kept layer can take less than none: it waits for nothing to be made again."""
    return min(required(COSTS, ActivationPolicy(kept, mlp_tile=mlp_tile), tokens, 0) for kept in range(5))


def test_pieces_and_host_memory_come_only_where_it_does_not_fit_otherwise() -> None:
    tokens = 2 * MLP_TILE
    least = least_of(tokens, mlp_tile=None)
    whole = choose_policy(COSTS, tokens, least, 0, 1, 5)
    assert whole is not None and whole.mlp_tile is None and not whole.offload
    tiled = choose_policy(COSTS, tokens, least - 1, 0, 1, 5)
    assert tiled is not None and tiled.mlp_tile == MLP_TILE and not tiled.offload
    least = least_of(tokens, mlp_tile=MLP_TILE)
    offloaded = choose_policy(COSTS, tokens, least - 1, 0, 1, 5)
    assert offloaded is not None and offloaded.offload
    assert choose_policy(COSTS, tokens, least - 1, 0, 1, 5, may_offload=False) is None
    assert choose_policy(COSTS, tokens, 10, 0, 1, 5) is None


def test_the_logits_of_a_chunk() -> None:
    """With 32,000 tokens and 4,096 dimensions, as many logits as hidden states are those of an eighth of the row."""
    assert head_bytes(32000, 4096, 102400, fused=True) == 16384 * 32000 * 2 + 102400 * 4096 * 4
    assert head_bytes(32000, 4096, 100, fused=True) == 16 * 32000 * 2 + 100 * 4096 * 4
