"""What the ranks trained in a step, put together: every position of the step once, or the run ends."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.assignment import FinalError


@dataclass(frozen=True)
class Part:
    """What one rank trained in a step."""

    rows: list[tuple[int, int, int]]
    """(position, sequence, hash) of each row"""
    losses: list[tuple[int, float]]
    """(position of its first row, loss summed over its target tokens in nats) of each micro-batch"""
    tokens: int
    operations: float
    peak_bytes: int


@dataclass(frozen=True)
class Trained:
    """What all ranks trained in a step, in position order."""

    sequences: list[int]
    hashes: list[int]
    loss: float
    """Summed over all target tokens, nats."""
    tokens: int
    operations: float
    peak_bytes: int
    """Of the worker that had most."""


def combine(parts: Sequence[Part], positions: range) -> Trained:
    """The parts of all ranks as one. FinalError where the loss is not finite, or rows are not those of `positions`."""
    rows = sorted(row for part in parts for row in part.rows)
    counts = Counter(position for position, _, _ in rows)
    if counts != Counter(positions):
        missing, doubled = sorted(set(positions) - set(counts)), sorted(p for p, n in counts.items() if n > 1)
        raise FinalError(
            f"workers do not agree on who trains what: of positions {positions.start} to {positions.stop - 1} "
            f"{missing} are missing and {doubled} doubled; nothing was committed; all nodes need the same versions"
        )
    losses = sorted(loss for part in parts for loss in part.losses)
    trained = Trained(
        sequences=[sequence for _, sequence, _ in rows],
        hashes=[row_hash for _, _, row_hash in rows],
        loss=sum(loss for _, loss in losses),
        tokens=sum(part.tokens for part in parts),
        operations=sum(part.operations for part in parts),
        peak_bytes=max(part.peak_bytes for part in parts),
    )
    if not _is_finite(trained.loss):
        bad = next(part for part in parts if not _is_finite(sum(loss for _, loss in part.losses)))
        raise FinalError(
            f"the loss is {trained.loss} on sequences {[sequence for _, sequence, _ in bad.rows]}: nothing was "
            "committed; lower optimization.learning_rate, or look at these sequences"
        )
    return trained


def _is_finite(loss: float) -> bool:
    return abs(loss) < float("inf")
