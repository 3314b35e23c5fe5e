"""Packs into this worker's micro-batches, read ahead in the background."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch

from pipeline.order import even_shares, micro_steps, positions_of_step, sequences_at
from pipeline.packs import Packs, Row, row_hash

NO_TARGET = -100

Cost = Callable[[int, Sequence[int]], float]
"""Work of a row in a step, in any unit: (step, tokens of each document) → cost; the same on every worker."""


@dataclass(frozen=True)
class MicroBatch:
    """Some sequences, folded into one row of T tokens whose positions restart at each document."""

    input_ids: torch.Tensor
    """(1, T) int64"""
    position_ids: torch.Tensor
    """(1, T) int64, from 0 in each document"""
    targets: torch.Tensor
    """(T,) int64: the next token of the same document; NO_TARGET at its last token and where the mask says so"""
    document_lengths: tuple[int, ...]
    """Tokens of each document; they add up to T."""
    rows: tuple[int, ...]
    """Tokens of each sequence; they add up to T."""
    sequences: tuple[int, ...]
    """Index of each sequence in the packs."""
    positions: tuple[int, ...]
    """Position of each sequence in the order of the run."""
    target_tokens: int
    """Targets that are not NO_TARGET."""

    def hashes(self) -> list[int]:
        """`row_hash` of each sequence, from the tensors themselves: corrupted ones differ from the packs."""
        tokens = self.input_ids[0].cpu().numpy()
        starts = np.flatnonzero(self.position_ids[0].cpu().numpy() == 0)
        hashes, first = [], 0
        for length in self.rows:
            inside = starts[(starts >= first) & (starts < first + length)]
            lengths = np.diff(np.append(inside, first + length)).tolist()
            hashes.append(row_hash(tokens[first : first + length], lengths))
            first += length
        return hashes

    def row_identities(self) -> list[tuple[int, int, int]]:
        """(position, sequence, hash) of each of its rows."""
        return list(zip(self.positions, self.sequences, self.hashes(), strict=True))

    def to(self, device: torch.device | str) -> "MicroBatch":
        """The same batch with its tensors on `device`."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            position_ids=self.position_ids.to(device),
            targets=self.targets.to(device),
        )


def collate(rows: Sequence[Row], sequences: Sequence[int], positions: Sequence[int]) -> MicroBatch:
    """Folds rows into one MicroBatch. `sequences` and `positions` name them, in the same order."""
    tokens = np.concatenate([row.input_ids for row in rows]).astype(np.int64)
    lengths = tuple(length for row in rows for length in row.document_lengths)
    ends = np.cumsum(lengths)
    targets = np.append(tokens[1:], NO_TARGET)
    masks = [np.ones(len(row.input_ids), bool) if row.target_mask is None else row.target_mask for row in rows]
    targets[~np.append(np.concatenate(masks)[1:], False)] = NO_TARGET
    targets[ends - 1] = NO_TARGET
    return MicroBatch(
        input_ids=torch.from_numpy(tokens)[None],
        position_ids=torch.from_numpy(np.concatenate([np.arange(length) for length in lengths]))[None],
        targets=torch.from_numpy(targets),
        document_lengths=lengths,
        rows=tuple(len(row.input_ids) for row in rows),
        sequences=tuple(sequences),
        positions=tuple(positions),
        target_tokens=int((targets != NO_TARGET).sum()),
    )


class Feed:
    """The micro-batches of one worker. The packs are read by one background thread, which stays a step ahead."""

    def __init__(
        self, packs: Packs, seed: int, global_batch: int, micro_batch: int, world_size: int, rank: int, cost: Cost
    ):
        self._packs = packs
        self._seed = seed
        self._global_batch, self._micro_batch = global_batch, micro_batch
        self._world_size, self._rank = world_size, rank
        self._cost = cost
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="feed")
        self._ahead: dict[int, Future[list[MicroBatch]]] = {}

    def step(self, step: int) -> list[MicroBatch]:
        """This worker's micro-batches of a step (none for a worker without a share); raises what reading raised.

        Any step may be asked for; the one after it is then read in the background.
        """
        wanted = self._ahead.pop(step, None) or self._thread.submit(self._read, step)
        for future in self._ahead.values():
            future.cancel()
        self._ahead = {step + 1: self._thread.submit(self._read, step + 1)}
        return wanted.result()

    def close(self) -> None:
        """Ends the background thread."""
        self._thread.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, step: int) -> list[MicroBatch]:
        positions = positions_of_step(step, self._global_batch)
        sequences = sequences_at(positions, self._seed, self._packs.count)
        return [
            collate(
                [self._packs.row(sequences[offset]) for offset in offsets],
                [sequences[offset] for offset in offsets],
                [positions[offset] for offset in offsets],
            )
            for offsets in micro_steps(self._share(step, sequences), self._micro_batch)
        ]

    def _share(self, step: int, sequences: Sequence[int]) -> Sequence[int]:
        """Offsets inside the step that this worker takes."""
        if self._world_size == 1:
            return range(len(sequences))
        costs = [self._cost(step, self._packs.document_lengths(sequence)) for sequence in sequences]
        return even_shares(costs, self._world_size)[self._rank]
