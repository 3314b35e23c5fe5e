"""Documents into rows of the sequence length: integers in, integers out."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

POLICY = "cut-then-best-fit-decreasing/1"
"""Names the rule below in the packs' fingerprint: whoever changes what `pack` returns changes this name."""

WINDOW_TOKENS = 2**24
"""Documents are packed in windows that close at this many tokens (64 MB of ids), so that memory is bounded."""


@dataclass(frozen=True)
class Piece:
    """Tokens [start, start + length) of a document, given by its place in the list of lengths."""

    document: int
    start: int
    length: int


def pack(lengths: Sequence[int], row_length: int) -> list[list[Piece]]:
    """Rows of at most `row_length` tokens that hold every token of every document exactly once.

    A document longer than a row is cut into full rows; what is left of it, and every shorter document, is packed
    best-fit-decreasing: the longest first, each into the fullest row that still has room (the oldest of equals), else
    into a new one. Full rows come first, in document order. A row with room to spare stays short.

    Raises ValueError for a row length or a document length below 1.
    """
    if row_length < 1:
        raise ValueError(f"row_length is {row_length}: a row holds at least one token")
    rows: list[list[Piece]] = []
    tails: list[Piece] = []
    for document, length in enumerate(lengths):
        if length < 1:
            raise ValueError(f"document {document} has length {length}: it must have at least one token")
        whole = length - length % row_length
        rows += [[Piece(document, start, row_length)] for start in range(0, whole, row_length)]
        if whole < length:
            tails.append(Piece(document, whole, length - whole))
    return rows + _best_fit_decreasing(tails, row_length)


def _best_fit_decreasing(pieces: list[Piece], row_length: int) -> list[list[Piece]]:
    rows: list[list[Piece]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), ascending: the first with enough room is the best fit
    for piece in sorted(pieces, key=lambda p: (-p.length, p.document)):
        fit = bisect_left(room, (piece.length, -1))
        if fit == len(room):
            free, row = row_length, len(rows)
            rows.append([])
        else:
            free, row = room.pop(fit)
        rows[row].append(piece)
        if free > piece.length:
            insort(room, (free - piece.length, row))
    return rows
