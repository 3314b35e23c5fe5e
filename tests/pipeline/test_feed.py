"""Packs into micro-batches: targets, positions, hashes, read-ahead."""

import threading
from collections import Counter
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch

from pipeline.feed import NO_TARGET, Feed, collate
from pipeline.ledger import token_hash
from pipeline.order import positions_of_step, sequences_at
from pipeline.packs import Row, row_hash

SEED, COUNT = 3, 50
CHAIN, STEPS = (4, 3, 1, 2, 8), 9  # of 12 sequences: the fifth goes over the end of the epoch


class MemoryPacks:
    """The part of Packs that a feed uses: `count` rows of two documents each."""

    def __init__(self, count: int):
        self.count = count
        self.read: list[int] = []
        self.threads: set[str] = set()

    def row(self, sequence: int) -> Row:
        self.read.append(sequence)
        self.threads.add(threading.current_thread().name)
        lengths = (2, sequence % 5 + 1)
        return Row(np.arange(sum(lengths), dtype=np.int32) + 10 * sequence, lengths, ("a", "b"))

    def document_lengths(self, sequence: int) -> tuple[int, ...]:
        return (2, sequence % 5 + 1)


def cost(step: int, document_lengths: tuple[int, ...]) -> float:
    """Of rows of 3 to 7 tokens; another in every second step, as when a run ends with full attention."""
    return float(sum(length ** (1 + step % 2) for length in document_lengths))


def row(ids: list[int], *lengths: int, mask: list[int] | None = None) -> Row:
    target_mask = None if mask is None else np.array(mask, bool)
    return Row(np.array(ids, np.int32), lengths, tuple(map(str, lengths)), target_mask)


def test_a_micro_batch_by_hand() -> None:
    batch = collate([row([5, 6, 7, 8, 9], 3, 2), row([1, 2], 2)], [40, 41], [7, 8])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 1, 2]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1]]
    assert batch.targets.tolist() == [6, 7, NO_TARGET, 9, NO_TARGET, 2, NO_TARGET]
    assert (batch.document_lengths, batch.rows) == ((3, 2, 2), (5, 2))
    assert (batch.sequences, batch.positions, batch.target_tokens) == ((40, 41), (7, 8), 4)
    assert batch.input_ids.dtype == batch.position_ids.dtype == batch.targets.dtype == torch.int64


def test_a_mask_says_which_tokens_are_targets() -> None:
    masked = row([5, 6, 7, 8, 9], 3, 2, mask=[1, 0, 1, 1, 1])
    batch = collate([masked, row([1, 2, 3], 3)], [0, 1], [0, 1])
    # token 6 is masked; 5 and 8 are first in their documents, whatever the mask says
    assert batch.targets.tolist() == [NO_TARGET, 7, NO_TARGET, 9, NO_TARGET, 2, 3, NO_TARGET]
    assert batch.target_tokens == 4 == masked.target_tokens + 2


@pytest.mark.parametrize("seed", range(20))
def test_target_tokens_agree_with_the_packs(seed: int) -> None:
    draw = np.random.default_rng(seed)
    rows = []
    for _ in range(draw.integers(1, 5)):
        lengths = draw.integers(1, 6, size=draw.integers(1, 5))
        ids = draw.integers(0, 99, size=lengths.sum())
        rows.append(row(ids.tolist(), *lengths.tolist(), mask=draw.integers(0, 2, size=len(ids)).tolist()))
    batch = collate(rows, range(len(rows)), range(len(rows)))
    assert batch.target_tokens == sum(r.target_tokens for r in rows)
    assert batch.hashes() == [row_hash(r.input_ids, r.document_lengths) for r in rows]


def test_hashes_come_from_the_tensors() -> None:
    rows = [row([5, 6, 7, 8], 3, 1), row([1, 2], 1, 1)]
    batch = collate(rows, [0, 1], [0, 1])
    right = [row_hash(r.input_ids, r.document_lengths) for r in rows]
    assert batch.hashes() == right
    batch.input_ids[0, 5] += 1
    assert batch.hashes()[0] == right[0] and batch.hashes()[1] != right[1]
    batch.input_ids[0, 5] -= 1
    batch.position_ids[0, 3] = 3  # the second document joined to the first
    assert batch.hashes()[0] != right[0] and batch.hashes()[1] == right[1]


def trained(world_size: int, steps: range, batch: int, micro_batch: int) -> list[tuple[list[int], str]]:
    """What workers that start together feed in these steps: (sequences, token hash) of each, as the ledger has them."""
    packs = MemoryPacks(COUNT)
    feeds = [Feed(packs, SEED, batch, micro_batch, world_size, rank, cost) for rank in range(world_size)]
    result = []
    for step in steps:
        batches = [one for feed in feeds for one in feed.step(step)]
        assert all(1 <= len(one.rows) <= micro_batch for one in batches)
        told = sorted(row for one in batches for row in one.row_identities())
        assert [position for position, _, _ in told] == list(positions_of_step(step, batch))
        result.append(([sequence for _, sequence, _ in told], token_hash([value for _, _, value in told])))
    for feed in feeds:
        feed.close()
    return result


@cache
def expected(steps: range, batch: int) -> list[tuple[list[int], str]]:
    """The same from the order and the packs alone."""
    packs = MemoryPacks(COUNT)
    sequences = [sequences_at(positions_of_step(step, batch), SEED, COUNT) for step in steps]
    rows = [[packs.row(sequence) for sequence in step] for step in sequences]
    hashes = [[row_hash(row.input_ids, row.document_lengths) for row in step] for step in rows]
    return list(zip(sequences, map(token_hash, hashes), strict=True))


@pytest.mark.parametrize("world_size", range(1, 9))
@pytest.mark.parametrize("global_batch", [8, 12, 60])
@pytest.mark.parametrize("micro_batch", [1, 3])
def test_any_number_of_workers_feeds_the_same_step(world_size: int, global_batch: int, micro_batch: int) -> None:
    """Steps that end an epoch of 50 sequences inside them too, and one (60) that is longer than an epoch."""
    steps = range(50 * 12 // global_batch)  # 12 epochs
    fed = trained(world_size, steps, global_batch, micro_batch)
    assert fed == expected(steps, global_batch)
    assert Counter(s for sequences, _ in fed for s in sequences) == dict.fromkeys(range(COUNT), 12)


@pytest.mark.parametrize("micro_batch", [1, 3])
@pytest.mark.parametrize("cut", range(STEPS + 1))
def test_a_chain_of_world_sizes_feeds_what_one_run_would(cut: int, micro_batch: int) -> None:
    """4 → 3 → 1 → 2 → 8 workers; each starts anew, the first ones at this step, the others one step later each."""
    bounds = [0, *(min(cut + later, STEPS) for later in range(len(CHAIN) - 1)), STEPS]
    fed = [
        step
        for world_size, (begin, end) in zip(CHAIN, pairwise(bounds), strict=True)
        for step in trained(world_size, range(begin, end), 12, micro_batch)
    ]
    assert fed == expected(range(STEPS), 12)


def test_steps_that_are_redone_feed_the_same_again() -> None:
    """Killed after each step, and gone back to every step before it, with another number of workers."""
    whole = expected(range(STEPS), 12)
    for killed_after in range(1, STEPS):
        for begin in range(killed_after):
            assert trained(3, range(begin, killed_after), 12, 3) == whole[begin:killed_after]


def test_a_worker_without_a_share_gets_nothing() -> None:
    with Feed(MemoryPacks(10), 0, 2, 1, 3, 0, cost) as feed:
        assert feed.step(0) == []


def test_rows_go_where_there_is_least_work() -> None:
    """Of eight rows in a step two workers take four each, whose costs differ by less than halves in order would."""
    packs = MemoryPacks(50)
    for step in range(6):
        work = []
        for rank in range(2):
            with Feed(packs, SEED, 8, 1, 2, rank, cost) as feed:
                work.append([cost(step, batch.document_lengths) for batch in feed.step(step)])
        sequences = sequences_at(positions_of_step(step, 8), SEED, 50)
        in_order = [cost(step, packs.document_lengths(sequence)) for sequence in sequences]
        assert sorted(work[0] + work[1]) == sorted(in_order)
        assert list(map(len, work)) == [4, 4]
        assert abs(sum(work[0]) - sum(work[1])) <= max(in_order) - min(in_order)


def test_the_next_step_is_read_ahead_in_one_thread() -> None:
    packs = MemoryPacks(50)
    with Feed(packs, 0, 4, 2, 1, 0, cost) as feed:
        feed.step(5)
        feed.step(6)  # was read, or is being read, in the background; asks for step 7
    assert packs.read[:8] == sequences_at(range(20, 28), 0, 50)
    assert set(packs.read[8:]) <= set(sequences_at(range(28, 32), 0, 50))
    assert packs.threads == {"feed_0"}
    assert not any(thread.name.startswith("feed") for thread in threading.enumerate())


def test_any_step_may_be_asked_for() -> None:
    with Feed(MemoryPacks(50), 0, 4, 2, 1, 0, cost) as feed:
        for step in (3, 10, 3, 4, 0):
            assert [p for batch in feed.step(step) for p in batch.positions] == list(positions_of_step(step, 4))


def test_what_reading_raises_reaches_the_loop() -> None:
    packs = MemoryPacks(50)
    bad = sequences_at(positions_of_step(2, 4), 0, 50)[1]
    original = packs.row

    def fail(sequence: int) -> Row:
        if sequence == bad:
            raise OSError(f"sequence {sequence} cannot be read")
        return original(sequence)

    packs.row = fail
    with Feed(packs, 0, 4, 2, 1, 0, cost) as feed:
        feed.step(0)
        feed.step(1)  # reads step 2 ahead, which fails, but not here
        with pytest.raises(OSError, match=f"sequence {bad} cannot be read"):
            feed.step(2)
        feed.step(3)
    assert not any(thread.name.startswith("feed") for thread in threading.enumerate())


def test_a_batch_moves_to_a_device() -> None:
    batch = collate([row([5, 6, 7], 3)], [4], [9])
    moved = batch.to("meta")
    assert moved.input_ids.device.type == moved.position_ids.device.type == moved.targets.device.type == "meta"
    assert (moved.rows, moved.sequences, moved.target_tokens) == (batch.rows, batch.sequences, batch.target_tokens)
