"""The order of the data: the same sequences a step, whatever the number of workers."""

from itertools import pairwise

import numpy as np
import pytest

from pipeline.order import even_shares, micro_steps, permutation, positions_of_step, sequences_at, share


@pytest.mark.parametrize("world_size", range(1, 9))
@pytest.mark.parametrize("global_batch", [1, 3, 8, 12, 60])
def test_shares_are_contiguous_and_even(global_batch: int, world_size: int) -> None:
    shares = [share(global_batch, world_size, rank) for rank in range(world_size)]
    assert [offset for part in shares for offset in part] == list(range(global_batch))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_shares_by_hand() -> None:
    assert [share(8, 3, rank) for rank in range(3)] == [range(0, 2), range(2, 5), range(5, 8)]
    assert [len(share(2, 3, rank)) for rank in range(3)] == [0, 1, 1]  # a worker without a share


def test_even_shares_by_hand() -> None:
    assert even_shares([5, 4, 3, 2], 2) == [[0, 3], [1, 2]]
    assert even_shares([2, 3, 4, 5], 2) == [[3, 0], [2, 1]]  # the most expensive first
    assert even_shares([1, 1, 1, 1, 1], 2) == [[0, 2], [1, 3, 4]]  # as many as in share(5, 2, rank)
    assert even_shares([2, 9], 3) == [[], [1], [0]]


@pytest.mark.parametrize("world_size", range(1, 9))
@pytest.mark.parametrize("global_batch", [1, 3, 8, 12, 60])
def test_even_shares_have_every_row_once_and_as_many_as_shares_in_order(global_batch: int, world_size: int) -> None:
    costs = np.random.default_rng(global_batch).uniform(1, 2, global_batch).tolist()
    shares = even_shares(costs, world_size)
    assert sorted(offset for offsets in shares for offset in offsets) == list(range(global_batch))
    assert [len(offsets) for offsets in shares] == [len(share(global_batch, world_size, r)) for r in range(world_size)]
    assert all(costs[a] >= costs[b] for offsets in shares for a, b in pairwise(offsets))


def test_micro_steps_by_hand() -> None:
    assert micro_steps(range(5, 10), 2) == [range(5, 7), range(7, 9), range(9, 10)]
    assert micro_steps([0, 2, 7], 2) == [[0, 2], [7]]
    assert micro_steps(range(3, 3), 2) == []


def test_steps_follow_one_another_without_gap() -> None:
    steps = [positions_of_step(step, 12) for step in range(20)]
    assert steps[0].start == 0
    assert all(a.stop == b.start and len(b) == 12 for a, b in pairwise(steps))


@pytest.mark.parametrize("count", [1, 2, 10, 1000])
def test_an_epoch_visits_every_sequence_once(count: int) -> None:
    for epoch in range(3):
        assert sorted(permutation(3, epoch, count).tolist()) == list(range(count))
    visited = sequences_at(range(3 * count), 3, count)
    assert visited == [int(q) for epoch in range(3) for q in permutation(3, epoch, count)]


def test_epochs_and_seeds_have_different_orders() -> None:
    orders = {tuple(permutation(seed, epoch, 50)) for seed in range(20) for epoch in range(20)}
    assert len(orders) == 400


def test_the_order_is_well_mixed() -> None:
    """Each place is taken by each sequence about equally often: a table of permutations has 9·9 degrees of freedom."""
    places = np.zeros((10, 10))
    for seed in range(2000):
        places[np.arange(10), permutation(seed, seed % 5, 10)] += 1
    chi_squared = 0.9 * ((places - 200) ** 2 / 200).sum()
    assert 81 - 4 * np.sqrt(162) < chi_squared < 81 + 4 * np.sqrt(162)


def test_the_order_is_pinned() -> None:
    """Interrupted runs must go on in the order they began in: these never change."""
    assert permutation(0, 0, 10).tolist() == [2, 4, 6, 8, 5, 1, 7, 0, 9, 3]
    assert permutation(0, 1, 10).tolist() == [7, 4, 8, 1, 2, 6, 5, 0, 9, 3]
    assert permutation(1, 0, 10).tolist() == [8, 1, 6, 9, 0, 2, 7, 5, 3, 4]
    assert sequences_at(range(8, 13), 0, 10) == [9, 3, 7, 4, 8]


def test_the_mixer_is_splitmix64() -> None:
    """First outputs of the published generator (Vigna's splitmix64.c) with state 0."""
    from pipeline.order import _GOLDEN, _mix

    state = np.arange(1, 4, dtype=np.uint64) * np.uint64(_GOLDEN)
    assert [hex(int(x)) for x in _mix(state)] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4", "0x6c45d188009454f"]


def test_a_permutation_cannot_be_changed_by_its_reader() -> None:
    with pytest.raises(ValueError, match="read-only"):
        permutation(0, 0, 10)[0] = 5
