"""Documents into rows: by hand, and as a property over random lengths."""

import random

import pytest

from pipeline.packing import Piece, pack


def test_a_long_document_is_cut_and_its_tail_packed_with_others() -> None:
    assert pack([10, 3], 4) == [
        [Piece(0, 0, 4)],
        [Piece(0, 4, 4)],
        [Piece(1, 0, 3)],  # longer than the tail of 2, so it comes first; 3 + 2 exceeds 4
        [Piece(0, 8, 2)],
    ]


def test_each_piece_goes_where_it_fits_best() -> None:
    rows = pack([6, 5, 3, 4, 2], 10)
    # 6 opens a row, 5 does not fit beside it, 4 fills the first row exactly, 3 and 2 fill the second
    assert rows == [[Piece(0, 0, 6), Piece(3, 0, 4)], [Piece(1, 0, 5), Piece(2, 0, 3), Piece(4, 0, 2)]]


def test_best_fit_prefers_the_fuller_row_and_then_the_older() -> None:
    assert pack([7, 6, 3], 10) == [[Piece(0, 0, 7), Piece(2, 0, 3)], [Piece(1, 0, 6)]]
    assert pack([7, 7, 3], 10) == [[Piece(0, 0, 7), Piece(2, 0, 3)], [Piece(1, 0, 7)]]


@pytest.mark.parametrize("exact", [4, 8])
def test_a_document_that_fills_its_rows_leaves_no_tail(exact: int) -> None:
    assert pack([exact], 4) == [[Piece(0, start, 4)] for start in range(0, exact, 4)]


def test_nothing_gives_no_row() -> None:
    assert pack([], 4) == []


@pytest.mark.parametrize("seed", range(30))
def test_every_token_is_packed_exactly_once(seed: int) -> None:
    draw = random.Random(seed)
    row_length = draw.choice([1, 2, 7, 64, 512])
    lengths = [draw.randint(1, draw.choice([3, row_length, 5 * row_length])) for _ in range(draw.randint(0, 200))]
    rows = pack(lengths, row_length)
    tokens = sorted((p.document, p.start + i) for row in rows for p in row for i in range(p.length))
    assert tokens == [(document, i) for document, length in enumerate(lengths) for i in range(length)]
    assert all(1 <= sum(piece.length for piece in row) <= row_length for row in rows)
    half_empty = [row for row in rows if 2 * sum(piece.length for piece in row) <= row_length]
    assert len(half_empty) <= 1  # two of them would have been one
    assert pack(lengths, row_length) == rows


def test_the_packing_is_pinned() -> None:
    """Packs of earlier runs must stay what they are: a change here needs a new POLICY."""
    rows = pack([5, 17, 9, 2, 8, 8, 1, 30, 4], 8)
    assert [[(p.document, p.start, p.length) for p in row] for row in rows] == [
        [(1, 0, 8)],
        [(1, 8, 8)],
        [(2, 0, 8)],
        [(4, 0, 8)],
        [(5, 0, 8)],
        [(7, 0, 8)],
        [(7, 8, 8)],
        [(7, 16, 8)],
        [(7, 24, 6), (3, 0, 2)],
        [(0, 0, 5), (1, 16, 1), (2, 8, 1), (6, 0, 1)],
        [(8, 0, 4)],
    ]


@pytest.mark.parametrize(("lengths", "row_length"), [([3, 0], 4), ([-1], 4), ([3], 0)])
def test_lengths_below_one_are_refused(lengths: list[int], row_length: int) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        pack(lengths, row_length)
