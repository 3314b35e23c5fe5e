"""Rows of several documents, as the GPU benchmarks make them."""

import torch

from benchmarks.figures import documents_of
from benchmarks.step import packed
from longlora.segments import plan_segments


def test_documents_fill_a_row() -> None:
    assert documents_of(20, None) == [20]
    assert documents_of(20, 8) == [8, 8, 4]
    assert documents_of(16, 8) == [8, 8]
    assert documents_of(5, 8) == [5]


def test_positions_and_targets_stay_inside_documents() -> None:
    plan = plan_segments([3, 2], 2)
    positions, targets = packed(torch.tensor([[5, 6, 7, 8, 9]]), plan)
    assert positions.tolist() == [[0, 1, 2, 0, 1]]
    assert targets.tolist() == [6, 7, -100, 9, -100]
